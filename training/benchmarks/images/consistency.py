"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, alg. 2; Luo et al. 2023, arXiv 2310.04378, alg. 1).

On a grid of timesteps,

    f(x, t) = c_skip(t) x + c_out(t) x0(x, t),      x0: the clean image that the network predicts
    loss    = E mean [sqrt((f(x_t, t) - f_target(x_s, s))^2 + c^2) - c],      c = 0.001

where x_t is a noised real image, x_s the teacher's step from it to the timestep s below t, and f_target has averaged
weights. c_skip and c_out are those of LCMScheduler, which makes f(x, 0) = x. The step is Heun's: DDIM with the mean of
the clean images at both ends, of second order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDPMPipeline, LCMScheduler
from torch import Tensor

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.teachers.teacher import Teacher

from .baseline import Baseline, default_start

HUBER_C, TARGET_DECAY, NUM_TIMESTEPS = 0.001, 0.95, 40


class ConsistencyDistillation(Baseline):
    """Teacher, student and averaged student; the teacher's schedule; the student's sampler, with grid and scalings.

    Args:
        teacher: Its network is frozen; student and target start as its copies.
        num_timesteps: Of the grid.
        start: Where it starts; by default `default_start`.
    """

    calls_per_image = 4  # of teacher, at both ends of its step, student and target

    def __init__(self, teacher: Teacher, num_timesteps: int = NUM_TIMESTEPS, start: int | None = None) -> None:
        super().__init__(teacher)
        self.target: Any = copy.deepcopy(teacher.network)
        self.unclipped = HSIVIScheduler.from_config(self.schedule.config, clip_sample=False, thresholding=False)
        self.parts = {"student": self.student, "target": self.target}
        self.sampler = make_sampler(self.schedule, num_timesteps, start)
        self.sampler.set_timesteps(num_timesteps)
        self.grid = self.sampler.timesteps.to(self.teacher.device)
        self.stride = len(self.sampler.betas) // num_timesteps

    def consistency(
        self,
        network: Any,
        schedule: HSIVIScheduler,
        x: Tensor,
        timestep: Tensor,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Returns f(x, t) = c_skip(t) x + c_out(t) x0(x, t), shape (B, C, H, W), for timesteps (B,)."""
        x0, _ = self.denoise(network, schedule, x, timestep, condition)
        c_skip, c_out = self.sampler.get_scalings_for_boundary_condition_discrete(timestep[:, None, None, None])
        f: Tensor = c_skip * x + c_out * x0
        return f

    def predict(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns f of the student, shape (B, C, H, W). No clipping, which would stop the gradient."""
        return self.consistency(self.student, self.unclipped, x, timestep, condition)

    @torch.no_grad()
    def aim(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns f of the target one step of the teacher further down, as it would be sampled."""
        below = (timestep - self.stride).clamp_min(0)
        x0, noise = self.denoise(self.teacher.network, self.schedule, x, timestep, condition)
        down = self.schedule.diffuse(x0, noise, below)
        x0_below, _ = self.denoise(self.teacher.network, self.schedule, down, below, condition)
        x0 = (x0 + x0_below) / 2
        alpha, sigma = self.schedule.alpha_sigma(timestep, x)
        down = self.schedule.diffuse(x0, (x - alpha * x0) / sigma, below)
        return self.consistency(self.target, self.schedule, down, below, condition)

    def loss(self, clean: Tensor, condition: Tensor | None = None) -> Tensor:
        timestep = self.grid[torch.randint(len(self.grid), (len(clean),), device=clean.device)]
        x = self.schedule.diffuse(clean, torch.randn_like(clean), timestep)
        return distance(self.predict(x, timestep, condition), self.aim(x, timestep, condition))

    @torch.no_grad()
    def begin_update(self, share: float) -> None:
        """Moves the target's weights towards the student's, whatever share of the run is done."""
        for average, current in zip(self.target.parameters(), self.student.parameters(), strict=True):
            average.lerp_(current, 1 - TARGET_DECAY)

    def pipeline(self) -> DDPMPipeline:
        """The student, to be sampled in a few steps by num_inference_steps."""
        return DDPMPipeline(unet=self.student.eval(), scheduler=self.sampler)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the pseudo-Huber distance, averaged over rows and pixels."""
    return (((prediction - target).square() + HUBER_C**2).sqrt() - HUBER_C).mean()


def make_sampler(
    schedule: HSIVIScheduler, num_timesteps: int = NUM_TIMESTEPS, start: int | None = None
) -> LCMScheduler:
    """The student's scheduler: the teacher's noise levels up to `start`, see `default_start`, and its clipping."""
    start = default_start(schedule) if start is None else start
    names = ["prediction_type", "clip_sample", "clip_sample_range", "sample_max_value"]
    names += ["thresholding", "dynamic_thresholding_ratio"]
    return LCMScheduler(
        num_train_timesteps=start + 1,
        trained_betas=schedule.betas[: start + 1].tolist(),
        original_inference_steps=num_timesteps,
        timestep_scaling=10.0,
        **{name: schedule.config[name] for name in names},
    )
