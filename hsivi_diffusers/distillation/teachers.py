"""Teachers: pretrained pipelines of diffusers, loaded or refused, and the pipelines that their students go into."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, SchedulerMixin, UNet2DModel
from torch import Tensor

from ..hub import class_names
from ..modeling_hsivi import HSIVINoiseScale
from ..pipeline_hsivi import HSIVIPipeline, check_finite_weights, naming_damage, parts_of
from ..scheduling_hsivi import HSIVIScheduler
from .denoisers import Network

REMEDY = "give a folder or repo id that DiffusionPipeline.from_pretrained loads, such as google/ddpm-cifar10-32"
SUPPORTED = "pipelines of a UNet2DModel and a scheduler, which make images of pixels, and a DiTPipeline"
KINDS: dict[str, type[Network]] = {"unet": UNet2DModel, "transformer": DiTTransformer2DModel}  # by part of a pipeline
VAE_BATCH = 8  # latents that are decoded at once


class Configs(NamedTuple):
    """What is known of a pipeline before its weights."""

    kind: str  # name of its class
    parts: Collection[str]
    network: Mapping[str, Any]  # with the name of its class
    scheduler: Mapping[str, Any]


def load_teacher(
    teacher: str | os.PathLike[str] | DiffusionPipeline, revision: str | None = None
) -> tuple[Network, HSIVIScheduler]:
    """Takes network and noise schedule of a pretrained pipeline.

    Args:
        teacher: Folder or repo id of a diffusers pipeline of a `UNet2DModel` and a scheduler, or of a `DiTPipeline`, or
            such a pipeline itself, whose network is copied. The scheduler has betas, or is a rectified flow.
        revision: Branch, tag or commit of a repo.

    Returns:
        The network, and a `HSIVIScheduler` without a grid: make one with `from_config(scheduler.config, ...)`.

    Raises:
        ValueError: The pipeline is missing, damaged, or no teacher for this method.
    """
    network, schedule, _ = load_parts(teacher, revision)
    return network, schedule


def load_parts(
    teacher: str | os.PathLike[str] | DiffusionPipeline, revision: str | None = None
) -> tuple[Network, HSIVIScheduler, DiffusionPipeline | None]:
    """Returns what `load_teacher` does, and the pipeline if the student is to be put into one of its kind."""
    if isinstance(teacher, DiffusionPipeline):
        pipeline, name = teacher, type(teacher).__name__
    elif isinstance(teacher, str | os.PathLike):
        pipeline, name = _load(os.fspath(teacher), revision), repr(os.fspath(teacher))
    else:
        raise ValueError(f"teacher is a {type(teacher).__name__}: give a folder, a repo id, or a loaded pipeline")
    schedule = check(name, _configs_of(pipeline, name))
    _check_levels(name, schedule, pipeline.scheduler)
    network = network_of(pipeline)
    host = pipeline if isinstance(pipeline, DiTPipeline) else None
    if pipeline is not teacher:
        return network, schedule, host
    host = host and _like(host, vae=copy.deepcopy(host.vae).float())  # the one given stays as it is
    return copy.deepcopy(network).float(), schedule, host


def _load(name: str, revision: str | None) -> DiffusionPipeline:
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"teacher {name!r} is not a folder: {REMEDY}")
    with suppress(OSError):  # what is missing, the loading itself reports
        check(repr(name), read_configs(name, revision))
    try:
        return DiffusionPipeline.from_pretrained(name, revision=revision)
    except Exception as error:  # diffusers raises many types here, and all mean the same to the user
        if path.is_dir():
            raise ValueError(
                f"teacher {name!r} cannot be loaded ({type(error).__name__}: {error}): {REMEDY}"
            ) from error
        near = difflib.get_close_matches(
            path.name, map(str, os.listdir(path.parent)) if path.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(
            f"teacher {name!r} is no folder here, and was not loaded from the Hub ({type(error).__name__}): "
            f"{REMEDY}{hint}"
        ) from error


def part_of(parts: Collection[str]) -> str:
    """Name of the network among the parts of a pipeline."""
    return "transformer" if "transformer" in parts else "unet"


def network_of(pipeline: DiffusionPipeline) -> Network:
    """Returns the network of a pipeline, teacher or student."""
    network: Network = getattr(pipeline, part_of(pipeline.components))
    return network


def read_configs(name: str, revision: str | None) -> Configs:
    """Reads the configs of a pipeline; its weights are not asked for.

    Raises:
        OSError: A config is missing.
    """
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
        raise FileNotFoundError(f"teacher {name!r} has no config of a {part} ({cause}): {REMEDY}")
    named = config.get("_class_name", kind)
    parameters = signature(getattr(diffusers, str(named), lambda: None)).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {**usual, **config, "_class_name": named}


def _configs_of(pipeline: DiffusionPipeline, name: str) -> Configs:
    """The configs of a loaded pipeline; a subclass goes by the name of its class here."""
    part = part_of(pipeline.components)
    network, scheduler = (getattr(pipeline, each, None) for each in (part, "scheduler"))
    if scheduler is None:
        raise ValueError(f"teacher {name} has no scheduler, which tells its noise levels: give a whole pipeline")
    return Configs(
        _class_name(pipeline, DiTPipeline),
        pipeline.components,
        {**getattr(network, "config", {}), "_class_name": _class_name(network, KINDS[part])},
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
    if (others or part == "transformer") and kind != DiTPipeline.__name__:
        raise ValueError(
            f"teacher {name} is a {kind} with {', '.join(others or [part])}: only {SUPPORTED} can be distilled"
        )
    if (found := configs.network["_class_name"]) != KINDS[part].__name__:
        raise ValueError(f"teacher {name} has a {part} of type {found}, a {KINDS[part].__name__} is needed")
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
    outputs = config["out_channels"] or channels
    if part == "transformer" and not isinstance(config["sample_size"], int):
        raise ValueError(f"teacher {name}: sample_size={config['sample_size']} of the transformer: it must be a number")
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


def _check_levels(name: str, schedule: HSIVIScheduler, scheduler: SchedulerMixin) -> None:
    """Refuses a schedule that has not the noise levels of the scheduler it was made from."""
    # Some schedulers of diffusers keep 2^-24 instead of a zero at the end.
    ours, theirs = (getattr(each, "alphas_cumprod", torch.zeros(0)).float() for each in (schedule, scheduler))
    if not schedule.is_flow and (len(ours) != len(theirs) or not torch.allclose(ours, theirs, atol=1e-6)):
        raise ValueError(
            f"teacher {name}: the noise levels of its {type(scheduler).__name__} cannot be rebuilt from its betas; "
            "only levels that follow from beta_start, beta_end and beta_schedule, or from trained_betas, are supported"
        )


def fingerprint(network: Network, scheduler: SchedulerMixin) -> str:
    """Returns the SHA-256 of weights and configs of a teacher; where it was loaded from, by what, does not enter."""
    hash = hashlib.sha256()
    for part in (network, scheduler):
        config = {name: value for name, value in part.config.items() if not name.startswith("_")}
        hash.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hash.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hash.hexdigest()


def make_pipeline(
    host: DiffusionPipeline | None, student: Network, scheduler: HSIVIScheduler, noise_scale: HSIVINoiseScale | None
) -> DiffusionPipeline:
    """Returns the sampler: an `HSIVIPipeline`, or one like the host, with another network and scheduler."""
    if host is None:
        return HSIVIPipeline(unet=student, scheduler=scheduler, unet_noise_scale=noise_scale)
    student.register_to_config(out_channels=student.out_channels)  # which the pipeline asks for, and may be None
    return _like(host, transformer=student, scheduler=scheduler, vae=copy.deepcopy(host.vae))


def _like(host: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """Returns a pipeline like another, with other parts; names of classes are no part."""
    pipeline: DiffusionPipeline = type(host)(**{**host.components, **parts})
    if hasattr(host, "labels"):
        pipeline.labels = host.labels
        pipeline.register_to_config(**class_names(host))
    return pipeline


def load_student(source: str | Path) -> DiffusionPipeline:
    """Loads what `make_pipeline` made.

    Raises:
        ValueError: It is of another kind, was not distilled, or is damaged.
        OSError: It is missing.
    """
    kind = DiffusionPipeline.load_config(str(source)).get("_class_name")
    if kind != DiTPipeline.__name__:
        return HSIVIPipeline.from_pretrained(source)
    with naming_damage():
        pipeline = DiTPipeline.from_pretrained(source)
    if not hasattr(pipeline.scheduler, "trained_grids"):
        raise ValueError(f"{str(source)!r} is a {kind} that was not distilled: distil it with `hsivi distil`")
    check_finite_weights(pipeline.transformer, "transformer")
    return pipeline


def image_shape(host: DiffusionPipeline | None, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the images that `decode` makes of what has another shape."""
    if host is None:
        return shape
    factor = 2 ** (len(host.vae.config.block_out_channels) - 1)
    return host.vae.config.out_channels, factor * shape[1], factor * shape[2]


@torch.no_grad()
def decode(host: DiffusionPipeline | None, x: Tensor) -> Tensor:
    """Returns images in [0, 1], shape (B, C, H, W), of what a network has denoised: pixels, or latents of the VAE."""
    if host is not None:
        latents = (x / host.vae.config.scaling_factor).to(host.vae.device, host.vae.dtype).split(VAE_BATCH)
        x = torch.cat([host.vae.decode(each).sample.float() for each in latents])
    return (x / 2 + 0.5).clamp(0, 1)
