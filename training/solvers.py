"""Sampling by every rival method of the report: solvers of the teacher, and trained consistency models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler

# Pictures in [0, 1], shape (B, C, H, W), from a batch size and a generator.
Sampler = Callable[[int, torch.Generator], torch.Tensor]


def make_solver(method: str, num_steps: int, unet: UNet2DModel, config: Any) -> Sampler:
    """Returns a sampler of the teacher.

    Args:
        method: "DDPM"; "DDIM", eta 0 on the quadratic grid; "DDIM eta 1"; "DPM-Solver++", 2M; or "UniPC".
        num_steps: Network calls.
        unet: The teacher.
        config: Config of the teacher's scheduler.

    Raises:
        ValueError: The method is unknown.
    """
    arguments: dict[str, Any] = {}
    if method == "DDPM":
        scheduler = DDPMScheduler.from_config(config)
    elif method == "DDIM":
        # diffusers' DDIMScheduler has no quadratic grid, which is the best for few steps; the formulas are the same.
        scheduler = HSIVIScheduler.from_config(config, timestep_spacing="quadratic", noise_eta=0.0)
    elif method == "DDIM eta 1":
        scheduler, arguments = DDIMScheduler.from_config(config), {"eta": 1.0}
    elif method == "DPM-Solver++":
        scheduler = DPMSolverMultistepScheduler.from_config(config)
    elif method == "UniPC":
        scheduler = UniPCMultistepScheduler.from_config(config)
    else:
        raise ValueError(f"method {method!r} is unknown: choose DDPM, DDIM, DDIM eta 1, DPM-Solver++ or UniPC")
    return _follow(scheduler, num_steps, unet, arguments, takes_generator=method != "UniPC")


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
        size = unet.config.sample_size
        x = torch.randn(batch_size, unet.config.in_channels, size, size, generator=generator)
        scheduler.set_timesteps(num_steps)
        arguments = {**given, "generator": generator} if takes_generator else given
        for timestep in scheduler.timesteps:
            x = scheduler.step(unet(x, timestep).sample, timestep, x, **arguments).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)

    return sampler


def make_student(pipeline: HSIVIPipeline) -> Sampler:
    """Returns the distilled pipeline as a sampler."""
    pipeline.set_progress_bar_config(disable=True)
    return lambda batch_size, generator: pipeline(batch_size, generator, output_type="pt", return_dict=False)[0]


@torch.no_grad()
def sample(sampler: Sampler, num_samples: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of pictures, `num_samples` in all.

    Each batch has a generator of its own, so that every method starts each batch from the same noise.
    """
    for first in range(0, num_samples, batch_size):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        yield sampler(min(batch_size, num_samples - first), generator)
