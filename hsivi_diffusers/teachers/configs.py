"""Configs of teachers: what is known of a pipeline before its weights, and what is refused by it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext, suppress
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin, UNet2DModel

from ..pipeline_hsivi import parts_of
from ..runs.artifacts import ADAPTER, OPTIONS
from ..runs.folders import check_spelling, near_folder
from ..scheduling_hsivi import HSIVIScheduler

REMEDY = "give a folder or repo id that DiffusionPipeline.from_pretrained loads, such as google/ddpm-cifar10-32"
OF_STUDENT = "give the teacher it had, and, to train its student further, name the run or LoRA by init_from"
# Names of pipelines of diffusers that are refused, as regular expressions, and why.
REFUSED = {
    "SanaSprint|LatentConsistency|KleinKV": "it is distilled already: give the model that it was distilled from",
    "^CogView4": "its network takes the times of unshifted noise levels, which is not supported",
    "^HiDream": "its text takes 67 MB a prompt",
    "^StableCascade|^Wuerstchen|^Kandinsky.*(Combined|Prior)": "its images are made by several networks in turn",
    "Video|^Wan|^LTX|^Mochi|^Allegro|^Latte|ToWorld|^SkyReels|Animate|[TI]2V|^Helios|^ConsisID|^ChronoEdit|^LucyEdit": (
        "it draws video, and only images are supported"
    ),
    "Img2Img|Inpaint|Control|Edit(?!ing)|Kontext|Fill|Upscale|Pix2Pix|ImageVariation|Adapter": (
        "it takes an image beside the text: give the text-to-image pipeline of the same model"
    ),
}


class Configs(NamedTuple):
    """What is known of a pipeline before its weights."""

    kind: str  # name of its class
    parts: Collection[str]
    network: Mapping[str, Any]  # with the name of its class
    scheduler: Mapping[str, Any]
    vae: Mapping[str, Any] | None = None


def part_of(parts: Collection[str]) -> str:
    """Name of the network among the parts of a pipeline."""
    return "transformer" if "transformer" in parts else "unet"


def read_configs(name: str, revision: str | None) -> Configs:
    """Reads the configs of a pipeline; its weights are not asked for.

    Raises:
        OSError: A config is missing.
    """
    check_spelling(name)
    check_no_student(name)
    index: dict[str, Any] = {}
    # Network and scheduler are enough for a plan, but not if the index is damaged.
    with nullcontext() if (Path(name) / "model_index.json").is_file() else suppress(OSError):
        index = DiffusionPipeline.load_config(name, revision=revision)
    check_pipeline(repr(name), index.get("_class_name"), index)
    parts = parts_of(index) or {"unet", "scheduler"}
    named = {part: index.get(part, [None, None])[1] for part in (part_of(parts), "scheduler")}
    network, scheduler = (_read_config(name, part, kind, revision) for part, kind in named.items())
    if network["_class_name"] == "Transformer2DModel" and network.get("norm_type") == "ada_norm_zero":
        network["_class_name"] = DiTTransformer2DModel.__name__  # as diffusers does
    vae = dict(AutoencoderKL.load_config(name, subfolder="vae", revision=revision)) if "vae" in parts else None
    return Configs(index.get("_class_name", "pipeline"), parts, network, scheduler, vae)


def check_no_student(name: str) -> None:
    """Refuses, with ValueError, the folder of a run or of a LoRA as a teacher."""
    folder = Path(name)
    kind = "run" if (folder / OPTIONS).is_file() else "LoRA" if (folder / ADAPTER).is_file() else None
    if kind is not None and not (folder / "model_index.json").is_file():
        raise ValueError(f"teacher {name!r} is the folder of a {kind}: {OF_STUDENT}")


def _read_config(name: str, part: str, kind: str | None, revision: str | None) -> dict[str, Any]:
    """Reads the config of a part, and completes it by the defaults of its class in diffusers, if there is one."""
    reader: Any = HSIVIScheduler if part == "scheduler" else UNet2DModel
    for subfolder in (part, None):  # the repos google/ddpm-* have all in one folder
        try:
            config = dict(reader.load_config(name, subfolder=subfolder, revision=revision))
            break
        except (OSError, ValueError) as error:
            cause = error
    else:
        if not Path(name).is_dir():
            raise FileNotFoundError(
                f"teacher {name!r} is no folder here, and no config of a {part} was found on the Hub "
                f"({type(cause).__name__}): check the spelling, the connection, and the token of a private repo"
                f"{near_folder(Path(name))}"
            )
        raise FileNotFoundError(f"teacher {name!r} has no config of a {part} ({cause}): {REMEDY}")
    named = config.get("_class_name", kind)
    parameters = signature(getattr(diffusers, str(named), lambda: None)).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {**usual, **config, "_class_name": named}


def configs_of(pipeline: DiffusionPipeline, name: str) -> Configs:
    """The configs of a loaded pipeline."""
    check_pipeline(name, type(pipeline).__name__, pipeline.config)
    network, scheduler = (getattr(pipeline, each, None) for each in (part_of(pipeline.components), "scheduler"))
    if scheduler is None:
        raise ValueError(f"teacher {name} has no scheduler, which has its noise levels: give a whole pipeline")
    # A scheduler made in memory lists its defaults there, such as clip_sample=True, which ours would not take.
    levels = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return Configs(
        type(pipeline).__name__,
        pipeline.components,
        {**getattr(network, "config", {}), "_class_name": type(network).__name__},
        {**levels, "_class_name": type(scheduler).__name__},
    )


def check_pipeline(name: str, kind: str | None, settings: Mapping[str, Any]) -> None:
    """Refuses, with ValueError, a pipeline by the name of its class and its settings.

    Args:
        name: Of the teacher, for messages.
        kind: Name of the class; one that is not of diffusers is judged by its parts, later.
        settings: Content of its model_index.json.
    """
    known = kind if kind in dir(diffusers) else ""
    if reason := next((why for pattern, why in REFUSED.items() if re.search(pattern, str(known))), None):
        raise ValueError(f"teacher {name} is a {kind}, which cannot be distilled: {reason}")
    if settings.get("is_distilled"):
        raise ValueError(
            f"teacher {name} has is_distilled=True, so it is distilled already: give the base model, such as "
            "FLUX.2-klein-base-4B"
        )


def schedule_of(name: str, configs: Configs, knows_size: bool = False, scales_input: bool = False) -> HSIVIScheduler:
    """Returns the noise schedule of a teacher, or refuses, with ValueError, one that is not supported.

    Args:
        name: Of the teacher, for messages.
        configs: Of its pipeline.
        knows_size: Whether this kind of teacher sets a shift that depends on the size of its images.
        scales_input: Whether its pipelines scale the input of the network.
    """
    if configs.scheduler.get("layer_timesteps"):
        raise ValueError(f"teacher {name} has the scheduler of a sampler that was distilled: {OF_STUDENT}")
    try:
        schedule: HSIVIScheduler = HSIVIScheduler.from_config({**configs.scheduler})
    except ValueError as error:
        raise ValueError(f"teacher {name}: {error}") from error
    if schedule.config.use_dynamic_shifting and not knows_size:
        raise ValueError(
            f"teacher {name}: its {configs.scheduler['_class_name']} has use_dynamic_shifting, so its noise levels "
            "depend on the size of images: turn it off, and set `shift` to that of the size it was trained on"
        )
    if schedule.is_edm and not scales_input:
        raise ValueError(
            f"teacher {name} has an {configs.scheduler['_class_name']}, which is supported in pipelines of Stable "
            "Diffusion and SDXL: give such a one, or its network in a `Teacher` of your own"
        )
    return schedule


def check_agreement(name: str, part: str, configs: Configs, outputs: int) -> None:
    """Refuses a network with this number of outputs and a scheduler that cannot have been trained together."""
    config, channels = configs.network, configs.network["in_channels"]
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"teacher {name}: the {part} takes {channels} channels and returns {outputs}; a noise prediction has "
            f"{channels}, or {2 * channels} with a learned variance"
        )
    clock, wanted = configs.scheduler.get("num_train_timesteps"), config.get("num_train_timesteps")
    if wanted is not None and clock is not None and wanted != clock:
        raise ValueError(
            f"teacher {name}: the {part} was made for {wanted} timesteps, the scheduler counts {clock}: correct "
            "num_train_timesteps in one of the two configs"
        )


def check_levels(name: str, schedule: HSIVIScheduler, scheduler: SchedulerMixin) -> None:
    """Refuses a schedule that has not the noise levels of the scheduler it was made from."""
    # Some schedulers of diffusers keep 2^-24 instead of a zero at the end. Flows and EDM have no betas.
    ours, theirs = (getattr(each, "alphas_cumprod", torch.zeros(0)).float() for each in (schedule, scheduler))
    if not schedule.is_flow and (len(ours) != len(theirs) or not torch.allclose(ours, theirs, atol=1e-6)):
        raise ValueError(
            f"teacher {name}: the noise levels of its {type(scheduler).__name__} cannot be rebuilt from its betas; "
            "only levels that follow from beta_start, beta_end and beta_schedule, or from trained_betas, are supported"
        )
