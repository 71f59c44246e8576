"""LCM-LoRA (Luo et al. 2023, arXiv 2311.05556): an adapter of a guided text-to-image teacher, from captioned images.

The loss is that of `consistency` on latents, as in the example of diffusers: the teacher's step is DDIM's, under
classifier-free guidance, on a grid of 50 timesteps, and the target is the student itself, without a gradient.

Of a rectified flow with the velocity v, x = (1 - s) x0 + s noise, the step is Euler's, down to the image, and

    f(x, s) = x - s v(x, s)

which is x at s = 0 without c_skip and c_out.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler
from torch import Tensor

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.state_dicts import TrainedWeights
from hsivi_diffusers.teachers.adapters import add_adapter
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import use_grid

from .captions import CAPTIONS, encode, load_captioned, pair
from .consistency import ConsistencyDistillation
from .scene_set import LONGEST
from .scenes import SCENES, make_scenes
from .scenes import encode as encode_scenes

NUM_TIMESTEPS, NUM_SCENES = 50, 8192


class LatentConsistency(ConsistencyDistillation):
    """Teacher, and student as an adapter on its weights.

    Args:
        teacher: Its network is frozen; it takes text, has an adapter, and knows its prompts.
        guidance_scale: w of the teacher's guidance.
        rank: Of the adapter.
        start: See `ConsistencyDistillation`.
    """

    lowest = 0  # level that the last step of the teacher ends at

    def __init__(self, teacher: Any, guidance_scale: float, rank: int, start: int | None = None) -> None:
        self.teacher: Any = teacher
        self.schedule = self.unclipped = teacher.schedule
        self.student: Any = add_adapter(teacher.network.eval(), teacher.adapter, rank).train()
        self.target, self.guided = self.student, Guided(teacher, [guidance_scale])
        self.calls_per_image = 2 + self.guided.calls  # of student and target, and of the teacher
        self._make_grid(NUM_TIMESTEPS, start)
        self.parts = {"student": TrainedWeights(self.student)}

    def _make_grid(self, num_timesteps: int, start: int | None = None) -> None:
        super()._make_grid(num_timesteps, start)
        self.sampler.register_to_config(steps_offset=1)  # has no effect but on a warning of diffusers

    @torch.no_grad()
    def aim(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns f of the student one step of the teacher further down."""
        below = (timestep - self.stride).clamp_min(self.lowest)
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


class FlowConsistency(LatentConsistency):
    """Of a rectified flow."""

    lowest = -1

    def _make_grid(self, num_timesteps: int, start: int | None = None) -> None:
        clock_of(self.schedule).start(start, None, self.teacher.shape)  # refuses any but pure noise
        size = len(self.schedule)
        self.sampler: Any = FlowMatchLCMScheduler(num_train_timesteps=size, shift=self.schedule.config.shift)
        self.grid, self.stride = flow_grid(self.schedule, num_timesteps).to(self.teacher.device), size // num_timesteps

    def consistency(
        self, network: Any, schedule: HSIVIScheduler, x: Tensor, timestep: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Returns f(x, s), shape (B, C, H, W), for levels (B,), of which -1 is s = 0."""
        _, sigma = schedule.alpha_sigma(timestep, x)
        return x - sigma * self.teacher.call(network, x, schedule.levels.time(timestep), condition)


def flow_grid(schedule: HSIVIScheduler, num_steps: int) -> Tensor:
    """Returns levels of a flow, from pure noise down: of the 50 that are trained those that LCMScheduler takes."""
    places = torch.arange(num_steps) * NUM_TIMESTEPS // num_steps
    return len(schedule) - 1 - len(schedule) // NUM_TIMESTEPS * places


def set_grid(sampler: Any, schedule: HSIVIScheduler, num_steps: int) -> Any:
    """Returns the scheduler of a student, which will take so many steps between levels that are trained.

    FlowMatchLCMScheduler by itself takes the last of few steps where there is next to no noise.
    """
    if not schedule.is_flow:  # LCMScheduler knows them
        return sampler
    return use_grid(sampler, schedule.levels.time(flow_grid(schedule, num_steps)).tolist())


def load_latents(teacher: Any, train_data: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents of images, as `loss` takes them, and the numbers of their prompts, which the teacher encodes.

    `captions` are the captioned emoji that are not held out, see `captions.pair`; `scenes` are NUM_SCENES scenes.

    Raises:
        ValueError: There are no captions of these images.
    """
    if train_data == SCENES:
        drawn, scenes = make_scenes(NUM_SCENES, seed=0)
        if (size := (*drawn.shape[1:],)) != teacher.image_shape:
            raise ValueError(
                f"scenes are images of {size}, and the teacher's of {teacher.image_shape}: give one of scenes"
            )
        teacher.set_length(LONGEST)
        teacher.encode_prompts([scene.caption for scene in scenes], "", device)
        mean, std = encode_scenes(teacher.vae.to(device), drawn)
        return torch.cat([mean, std], dim=1).float(), torch.arange(NUM_SCENES, device=device)
    if train_data != CAPTIONS:
        raise ValueError(f"--train_data {train_data}: --method lcm_lora takes captioned images, {CAPTIONS} or {SCENES}")
    images, captions = load_captioned(teacher.image_shape[1])
    texts, rows, numbers = pair(captions)
    teacher.encode_prompts(texts, "", device)
    mean, std = encode(teacher.vae.to(device), to_model_range(images).to(device))
    return torch.cat([mean, std], dim=1)[rows.to(device)], numbers.to(device)
