"""LCM-LoRA (Luo et al. 2023, arXiv 2311.05556): an adapter of a guided text-to-image teacher, from captioned images.

The loss is that of `consistency` on latents, as in the example of diffusers: the teacher's step is DDIM's, under
classifier-free guidance, on a grid of 50 timesteps, and the target is the student itself, without a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.state_dicts import TrainedWeights
from hsivi_diffusers.teachers.adapters import add_adapter
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.stable_diffusion import StableDiffusion

from .captions import encode, load_captioned, pair
from .consistency import ConsistencyDistillation

NUM_TIMESTEPS = 50


class LatentConsistency(ConsistencyDistillation):
    """Teacher, and student as an adapter on its weights.

    Args:
        teacher: Its network is frozen; it knows its prompts.
        guidance_scale: w of the teacher's guidance.
        rank: Of the adapter.
        start: See `ConsistencyDistillation`.
    """

    def __init__(self, teacher: StableDiffusion, guidance_scale: float, rank: int, start: int | None = None) -> None:
        self.teacher: StableDiffusion = teacher
        self.schedule = self.unclipped = teacher.schedule
        self.student: Any = add_adapter(teacher.network.eval(), teacher.adapter, rank).train()
        self.target, self.guided = self.student, Guided(teacher, [guidance_scale])
        self.calls_per_image = 2 + self.guided.calls  # of student and target, and of the teacher
        self._make_grid(NUM_TIMESTEPS, start)
        self.sampler.register_to_config(steps_offset=1)  # has no effect but on a warning of diffusers
        self.parts = {"student": TrainedWeights(self.student)}

    @torch.no_grad()
    def aim(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns f of the student one step of the teacher further down."""
        below = (timestep - self.stride).clamp_min(0)
        clean, noise = self.schedule.predict(self.guided(x, timestep, condition), timestep, x)
        down = self.schedule.diffuse(clean, noise, below)
        return self.consistency(self.target, self.schedule, down, below, condition)

    def loss(self, clean: Tensor, condition: Tensor | None = None) -> Tensor:
        """Of means and stds of latents, one after the other, shape (B, 2 C, H, W)."""
        mean, std = clean.chunk(2, dim=1)
        return super().loss(mean + std * torch.randn_like(mean), condition)

    def begin_update(self, share: float) -> None:
        """Does nothing: no weights are averaged."""

    def pipeline(self) -> DiffusionPipeline:
        """The student in a pipeline like the teacher's, its adapter added to the weights."""
        self.student.eval().fuse_lora()
        self.student.unload_lora()
        parts = {"unet": self.student, "scheduler": self.sampler, **self.teacher.load_encoders()}
        return self.teacher.like(**parts)


def load_latents(teacher: StableDiffusion, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents of the captioned emoji that are not held out, as `loss` takes them, and the numbers of their prompts.

    The teacher encodes the prompts, see `captions.pair`.
    """
    images, captions = load_captioned(teacher.image_shape[1])
    texts, rows, numbers = pair(captions)
    teacher.encode_prompts(texts, "", device)
    mean, std = encode(teacher.vae.to(device), to_model_range(images).to(device))
    return torch.cat([mean, std], dim=1)[rows.to(device)], numbers.to(device)
