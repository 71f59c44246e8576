"""Configs of teachers: what is known of a pipeline before its weights, and what is refused by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)

from ..pipeline_hsivi import HSIVIPipeline, parts_of
from ..runs.folders import check_spelling, near_folder
from ..scheduling_hsivi import HSIVIScheduler
from .denoisers import Network
from .prompts import ENCODED, kind_among

REMEDY = "give a folder or repo id that DiffusionPipeline.from_pretrained loads, such as google/ddpm-cifar10-32"
SUPPORTED = (
    "pipelines of a UNet2DModel and a scheduler, which make images of pixels, and those of DiT, Stable Diffusion 1 and "
    "2, SDXL and PixArt"
)
# Network of a pipeline that has more parts than network and scheduler.
LATENT: dict[str, type[Network]] = {
    "DiTPipeline": DiTTransformer2DModel,
    "StableDiffusionPipeline": UNet2DConditionModel,
    "StableDiffusionXLPipeline": UNet2DConditionModel,
    "PixArtAlphaPipeline": PixArtTransformer2DModel,
    "PixArtSigmaPipeline": PixArtTransformer2DModel,
}
TEXT = {LATENT[kind].__name__ for kind in ENCODED}  # networks that take text
# Options of a UNet2DConditionModel that tell what else it takes beside text, and what of it is supported.
TOLD = {
    "addition_embed_type": (None, "text_time"),  # SDXL's
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
}


class Configs(NamedTuple):
    """What is known of a pipeline before its weights."""

    kind: str  # name of its class
    parts: Collection[str]
    network: Mapping[str, Any]  # with the name of its class
    scheduler: Mapping[str, Any]


def part_of(parts: Collection[str]) -> str:
    """Name of the network among the parts of a pipeline."""
    return "transformer" if "transformer" in parts else "unet"


def kind_of(pipeline: DiffusionPipeline) -> str:
    """Name of the class of a pipeline; a subclass goes by the name of its class in LATENT."""
    return kind_among(LATENT, pipeline) or type(pipeline).__name__


def read_configs(name: str, revision: str | None) -> Configs:
    """Reads the configs of a pipeline; its weights are not asked for.

    Raises:
        OSError: A config is missing.
    """
    check_spelling(name)
    index: dict[str, Any] = {}
    with suppress(OSError):  # which network and scheduler can do without
        index = DiffusionPipeline.load_config(name, revision=revision)
    parts = parts_of(index) or {"unet", "scheduler"}
    named = {part: index.get(part, [None, None])[1] for part in (part_of(parts), "scheduler")}
    network, scheduler = (_read_config(name, part, kind, revision) for part, kind in named.items())
    if network["_class_name"] == "Transformer2DModel" and network.get("norm_type") == "ada_norm_zero":
        network["_class_name"] = DiTTransformer2DModel.__name__  # as diffusers does
    return Configs(index.get("_class_name", "pipeline"), parts, network, scheduler)


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
    """The configs of a loaded pipeline; a subclass goes by the name of its class here."""
    part, kind = part_of(pipeline.components), kind_of(pipeline)
    network, scheduler = (getattr(pipeline, each, None) for each in (part, "scheduler"))
    if scheduler is None:
        raise ValueError(f"teacher {name} has no scheduler, which tells its noise levels: give a whole pipeline")
    return Configs(
        kind,
        pipeline.components,
        {**getattr(network, "config", {}), "_class_name": _class_name(network, LATENT.get(kind, UNet2DModel))},
        {**scheduler.config, "_class_name": type(scheduler).__name__},
    )


def _class_name(thing: Any, kind: type) -> str:
    return (kind if isinstance(thing, kind) else type(thing)).__name__


def check(name: str, configs: Configs) -> HSIVIScheduler:
    """Returns the noise schedule of a teacher, or refuses it, with ValueError."""
    kind, part = configs.kind, part_of(configs.parts)
    others = sorted({*configs.parts} - {part, "scheduler"})
    if "unet_noise_scale" in configs.parts or kind == HSIVIPipeline.__name__:
        raise ValueError(f"teacher {name} is an HSIVIPipeline, a sampler that was distilled: give the teacher it had")
    if (others or part == "transformer") and kind not in LATENT:
        raise ValueError(
            f"teacher {name} is a {kind} with {', '.join(others or [part])}: only {SUPPORTED} can be distilled"
        )
    found, wanted = configs.network["_class_name"], LATENT.get(kind, UNet2DModel).__name__
    if found != wanted:
        raise ValueError(f"teacher {name} has a {part} of type {found}, a {wanted} is needed")
    _check_agreement(name, part, configs)
    if configs.scheduler.get("layer_timesteps"):
        raise ValueError(f"teacher {name} has the scheduler of a sampler that was distilled: give the teacher it had")
    try:
        schedule: HSIVIScheduler = HSIVIScheduler.from_config({**configs.scheduler})
    except ValueError as error:
        raise ValueError(f"teacher {name}: {error}") from error
    if schedule.config.use_dynamic_shifting:
        raise ValueError(
            f"teacher {name}: its {configs.scheduler['_class_name']} has use_dynamic_shifting, so its noise levels "
            "depend on the size of images: turn it off, and set `shift` to that of the size it was trained on"
        )
    return schedule


def _check_agreement(name: str, part: str, configs: Configs) -> None:
    """Refuses a network and a scheduler that cannot have been trained together."""
    config, channels = configs.network, configs.network["in_channels"]
    for option, accepted in TOLD.items():
        if config["_class_name"] == "UNet2DConditionModel" and (given := config.get(option)) not in accepted:
            raise ValueError(
                f"teacher {name}: {option}={given!r} of the unet, and only {' or '.join(map(repr, accepted))} is "
                "supported: give a text-to-image model that takes text alone"
            )
    told, classes = (config.get(option) for option in ("class_embed_type", "num_class_embeds"))
    if config["_class_name"] == "UNet2DModel" and told is not None and (told == "identity" or not classes):
        raise ValueError(
            f"teacher {name}: class_embed_type={told!r} and num_class_embeds={classes} of the unet, which then takes "
            "what is no class label: give a teacher of class labels, or of none"
        )
    outputs = config["out_channels"] or channels
    if not isinstance(config["sample_size"], int) and (part == "transformer" or config["sample_size"] is None):
        raise ValueError(f"teacher {name}: sample_size={config['sample_size']} of the {part}: it must be a number")
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"teacher {name}: the {part} takes {channels} channels and returns {outputs}; a noise prediction has "
            f"{channels}, or {2 * channels} with a learned variance"
        )
    clock, wanted = configs.scheduler.get("num_train_timesteps"), config.get("num_train_timesteps")
    if wanted is not None and clock is not None and wanted != clock:
        raise ValueError(
            f"teacher {name}: the {part} was made for {wanted} timesteps, the scheduler counts {clock}; mend "
            "num_train_timesteps in one of the two configs"
        )


def check_levels(name: str, schedule: HSIVIScheduler, scheduler: SchedulerMixin) -> None:
    """Refuses a schedule that has not the noise levels of the scheduler it was made from."""
    # Some schedulers of diffusers keep 2^-24 instead of a zero at the end.
    ours, theirs = (getattr(each, "alphas_cumprod", torch.zeros(0)).float() for each in (schedule, scheduler))
    if not schedule.is_flow and (len(ours) != len(theirs) or not torch.allclose(ours, theirs, atol=1e-6)):
        raise ValueError(
            f"teacher {name}: the noise levels of its {type(scheduler).__name__} cannot be rebuilt from its betas; "
            "only levels that follow from beta_start, beta_end and beta_schedule, or from trained_betas, are supported"
        )
