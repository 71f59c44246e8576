"""The teacher of a set as tuning and benchmark draw from it: guided or not, with all its classes in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsivi_diffusers import load_teacher
from hsivi_diffusers.distillation.denoisers import num_classes
from hsivi_diffusers.distillation.guidance import calls_of_step, guided
from hsivi_diffusers.evaluation.solvers import Sampler, Solver, make_solver, sample


class SetTeacher:
    """A teacher, and what is drawn from it or from its students.

    Args:
        folder: Of its pipeline.
        guidance_scale: Scale of guidance; without one a class-conditional teacher has no label for "no class".

    Attributes:
        network: The teacher, guided.
        schedule: Its noise schedule.
        classes: Number of its classes, None without.
        step_calls: Network calls of a step.
    """

    def __init__(self, folder: str, guidance_scale: float | None = None) -> None:
        unet, self.schedule = load_teacher(folder)
        unet.eval().to(memory_format=torch.channels_last)  # a fifth faster on a CPU, the same images
        self.classes = num_classes(unet, guidance_scale is not None) or None
        self.network = guided(unet, [1.0 if guidance_scale is None else guidance_scale])
        self.step_calls = calls_of_step(self.network)

    def solver(self, name: str, calls: int, **settings: Any) -> Solver:
        """A solver that makes so many network calls, see `make_solver`.

        Raises:
            ValueError: They are not those of whole steps.
        """
        if calls % self.step_calls:
            raise ValueError(f"{calls} network calls: a guided step has two, give an even number")
        return make_solver(name, calls // self.step_calls, self.network, self.schedule.config, **settings)

    def draw(self, sampler: Sampler, size: int, batch_size: int, seed: int) -> Tensor:
        """Images of any sampler, shape (size, C, H, W); with classes image i is of class i mod their number."""
        return torch.cat([*sample(sampler, size, batch_size, seed, self.classes)])

    def asked(self, size: int) -> Tensor | None:
        """The classes of so many images of `draw`, shape (size,), None without."""
        return None if self.classes is None else torch.arange(size) % self.classes
