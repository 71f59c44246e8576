"""The teacher of a set as tuning and benchmark draw from it: guided or not, all its classes or prompts in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hsivi_diffusers import HSIVIConfig, load_teacher
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.solvers import Sampler, Solver, make_solver, sample

from .polished_solver import PolishedSolver, tell
from .scene_set import LONGEST, SceneSet
from .scenes import SCENES
from .sets import load_images


class SetTeacher:
    """A teacher, the images of its set, and what is drawn from it or from its students.

    Args:
        folder: Of its pipeline.
        real_data: Real images, see train_teacher.py; of a text-to-image teacher `scenes`.
        guidance_scale: Scale of guidance; without one a class-conditional teacher has no label for "no class".

    Attributes:
        teacher: The teacher, which knows the prompts, if it takes text.
        guided: The same with guidance.
        classes: Number of its classes or prompts, None without.
        scenes: Prompts, images and measures of a text-to-image teacher, else None.

    Raises:
        ValueError: It takes text, and the images are no scenes, or the other way round.
    """

    def __init__(self, folder: str, real_data: str, guidance_scale: float | None = None) -> None:
        self.teacher = teacher = load_teacher(folder)
        teacher.network.eval().to(memory_format=torch.channels_last)  # a fifth faster on a CPU, the same images
        self.real_data = real_data
        if teacher.takes_text != (real_data == SCENES):
            raise ValueError(f"--real_data {real_data}, and the teacher {folder}: `{SCENES}` goes with text to image")
        self.scenes = SceneSet(teacher.image_shape[1]) if teacher.takes_text else None
        if self.scenes is not None:
            teacher.set_length(LONGEST)
        teacher.encode_prompts(self.scenes and self.scenes.prompts, "", teacher.device)
        self.classes = teacher.num_conditions(guidance_scale is not None) or None
        self.guided = Guided(teacher, [1.0 if guidance_scale is None else guidance_scale])

    @cached_property
    def real(self) -> tuple[Tensor, Tensor]:
        """The real images in [0, 1], of the shape of the teacher's, (N, C, H, W), and their classes or prompts, (N,).

        Raises:
            ValueError: They have no classes, or not all of the teacher's.
        """
        channels, height, _ = self.teacher.image_shape
        labels: Tensor | None
        if self.scenes is not None:
            images = self.scenes.images
            labels = torch.arange(len(images)) % len(self.scenes.prompts)
        else:
            images, labels = load_images(self.real_data, height, channels)
        if labels is None:
            raise ValueError(f"--real_data {self.real_data} has no labels: give a set with classes")
        if lacking := {*range(self.classes or 0)} - {*labels.tolist()}:
            raise ValueError(
                f"--real_data {self.real_data} has no images of the classes {sorted(lacking)} of the teacher: if the "
                "last one is 'no class', give --guidance_scale 1"
            )
        return images.float() / 255, labels

    def solver(
        self,
        name: str,
        calls: int,
        timesteps: Sequence[Any] | None = None,
        guidance_end: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guided_steps: int = 0,
        unguided: bool = False,
        polish: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Solver:
        """A solver that makes so many network calls, see `make_solver`; if `unguided`, of the teacher without guidance.

        With `guidance_end` its guidance is weaker the more noise there is; with `guidance_interval` the `guided_steps`
        steps in it are guided, and the others take one call. See `Guided`. With `polish` it is a `PolishedSolver` that
        is `told` other timesteps.

        Raises:
            ValueError: They are not those of whole steps.
        """
        guided = Guided(self.teacher) if unguided else self.guided
        varies = (guidance_end, guidance_interval) != (None, None)
        if varies and (guided.calls == 1 or self.teacher.schedule.is_edm):  # whose solvers have other times than it
            raise ValueError("guidance_end or guidance_interval of a teacher of EDM, or without guidance: leave it out")
        steps, rest = (calls - guided_steps, 0) if guidance_interval else divmod(calls, guided.calls)
        if rest:
            raise ValueError(f"{calls} network calls: a guided step has two, give an even number")
        if varies:
            guided = Guided(self.teacher, guided.scales, guidance_end, guidance_interval)
        if polish is not None and timesteps is not None:
            solver, fields = make_solver(name, steps, guided, **settings), {**polish}
            tell(solver.scheduler, timesteps, fields.pop("told"))
            return PolishedSolver(solver.scheduler, steps, solver.teacher, solver.call, **fields)
        solver = make_solver(name, steps, guided, timesteps, **settings)
        if guidance_interval and (found := int(guided.guides(solver.times).sum())) != guided_steps:
            raise ValueError(f"guidance_interval={guidance_interval} has {found} steps: give guided_steps={found}")
        return solver

    def check_student(self, config: str, settings: HSIVIConfig) -> None:
        """Refuses, with ValueError, a student whose prompts were cut to another length than those that are drawn."""
        longest = self.teacher.schedule.config.max_sequence_length
        if settings.max_sequence_length != longest:
            raise ValueError(
                f"{config} has max_sequence_length {settings.max_sequence_length}, and the prompts of {self.real_data} "
                f"{longest}: give the same"
            )

    def draw(self, sampler: Sampler, size: int, batch_size: int, seed: int) -> Tensor:
        """Images of any sampler, shape (size, C, H, W); with classes image i is of class i mod their number."""
        return torch.cat([*sample(sampler, size, batch_size, seed, self.classes)])

    def draw_real(self, batch_size: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """A sampler of real images, of classes or prompts if it is asked for some: new scenes, or with replacement."""
        if self.scenes is not None and labels is not None:
            return self.scenes.draw(labels, generator)
        images, classes = self.real
        if labels is None:
            return images[torch.randint(len(images), (batch_size,), generator=generator)]
        weights = (labels[:, None] == classes).float()
        return images[torch.multinomial(weights, 1, generator=generator).squeeze(1)]

    def asked(self, size: int) -> Tensor | None:
        """The class or prompt number of each image that `draw` returns, shape (size,); None if the teacher has none."""
        return None if self.classes is None else torch.arange(size) % self.classes
