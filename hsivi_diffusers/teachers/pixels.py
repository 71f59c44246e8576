"""Teachers on pixels: a `UNet2DModel` with or without class labels; its students are `HSIVIPipeline`s."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel

from ..modeling_hsivi import HSIVINoiseScale
from ..pipeline_hsivi import HSIVIPipeline
from ..scheduling_hsivi import HSIVIScheduler
from .configs import Configs
from .guidance import Guided
from .levels import clock_of
from .solvers import make_scheduler, run_solver
from .teacher import PipelineTeacher


class Pixels(PipelineTeacher):
    """A teacher of `UNet2DModel`. If a run guides, its last class label is "no class"."""

    pipelines = ()  # any that has nothing but a UNet2DModel and a scheduler
    network_class = UNet2DModel

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, schedule: HSIVIScheduler) -> Pixels:
        return cls._make(pipeline.unet, schedule)

    @classmethod
    def of_configs(cls, configs: Configs, schedule: HSIVIScheduler) -> Pixels:
        return cls._make(UNet2DModel.from_config(dict(configs.network)), schedule)

    @classmethod
    def _make(cls, unet: UNet2DModel, schedule: HSIVIScheduler) -> Pixels:
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return cls(unet, schedule, (unet.config.in_channels, height, width), unet.config.num_class_embeds or 0)

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        kind, classes = config.get("class_embed_type"), config.get("num_class_embeds")
        if kind is not None and (kind == "identity" or not classes):
            raise ValueError(
                f"teacher {name}: class_embed_type={kind!r} and num_class_embeds={classes} of the unet, which are no "
                "class labels: give a teacher of class labels, or of none"
            )
        if config["sample_size"] is None:
            raise ValueError(f"teacher {name}: sample_size=None of the unet: it must be a number")

    def check_students(self, config: Any) -> None:
        self.check_rank(config.lora_rank)
        several = {"num_inference_steps": config.depths, "guidance_scale": config.scales}
        for option, values in several.items():
            if len(values) > 1:
                self.check_labels(f"{option}={values}")

    def check_labels(self, asked: str = "several layers") -> None:
        if (kind := self.network.config.class_embed_type) is not None:
            raise ValueError(
                f"{asked}: the unet has class_embed_type={kind!r}, so it has no free class embedding for the layer or "
                "guidance scale: train one step count and one scale"
            )

    def label(self, network: Any, number: int) -> UNet2DModel:
        classes = network.config.num_class_embeds
        labelled: UNet2DModel = UNet2DModel.from_config(network.config, num_class_embeds=number * (classes or 1))
        state, name = dict(network.state_dict()), "class_embedding.weight"
        old = state[name] if classes else torch.zeros_like(labelled.class_embedding.weight[:1])
        labelled.load_state_dict({**state, name: old.detach().repeat_interleave(number, 0)})
        if (network.device, network.dtype) != (labelled.device, labelled.dtype):  # fake tensors cannot be moved
            labelled = labelled.to(network.device, network.dtype)
        return labelled.train(network.training)

    def student_pipeline(
        self, network: Any, scheduler: HSIVIScheduler, noise_scale: HSIVINoiseScale | None = None
    ) -> HSIVIPipeline:
        return HSIVIPipeline(unet=network, scheduler=scheduler, unet_noise_scale=noise_scale)

    def load_student(self, folder: Path) -> HSIVIPipeline:
        return HSIVIPipeline.from_pretrained(folder)

    @classmethod
    def count_classes(cls, pipeline: DiffusionPipeline) -> int:
        return pipeline.num_classes or 0

    @classmethod
    def draw(
        cls,
        pipeline: DiffusionPipeline,
        conditions: Any,
        generators: list[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Any]:
        given: dict[str, Any] = {"class_labels": conditions, "guidance_scale": guidance_scale}
        return list(pipeline(len(generators), generators, num_inference_steps, **given).images)

    def draw_teacher(
        self,
        conditions: Any,
        generators: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        solver: str | None = None,
    ) -> tuple[list[Any], int, str]:
        """Draws by the solver of the teacher's reference images, or by another."""
        guided, clock = Guided(self, [guidance_scale]), clock_of(self.schedule)
        levels = clock.pair_levels(num_inference_steps) if solver is None else None
        scheduler, given = make_scheduler(solver or clock.reference, self.schedule, levels)
        if "generator" in signature(scheduler.step).parameters:
            given["generator"] = generators
        noise = [torch.randn(1, *self.shape, generator=each, device=self.device) for each in generators]
        labels = None if conditions is None else torch.tensor(conditions, device=self.device)
        x = run_solver(guided, scheduler, torch.cat(noise), num_inference_steps, labels, **given)
        images = DiffusionPipeline.numpy_to_pil(self.decode(x).permute(0, 2, 3, 1).cpu().numpy())
        return images, num_inference_steps * guided.calls, solver or clock.reference
