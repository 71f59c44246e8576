"""Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512, alg. 2), to a number of DDIM steps.

In each stage a student learns to do in one DDIM step what its teacher does in two, and becomes the next teacher:

    z_s     = DDIM of the teacher from t to u to s,       z_t a noised real image, t > u > s
    x_aim   : the clean image with which one DDIM step from z_t ends in z_s
    loss    = E max(1, alpha_t^2 / sigma_t^2) |x0(z_t) - x_aim|^2
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from hsivi_diffusers.teachers.teacher import Teacher

from .baseline import Baseline, default_start


class ProgressiveDistillation(Baseline):
    """Student, and the network that it learns from in its stage; the schedule, with the finest grid.

    Args:
        teacher: Both networks start as its copies.
        num_steps: Of the student of the last stage.
        num_stages: Each halves the steps, from num_steps 2^num_stages of the first teacher; at least 1.
        start: Timestep of the first step, of all stages; by default `default_start`.
    """

    calls_per_image = 3  # of the teacher, twice, and the student

    def __init__(self, teacher: Teacher, num_steps: int, num_stages: int = 4, start: int | None = None) -> None:
        super().__init__(teacher)
        self.former: Any = copy.deepcopy(teacher.network)  # the teacher, later the student of the stage before
        self.num_stages = num_stages
        self.stage = nn.Parameter(torch.tensor(0), requires_grad=False)
        finest, start = num_steps * 2**num_stages, default_start(self.schedule) if start is None else start
        self.grid = torch.tensor(self.schedule.make_layer_timesteps(finest, "uniform", len(self.schedule), start))
        options = {"noise_eta": 0.0, "kernel": "ddim", "layer_timesteps": self.grid[:: 2**num_stages].tolist()}
        self.schedule = HSIVIScheduler.from_config(self.schedule.config, **options)
        self.unclipped = HSIVIScheduler.from_config(self.schedule.config, clip_sample=False, thresholding=False)
        self.grid = self.grid.to(teacher.device)
        self.parts = {"student": self.student, "teacher": self.former, "stage": nn.ParameterList([self.stage])}

    def loss(self, clean: Tensor, condition: Tensor | None = None) -> Tensor:
        stride = 2 ** (int(self.stage) + 1)
        place = stride * torch.randint((len(self.grid) - 1) // stride, (len(clean),), device=clean.device)
        t, u, s = (self.grid[place + part * stride // 2] for part in range(3))
        z = self.schedule.diffuse(clean, torch.randn_like(clean), t)
        aim = self.aim(z, t, u, s, condition)
        x0, _ = self.denoise(self.student, self.unclipped, z, t, condition)
        alpha, sigma = self.schedule.alpha_sigma(t, z)
        return ((alpha / sigma).square().clamp_min(1) * (x0 - aim).square()).mean()

    @torch.no_grad()
    def aim(self, z: Tensor, t: Tensor, u: Tensor, s: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the clean image with which one DDIM step from t to s ends where two of the teacher do."""
        end = self.step(self.step(z, t, u, condition), u, s, condition)
        aim: Tensor = self.schedule.layers.coefficients(t, z, s).invert(end, z)[0]
        return aim

    def step(self, z: Tensor, timestep: Tensor, below: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the teacher's DDIM step between timesteps of shape (B,)."""
        x0, _ = self.denoise(self.former, self.schedule, z, timestep, condition)
        layer = self.schedule.layers.coefficients(timestep, z, below)
        mean: Tensor = layer.mean(x0, layer.noise_in(z, x0))
        return mean

    def begin_update(self, share: float) -> None:
        """Lets the student become the teacher where a stage begins; of the run a share from 0 to 1 is done."""
        if (stage := int(share * self.num_stages)) > self.stage:
            self.stage.fill_(stage)
            self.former.load_state_dict(self.student.state_dict())

    def pipeline(self) -> HSIVIPipeline:
        """The student on its grid."""
        return HSIVIPipeline(unet=self.student.eval(), scheduler=self.schedule)
