"""DiT (Peebles and Xie 2022, arXiv 2212.09748): a class-conditional transformer on latents."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from ..modeling_hsivi import HSIVINoiseScale
from ..scheduling_hsivi import HSIVIScheduler
from ..share.push import class_names
from .latents import Latents
from .teacher import Conditions


class DiT(Latents):
    """Its last label, one more than its classes, is "no class"."""

    pipelines = ("DiTPipeline",)
    network_class = DiTTransformer2DModel

    def __init__(self, pipeline: Any, network: Any, schedule: HSIVIScheduler) -> None:
        super().__init__(pipeline, network, schedule)
        self.conditions = Conditions(network.config.num_embeds_ada_norm + 1, has_null=True)

    def prepare(self, network: Any) -> None:
        """Turns off that it replaces a tenth of the labels by "no class" in training mode."""
        for part in network.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0

    def student_pipeline(
        self, network: Any, scheduler: HSIVIScheduler, noise_scale: HSIVINoiseScale | None = None
    ) -> DiffusionPipeline:
        network.register_to_config(out_channels=network.out_channels)  # which the pipeline needs, and may be None
        return super().student_pipeline(network, scheduler, noise_scale)

    def like(self, **parts: Any) -> DiffusionPipeline:
        pipeline = super().like(**parts)
        pipeline.labels = self.pipeline.labels
        pipeline.register_to_config(**class_names(self.pipeline))
        return pipeline

    @classmethod
    def count_classes(cls, pipeline: DiffusionPipeline) -> int:
        return int(pipeline.transformer.config.num_embeds_ada_norm)
