"""Teachers: pretrained pipelines of diffusers, loaded or refused, and the pipelines that their students go into."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    SchedulerMixin,
)
from diffusers.utils import logging
from huggingface_hub import ModelCard, file_exists, hf_hub_download
from safetensors import safe_open
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..pipeline_hsivi import HSIVIPipeline, check_finite_weights, naming_damage, parts_of
from ..runs.artifacts import ADAPTER, read_prompts, run_of
from ..runs.folders import near_folder
from ..runs.state_dicts import hash_weights
from ..scheduling_hsivi import HSIVIScheduler
from ..share.push import CUT, class_names
from .adapters import WEIGHTS, share
from .configs import LATENT, REMEDY, check, check_levels, configs_of, kind_of, part_of, read_configs
from .denoisers import Network, sample_shape
from .prompts import PromptTable, encode_prompts, takes_text

logger = logging.get_logger(__name__)

# diffusers renamed the argument in 0.40, and warns of the old name.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
IN_FLOAT32: dict[str, Any] = {DTYPE: torch.float32}
VAE_PIXELS = 2**21  # of images that are decoded at once


def load_teacher(
    teacher: str | os.PathLike[str] | DiffusionPipeline, revision: str | None = None
) -> tuple[Network, HSIVIScheduler]:
    """Takes network and noise schedule of a pretrained pipeline.

    Args:
        teacher: Folder or repo id of a diffusers pipeline of a `UNet2DModel` and a scheduler, or of one of `LATENT`, or
            such a pipeline itself, whose network is copied. The scheduler has betas, or is a rectified flow.
        revision: Branch, tag or commit of a repo.

    Returns:
        The network, and a `HSIVIScheduler` without a grid: make one with `from_config(scheduler.config, ...)`.

    Raises:
        ValueError: The pipeline is missing, damaged, or no teacher for this method.
    """
    parts = load_parts(teacher, revision)
    return parts.network, parts.schedule


class Parts(NamedTuple):
    """A teacher in parts."""

    network: Network
    schedule: HSIVIScheduler
    host: DiffusionPipeline | None  # the pipeline, if its students are to be put into one of its kind
    encoders: Callable[[], dict[str, Any]]  # loads its text encoders, by name


def load_parts(teacher: str | os.PathLike[str] | DiffusionPipeline, revision: str | None = None) -> Parts:
    """Returns what `load_teacher` does, and more of the pipeline."""
    if isinstance(teacher, DiffusionPipeline):
        pipeline, name = teacher, type(teacher).__name__
    elif isinstance(teacher, str | os.PathLike):
        pipeline, name = _load(os.fspath(teacher), revision), repr(os.fspath(teacher))
    else:
        raise ValueError(f"teacher is a {type(teacher).__name__}: give a folder, a repo id, or a loaded pipeline")
    schedule = check(name, configs_of(pipeline, name))
    if adapted := [part for part, module in pipeline.components.items() if hasattr(module, "peft_config")]:
        raise ValueError(
            f"teacher {name} has adapters in its {', '.join(adapted)}, which would not be distilled: call fuse_lora() "
            "and unload_lora_weights() of the pipeline first"
        )
    check_levels(name, schedule, pipeline.scheduler)
    network = network_of(pipeline)
    host = pipeline if kind_of(pipeline) in LATENT else None
    if pipeline is not teacher:
        return Parts(network, schedule, host, partial(_load_encoders, os.fspath(teacher), revision))
    host = host and _like(host, vae=copy.deepcopy(host.vae).float())  # the one given stays as it is
    whole = nn.Module.float(copy.deepcopy(network))  # that of diffusers refuses a network with quantised weights
    return Parts(whole, schedule, host, lambda: copy.deepcopy(text_encoders(pipeline)))


def _load_encoders(name: str, revision: str | None) -> dict[str, Any]:
    index = DiffusionPipeline.load_config(name, revision=revision)
    part = part_of(parts_of(index))
    without = {part: None, "vae": None, **IN_FLOAT32}
    return text_encoders(DiffusionPipeline.from_pretrained(name, revision=revision, **without))


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Returns the text encoders of a pipeline, by name."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}


def without_encoders(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Returns a pipeline with the same parts but for its text encoders."""
    return _like(pipeline, **{name: None for name in pipeline.components if name.startswith("text_encoder")})


def _load(name: str, revision: str | None) -> DiffusionPipeline:
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"teacher {name!r} is not a folder: {REMEDY}")
    with suppress(OSError):  # what is missing, the loading itself reports
        check(repr(name), read_configs(name, revision))
    try:
        return DiffusionPipeline.from_pretrained(name, revision=revision, **IN_FLOAT32)
    except Exception as error:  # diffusers raises many types here, and all mean the same to the user
        if path.is_dir():
            raise ValueError(
                f"teacher {name!r} cannot be loaded ({type(error).__name__}: {error}): {REMEDY}"
            ) from error
        raise ValueError(
            f"teacher {name!r} is no folder here, and was not loaded from the Hub ({type(error).__name__}): "
            f"{REMEDY}{near_folder(path)}"
        ) from error


def check_prompts(takes_text: bool, prompts: Any) -> None:
    """Refuses, with ValueError, prompts for a teacher that takes no text, and a teacher that does without any."""
    if prompts is not None and not takes_text:
        raise ValueError("prompts was given, and the teacher takes no text: leave it out")
    if takes_text and prompts is None:
        raise ValueError(
            "prompts is missing, and the teacher takes text: give a text file with one prompt in a line, or from "
            "Python a list"
        )


def load_prompts(
    host: DiffusionPipeline | None, prompts: str | list[str] | None, negative: str, device: torch.device
) -> PromptTable | None:
    """Returns the encoded prompts of a teacher that takes text, or None.

    Raises:
        ValueError: It takes text and there are no prompts, or the other way round.
    """
    by_text = host is not None and takes_text(host)
    check_prompts(by_text, prompts)
    if host is None or prompts is None:
        return None
    _, height, width = image_shape(host, sample_shape(network_of(host)))
    return encode_prompts(host, read_prompts(prompts), negative, (height, width), device)


def network_of(pipeline: DiffusionPipeline) -> Network:
    """Returns the network of a pipeline, teacher or student."""
    network: Network = getattr(pipeline, part_of(pipeline.components))
    return network


def weights_sha256(network: Network) -> str:
    """Returns the SHA-256 of the weights of a network."""
    hash = hashlib.sha256()
    hash_weights(hash, network)
    return hash.hexdigest()


def fingerprint(network: Network, scheduler: SchedulerMixin) -> str:
    """Returns the SHA-256 of weights and configs of a teacher; where it was loaded from, by what, does not enter."""
    hash = hashlib.sha256()
    for part in (network, scheduler):
        # Of quantised weights the config says something else when they have been saved.
        names = {name for name in part.config if not name.startswith("_")} - {"quantization_config"}
        config = {name: part.config[name] for name in names}
        hash.update(json.dumps(config, sort_keys=True, default=str).encode())
    hash_weights(hash, network)
    return hash.hexdigest()


def make_pipeline(
    host: DiffusionPipeline | None,
    student: Network,
    scheduler: HSIVIScheduler,
    noise_scale: HSIVINoiseScale | None = None,
    **encoders: Any,
) -> DiffusionPipeline:
    """Returns the sampler: an `HSIVIPipeline`, or one like the host, with other parts."""
    if host is None:
        return HSIVIPipeline(unet=student, scheduler=scheduler, unet_noise_scale=noise_scale)
    if isinstance(student, DiTTransformer2DModel):
        student.register_to_config(out_channels=student.out_channels)  # which the pipeline asks for, and may be None
    parts = {part_of(host.components): student, "scheduler": scheduler, **encoders}
    for name, part in host.components.items():
        if isinstance(part, nn.Module) and name not in parts:
            parts[name] = copy.deepcopy(part)
    pipeline = _like(host, **parts)
    return pipeline.to(student.device, student.dtype) if encoders else pipeline


def _like(host: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """Returns a pipeline like another, with other parts; names of classes are no part."""
    settings = {name: host.config[name] for name in signature(type(host)).parameters if name in host.config}
    pipeline: DiffusionPipeline = type(host)(**{**settings, **host.components, **parts})
    if "scheduler" in parts:
        pipeline.scheduler = parts["scheduler"]  # some pipelines replace the one they are made with
    if hasattr(host, "labels"):
        pipeline.labels = host.labels
        pipeline.register_to_config(**class_names(host))
    return pipeline


def load_student(source: str | Path, host: DiffusionPipeline | None = None) -> DiffusionPipeline:
    """Loads a sampler: a pipeline that `make_pipeline` made, or an adapter, onto the weights of its teacher.

    Args:
        source: Folder or repo id.
        host: The teacher of an adapter, where it is loaded already; it stays as it is.

    Raises:
        ValueError: It is of another kind, was not distilled, or is damaged.
        OSError: It is missing.
    """
    if (Path(source) / ADAPTER).is_file():
        run = run_of(str(source))
        return _with_adapter(str(source), run.get("pretrained_teacher_model"), run.get("revision"), host)
    try:
        kind = DiffusionPipeline.load_config(str(source)).get("_class_name")
    except OSError:
        if Path(source).is_dir() or not _has_adapter(str(source)):
            raise
        return _with_adapter(str(source), ModelCard.load(str(source)).data.base_model, None, host)
    if kind not in LATENT:
        return HSIVIPipeline.from_pretrained(source)
    with naming_damage():
        pipeline = getattr(diffusers, kind).from_pretrained(source, **IN_FLOAT32)
    if not hasattr(pipeline.scheduler, "trained_grids"):
        raise ValueError(f"{str(source)!r} is a {kind} that was not distilled: distil it with `hsivi distil`")
    check_finite_weights(network_of(pipeline), part_of(pipeline.components))
    return pipeline


def _has_adapter(repo_id: str) -> bool:
    """Whether a repo holds an adapter; not, if the Hub cannot be asked."""
    with suppress(ValueError, *CUT):
        return file_exists(repo_id, ADAPTER)
    return False


def _with_adapter(
    source: str, teacher: str | None, revision: str | None, host: DiffusionPipeline | None
) -> DiffusionPipeline:
    """A pipeline of a teacher's tensors, with the adapter and the scheduler of a folder or repo."""
    if not teacher and host is None:
        raise ValueError(
            f"{source} holds an adapter, and nothing beside it names its teacher: load it as its card says, by "
            "load_lora_weights of a pipeline of the teacher"
        )
    host = host or _load(str(teacher), revision)
    with naming_damage():
        _compare_base(source, host)
        scheduler = HSIVIScheduler.from_pretrained(source, subfolder="scheduler")
        pipeline = _like(host, unet=share(network_of(host).requires_grad_(False)), scheduler=scheduler)
        network_of(pipeline).load_lora_adapter(source, prefix="unet", weight_name=ADAPTER)
    return pipeline


def _compare_base(source: str, host: DiffusionPipeline) -> None:
    """Says so if an adapter was trained on other weights; those of half precision may do as well."""
    path = Path(source) / ADAPTER
    with safe_open(path if path.is_file() else hf_hub_download(source, ADAPTER), framework="pt") as file:
        trained_on = (file.metadata() or {}).get(WEIGHTS)
    if trained_on is not None and trained_on != weights_sha256(network_of(host)):
        logger.warning(
            f"{source} was trained on other weights than it is loaded onto, and its images may be poor: give the "
            "teacher that it was trained on, in the same revision"
        )


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
        _, height, width = image_shape(host, sample_shape(network_of(host)))
        batch = max(1, VAE_PIXELS // (height * width))
        latents = (x / host.vae.config.scaling_factor).to(host.vae.device, host.vae.dtype).split(batch)
        x = torch.cat([host.vae.decode(each).sample.float() for each in latents])
    return (x / 2 + 0.5).clamp(0, 1)
