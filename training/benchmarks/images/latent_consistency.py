"""LCM-LoRA (Luo et al. 2023, arXiv 2311.05556) of a rectified flow: an adapter of a guided text-to-image teacher.

The loss is that of `consistency` on latents of captioned images, as in the example of diffusers. With the velocity v,
x = (1 - s) x0 + s noise,

    f(x, s) = x - s v(x, s)

which is x at s = 0 without c_skip and c_out. The teacher's step is Euler's, under classifier-free guidance, on a grid
of 50 levels, down to the image; the target is the student itself, without a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler
from torch import Tensor

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.runs.state_dicts import TrainedWeights
from hsivi_diffusers.teachers.adapters import add_adapter
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.solvers import use_grid

from .consistency import ConsistencyDistillation
from .scene_set import LONGEST
from .scenes import SCENES, encode, make_scenes

NUM_LEVELS, NUM_SCENES = 50, 8192


class LatentConsistency(ConsistencyDistillation):
    """Teacher, and student as an adapter on its weights.

    Args:
        teacher: Its network is frozen; it is a rectified flow, takes text, has an adapter, and knows its prompts.
        guidance_scale: w of the teacher's guidance.
        rank: Of the adapter.
    """

    def __init__(self, teacher: Any, guidance_scale: float, rank: int) -> None:
        self.teacher: Any = teacher
        self.schedule = self.unclipped = teacher.schedule
        self.student: Any = add_adapter(teacher.network.eval(), teacher.adapter, rank).train()
        self.target, self.guided = self.student, Guided(teacher, [guidance_scale])
        self.calls_per_image = 2 + self.guided.calls  # of student and target, and of the teacher
        size = len(self.schedule)
        self.sampler: Any = FlowMatchLCMScheduler(num_train_timesteps=size, shift=self.schedule.config.shift)
        self.grid, self.stride = few_levels(self.schedule, NUM_LEVELS).to(teacher.device), size // NUM_LEVELS
        self.parts = {"student": TrainedWeights(self.student)}

    def consistency(
        self, network: Any, schedule: HSIVIScheduler, x: Tensor, timestep: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Returns f(x, s), shape (B, C, H, W), for levels (B,), of which -1 is s = 0."""
        _, sigma = schedule.alpha_sigma(timestep, x)
        return x - sigma * self.teacher.call(network, x, schedule.levels.time(timestep), condition)

    @torch.no_grad()
    def aim(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns f of the student one step of the teacher further down."""
        below = (timestep - self.stride).clamp_min(-1)
        output = self.guided(x, self.schedule.levels.time(timestep), condition)
        clean, noise = self.schedule.predict(output, timestep, x)
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
        parts = {self.teacher.part: self.student, "scheduler": self.sampler, **self.teacher.load_encoders()}
        pipeline: DiffusionPipeline = self.teacher.like(**parts)
        return pipeline


def few_levels(schedule: HSIVIScheduler, num_steps: int) -> Tensor:
    """Returns levels of a flow, from pure noise down: of the 50 that are trained those that LCMScheduler takes."""
    places = torch.arange(num_steps) * NUM_LEVELS // num_steps
    return len(schedule) - 1 - len(schedule) // NUM_LEVELS * places


def set_grid(sampler: Any, schedule: HSIVIScheduler, num_steps: int) -> Any:
    """Returns a student's scheduler, of a flow with a grid of `num_steps` of the levels that are trained.

    FlowMatchLCMScheduler by itself takes the last of few steps where there is next to no noise.
    """
    if not schedule.is_flow:  # LCMScheduler knows them
        return sampler
    return use_grid(sampler, schedule.levels.time(few_levels(schedule, num_steps)).tolist())


def load_latents(teacher: Any, train_data: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents of NUM_SCENES scenes, as `loss` takes them, and the numbers of their captions, which the teacher encodes.

    Raises:
        ValueError: It is other data, or the teacher makes images of another shape.
    """
    if train_data != SCENES:
        raise ValueError(f"--train_data {train_data}: --method lcm_lora takes captioned images: give {SCENES}")
    images, scenes = make_scenes(NUM_SCENES, seed=0)
    if (size := (*images.shape[1:],)) != teacher.image_shape:
        raise ValueError(f"scenes are images of {size}, and the teacher's of {teacher.image_shape}: give one of scenes")
    teacher.set_length(LONGEST)
    teacher.encode_prompts([scene.caption for scene in scenes], "", device)
    mean, std = encode(teacher.vae.to(device), images)
    return torch.cat([mean, std], dim=1).float(), torch.arange(NUM_SCENES, device=device)
