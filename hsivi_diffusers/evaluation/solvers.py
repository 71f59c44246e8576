"""Sampling by every rival method of the report: solvers of the teacher, and trained consistency models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from ..distillation.denoisers import run_solver, sample_shape
from ..pipeline_hsivi import HSIVIPipeline
from ..scheduling_hsivi import HSIVIScheduler

# Pictures in [0, 1], shape (B, C, H, W), from a batch size and a generator.
Sampler = Callable[[int, torch.Generator], torch.Tensor]

# Class and settings of each solver; what is not set is of the teacher's config, or the default of diffusers.
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler, {}),
    # diffusers' DDIMScheduler has no quadratic grid, which is the best for few steps; the formulas are the same.
    "DDIM": (HSIVIScheduler, {"timestep_spacing": "quadratic", "noise_eta": 0.0}),
    "DDIM eta 1": (DDIMScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
}


def make_solver(method: str, num_steps: int, unet: UNet2DModel, config: Any) -> Sampler:
    """Returns a sampler of the teacher.

    Args:
        method: Key of SOLVERS, such as "DDIM", eta 0 on the quadratic grid, or "DPM-Solver++", 2M.
        num_steps: Network calls.
        unet: The teacher.
        config: Config of the teacher's scheduler.

    Raises:
        ValueError: The method is unknown.
    """
    if method not in SOLVERS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(SOLVERS)}")
    scheduler, settings = SOLVERS[method]
    arguments = {"eta": 1.0} if method == "DDIM eta 1" else {}
    takes_generator = method not in ("UniPC", "DEIS")
    return _follow(scheduler.from_config(config, **settings), num_steps, unet, arguments, takes_generator)


def make_consistency_sampler(unet: UNet2DModel, config: Any, num_steps: int) -> Sampler:
    """Returns a sampler of a trained consistency model, by diffusers' LCMScheduler.

    A step predicts the clean picture and adds fresh noise to it; the last step adds none.

    Args:
        unet: Of the pipeline that train_consistency.py wrote.
        config: Config of that pipeline's scheduler.
        num_steps: Network calls.
    """
    return _follow(LCMScheduler.from_config(config), num_steps, unet, {}, takes_generator=True)


def _follow(scheduler: Any, num_steps: int, unet: UNet2DModel, given: dict[str, Any], takes_generator: bool) -> Sampler:
    """Returns the sampler that goes from noise to a picture by the steps of a scheduler, which takes what is given."""

    def sampler(batch_size: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(batch_size, *sample_shape(unet), generator=generator)
        arguments = {**given, "generator": generator} if takes_generator else given
        return (run_solver(unet, scheduler, x, num_steps, **arguments) / 2 + 0.5).clamp(0, 1)

    return sampler


def make_student(pipeline: HSIVIPipeline, num_steps: int | None = None) -> Sampler:
    """Returns the distilled pipeline as a sampler.

    Args:
        pipeline: See there.
        num_steps: Network calls, one of the counts that were trained; the largest by default.
    """
    pipeline.set_progress_bar_config(disable=True)
    return lambda batch_size, generator: pipeline(
        batch_size, generator, num_steps, output_type="pt", return_dict=False
    )[0]


@torch.no_grad()
def sample(sampler: Sampler, num_samples: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of pictures, `num_samples` in all.

    Each batch has a generator of its own, so that every method starts each batch from the same noise.
    """
    for first in range(0, num_samples, batch_size):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        yield sampler(min(batch_size, num_samples - first), generator)
