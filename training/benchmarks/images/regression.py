"""Regression on pairs alone, knowledge distillation (Luhman and Luhman 2021, arXiv 2101.02388), in one call.

loss    = 1/2 E |x0(x_T) - x_aim|^2,      x_aim: where a solver of the teacher's ODE leads the noise x_T
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hsivi_diffusers import HSIVIPipeline
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.game import StudentLayers
from hsivi_diffusers.distillation.networks import make_scheduler
from hsivi_diffusers.distillation.pairs import TeacherPairs, follow_ode, image_loss
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.teacher import Teacher
from hsivi_diffusers.vi import step_generator

from .baseline import Baseline


class PairRegression(Baseline):
    """Teacher and student; the pairs, which are made when they are first asked for, with the clock running.

    Args:
        teacher: Its network is frozen; the student starts as its copy.
        num_pairs: To draw from, with replacement.
        start: Timestep that the noise is taken for; by default that of our students of one call.
        seed: Of the pairs, so that a resumed run has the same; evaluations start from other noise.
    """

    calls_per_image = 1

    def __init__(self, teacher: Teacher, num_pairs: int, start: int | None = None, seed: int = 0) -> None:
        super().__init__(teacher)
        self.num_pairs, self.seed = num_pairs, seed
        config = HSIVIConfig(num_inference_steps=1, start_timestep=start, noise_eta=0.0)
        self.layers = StudentLayers(self.student, teacher, make_scheduler(self.schedule, config, teacher.shape))
        self.image_loss = image_loss(self.layers.scheduler)
        self.parts = {"student": self.student}

    @cached_property
    def pairs(self) -> TeacherPairs:
        """Pairs of the seed, with the classes in turn."""
        noise = torch.randn(self.num_pairs, *self.teacher.shape, generator=step_generator(self.seed, 0, -1))
        classes = self.teacher.num_conditions()
        condition = torch.arange(self.num_pairs) % classes if classes else None
        images = follow_ode(Guided(self.teacher), noise, condition, show=True)
        given = condition, self.teacher.clips, self.teacher.device
        return TeacherPairs(self.layers.scheduler, noise, images, *given)

    def loss(self, clean: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the loss of as many pairs as there are real images, which it does not look at."""
        t = torch.zeros(len(clean), dtype=torch.long)
        x_next, end, classes = self.pairs.sample(t)
        t = t.to(x_next.device)
        loss: Tensor = self.image_loss(self.layers(x_next, t, classes).mean - end, t)
        return loss.mean()

    def restore(self) -> None:
        """Makes the pairs again: no checkpoint keeps them, and their time was counted."""
        self.pairs  # noqa: B018

    def pipeline(self) -> HSIVIPipeline:
        """The student, in one step."""
        return HSIVIPipeline(unet=self.student.eval(), scheduler=self.layers.scheduler)
