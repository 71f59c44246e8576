"""Networks as denoisers: a pretrained pipeline loaded as a teacher, and its UNet called in its own precision."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler


def load_teacher(
    teacher: str | os.PathLike[str] | DiffusionPipeline, revision: str | None = None
) -> tuple[UNet2DModel, HSIVIScheduler]:
    """Takes UNet and noise schedule of a pretrained pipeline.

    Args:
        teacher: Folder or repo id of a diffusers pipeline with a `UNet2DModel` and a scheduler with betas or a
            rectified flow, or such a pipeline itself, whose UNet is copied.
        revision: Branch, tag or commit of a repo.

    Returns:
        The UNet, and a `HSIVIScheduler` without a grid: make one with `from_config(scheduler.config, ...)`.

    Raises:
        ValueError: The pipeline is missing, damaged, or no teacher for this method.
    """
    if isinstance(teacher, DiffusionPipeline):
        unet, schedule = _take(teacher, type(teacher).__name__)
        return copy.deepcopy(unet).float(), schedule
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(f"teacher is a {type(teacher).__name__}: give a folder, a repo id, or a loaded pipeline")
    name = os.fspath(teacher)
    return _take(_load(name, revision), repr(name))


def _load(name: str, revision: str | None) -> DiffusionPipeline:
    remedy = "give a folder or repo id that DiffusionPipeline.from_pretrained loads, such as google/ddpm-cifar10-32"
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"teacher {name!r} is not a folder: {remedy}")
    try:
        return DiffusionPipeline.from_pretrained(name, revision=revision)
    except Exception as error:  # diffusers raises many types here, and all mean the same to the user
        if path.is_dir():
            raise ValueError(
                f"teacher {name!r} cannot be loaded ({type(error).__name__}: {error}): {remedy}"
            ) from error
        near = difflib.get_close_matches(
            path.name, map(str, os.listdir(path.parent)) if path.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(
            f"teacher {name!r} is no folder here, and was not loaded from the Hub ({type(error).__name__}): "
            f"{remedy}{hint}"
        ) from error


def _take(pipeline: DiffusionPipeline, name: str) -> tuple[UNet2DModel, HSIVIScheduler]:
    """Takes UNet and schedule of a loaded pipeline, or refuses it."""
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    others = sorted(set(pipeline.components) - {"unet", "scheduler"})
    if hasattr(pipeline, "unet_noise_scale"):
        raise ValueError(f"teacher {name} is an HSIVIPipeline, a sampler that was distilled: give the teacher it had")
    if others:
        raise ValueError(
            f"teacher {name} is a {type(pipeline).__name__} with {', '.join(others)}: only pipelines of a unet and a "
            "scheduler, which make images of pixels, can be distilled"
        )
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"teacher {name} has a unet of type {type(unet).__name__}, a UNet2DModel is needed")
    if scheduler is None:
        raise ValueError(f"teacher {name} has no scheduler, which tells its noise levels: give a whole pipeline")
    _check_agreement(name, unet, scheduler)
    try:
        named = {"_class_name": type(scheduler).__name__, **scheduler.config}
        schedule = HSIVIScheduler.from_config(named)
    except ValueError as error:
        raise ValueError(f"teacher {name}: {error}") from error
    _check_levels(name, schedule, scheduler)
    return unet, schedule


def _check_levels(name: str, schedule: HSIVIScheduler, scheduler: SchedulerMixin) -> None:
    """Refuses a schedule that has not the noise levels of the scheduler it was made from."""
    kind = type(scheduler).__name__
    check_shift(name, schedule, kind)
    # Some schedulers of diffusers keep 2^-24 instead of a zero at the end.
    ours, theirs = (getattr(each, "alphas_cumprod", torch.zeros(0)).float() for each in (schedule, scheduler))
    if not schedule.is_flow and (len(ours) != len(theirs) or not torch.allclose(ours, theirs, atol=1e-6)):
        raise ValueError(
            f"teacher {name}: the noise levels of its {kind} cannot be rebuilt from its betas; only levels that follow "
            "from beta_start, beta_end and beta_schedule, or from trained_betas, are supported"
        )


def check_shift(name: str, schedule: HSIVIScheduler, kind: str) -> None:
    """Refuses, with ValueError, a rectified flow whose levels depend on the size of the images."""
    if schedule.config.use_dynamic_shifting:
        raise ValueError(
            f"teacher {name}: its {kind} has use_dynamic_shifting, so its noise levels depend on the size of images: "
            "turn it off, and set `shift` to that of the size it was trained on"
        )


def _check_agreement(name: str, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
    """Refuses a UNet and a scheduler that cannot have been trained together."""
    channels, outputs = unet.config.in_channels, unet.config.out_channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"teacher {name}: the unet takes {channels} channels and returns {outputs}; a noise prediction has "
            f"{channels}, or {2 * channels} with a learned variance"
        )
    clock, wanted = scheduler.config.num_train_timesteps, unet.config.get("num_train_timesteps")
    if wanted is not None and wanted != clock:
        raise ValueError(
            f"teacher {name}: the unet was made for {wanted} timesteps, the scheduler counts {clock}; mend "
            "num_train_timesteps in one of the two configs"
        )


def fingerprint(unet: UNet2DModel, scheduler: SchedulerMixin) -> str:
    """Returns the SHA-256 of weights and configs of a teacher; where it was loaded from, by what, does not enter."""
    hash = hashlib.sha256()
    for part in (unet, scheduler):
        config = {name: value for name, value in part.config.items() if not name.startswith("_")}
        hash.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hash.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hash.hexdigest()


def sample_shape(unet: Any) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the images of a UNet."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def call_unet(unet: Any, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
    """Calls a network at times of its own, in its precision, and answers in that of x, as every later formula needs."""
    labels = {} if condition is None else {"class_labels": condition}
    output: Tensor = unet(x.to(unet.dtype), time, **labels).sample.to(x.dtype)
    return output


def denoise(
    unet: Any, schedule: HSIVIScheduler, x: Tensor, level: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the clean image and the noise that a network sees in x, both (B, C, H, W), at levels (B,)."""
    return schedule.predict(call_unet(unet, x, schedule.levels.time(level), condition), level, x)


# Where an image just begins to show, see signal_timestep: at timestep 800 of 8x8 grey pixels, 956 of 32x32.
LOWEST_SIGNAL = 0.312


def signal_timestep(schedule: HSIVIScheduler, shape: tuple[int, ...], signal: float) -> int:
    """Returns the first timestep where sqrt(C H W) alpha / sigma is at most a number, or the last where alpha > 0.

    A mean over n values has the noise of one by sqrt(n). So levels of images of other sizes and channels mean the same
    where this product is the same (Hoogeboom et al. 2023, arXiv 2301.11093). On the linear clock of 1000, 3.2 is at
    timestep 440 of 8x8 grey pixels, 674 of 32x32, 750 of 32x32 in colour, 836 of 64x64 in colour.

    Args:
        schedule: Gives alpha and sigma at each timestep.
        shape: (C, H, W) of the images.
        signal: Above 0.
    """
    alpha, sigma = schedule.alpha_sigma(torch.arange(len(schedule)), torch.zeros(1))
    above = math.sqrt(math.prod(shape)) * alpha / sigma > signal
    return min(int(above.sum()), int((alpha > 0).sum()) - 1)
