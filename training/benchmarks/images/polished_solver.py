"""A solver whose times, what the network is told of them, noise and contrast are numbers of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsivi_diffusers.teachers.solvers import Solver, run_solver, use_grid


@dataclass(frozen=True)
class PolishedSolver(Solver):
    """A solver by a scheduler of `tell`, from noise of another standard deviation than 1.

    The image x in [-1, 1] becomes contrast * x + brightness.
    """

    noise_scale: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0

    def __call__(self, batch_size: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """Returns images; the noise is drawn on the CPU."""
        device = self.teacher.device
        noise = self.noise_scale * torch.randn(batch_size, *self.teacher.shape, generator=generator).to(device)
        labels = None if labels is None else labels.to(device)
        x = run_solver(self.call, self.scheduler, noise, self.num_steps, labels)
        return self.teacher.decode(self.contrast * x + self.brightness)


def tell(scheduler: Any, timesteps: Sequence[float], told: Sequence[float]) -> Any:
    """Gives UniPC of diffusers, for betas, timesteps, and others that the network is told; returns it.

    That a network in a short chain is told another time than that of its input is of arXiv 2305.15583; both are tuned
    in arXiv 2405.15506. Timesteps descend, from N - 1 to 0, and may have fractions.
    """
    return use_grid(scheduler, told, sigma_at(scheduler.alphas_cumprod, torch.tensor(timesteps)))


def sigma_at(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """sigma / alpha at timesteps with fractions, of which the logarithm is linear between two timesteps."""
    log = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2
    low = timesteps.floor().long().clamp(0, len(log) - 2)
    return torch.lerp(log[low], log[low + 1], timesteps - low).exp()
