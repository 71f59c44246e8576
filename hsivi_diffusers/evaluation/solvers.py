"""Sampling by what a report compares: students, and the baselines (solvers of the teacher)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from ..distillation.denoisers import run_solver, sample_shape
from ..pipeline_hsivi import HSIVIPipeline
from ..scheduling_hsivi import HSIVIScheduler

# Class and settings of each baseline; what is not set is of the teacher's config, or the default of diffusers.
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler, {}),
    # diffusers' DDIMScheduler has no quadratic grid, which is the best for few steps; the formulas are the same.
    "DDIM": (HSIVIScheduler, {"timestep_spacing": "quadratic", "noise_eta": 0.0}),
    "DDIM, eta 1": (DDIMScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
}


class Sampler(Protocol):
    """Returns images in [0, 1], shape (B, C, H, W); labels, shape (B,), are for a class-conditional network."""

    def __call__(  # noqa: D102
        self, batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Solver:
    """A Sampler by the steps of a scheduler of diffusers, whose `step` is given the settings."""

    scheduler: Any
    num_steps: int
    unet: UNet2DModel
    settings: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Returns images; the noise is drawn on the CPU."""
        device = self.unet.device
        labels = None if labels is None else labels.to(device)
        given = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        noise = torch.randn(batch_size, *sample_shape(self.unet), generator=generator).to(device)
        x = run_solver(self.unet, self.scheduler, noise, self.num_steps, labels, **self.settings, **given)
        return (x / 2 + 0.5).clamp(0, 1)

    @property
    def grid(self) -> str:
        """The timesteps of the network calls, such as "leading: 800, 600, 400, 200, 0"."""
        self.scheduler.set_timesteps(self.num_steps)
        return f"{self.scheduler.config.get('timestep_spacing', 'own')}: {shorten(self.scheduler.timesteps.tolist())}"


def shorten(timesteps: list[int]) -> str:
    """Timesteps as text, of more than ten the first three and the last."""
    shown = timesteps if len(timesteps) <= 10 else [*timesteps[:3], "...", timesteps[-1]]
    return ", ".join(map(str, shown))


def make_solver(method: str, num_steps: int, unet: UNet2DModel, config: Any, **settings: Any) -> Solver:
    """Returns a solver of the teacher.

    Args:
        method: Key of SOLVERS, such as "DDIM", eta 0 on the quadratic grid, or "DPM-Solver++", 2M.
        num_steps: Network calls.
        unet: The teacher.
        config: Config of the teacher's scheduler.
        **settings: Of the solver's scheduler, such as `timestep_spacing`, instead of those of SOLVERS and config.

    Raises:
        ValueError: The method is unknown.
    """
    if method not in SOLVERS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(map(repr, SOLVERS))}")
    scheduler, chosen = SOLVERS[method]
    arguments = {"eta": 1.0} if method == "DDIM, eta 1" else {}
    return Solver(scheduler.from_config(config, **{**chosen, **settings}), num_steps, unet, arguments)


def make_student(pipeline: HSIVIPipeline, num_steps: int | None = None) -> Sampler:
    """Returns the distilled pipeline as a sampler, with one of its trained counts of calls, or the largest."""
    pipeline.set_progress_bar_config(disable=True)

    def sampler(batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None) -> torch.Tensor:
        images: torch.Tensor = pipeline(
            batch_size, generator, num_steps, class_labels=labels, output_type="pt", return_dict=False
        )[0]
        return images

    return sampler


@torch.no_grad()
def sample(
    sampler: Sampler, num_samples: int, batch_size: int, seed: int, num_classes: int | None = None
) -> Iterator[torch.Tensor]:
    """Yields batches of images on the CPU, `num_samples` in all.

    Each batch has a generator of its own, so that every method starts each batch from the same noise. With classes,
    image i is of the class i mod `num_classes`, for every method: so the classes are balanced.
    """
    for first in range(0, num_samples, batch_size):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        rows = torch.arange(first, min(first + batch_size, num_samples))
        labels = () if num_classes is None else (rows % num_classes,)
        yield sampler(len(rows), generator, *labels).cpu()
