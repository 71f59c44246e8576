"""Rectified-flow transformers whose tokens are fields of 2 x 2 latents: FLUX.1-dev."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler
from .flow_transformers import FlowTransformer


class Packed(FlowTransformer):
    """Transformers whose tokens are fields of 2 x 2 latents: shape (B, H W / 4, 4 C); their time is sigma."""

    patch = 2

    @staticmethod
    def channels(config: Mapping[str, Any]) -> int:
        return int(config["in_channels"]) // 4

    def pack(self, x: Tensor) -> Tensor:
        size, (channels, height, width) = len(x), self.shape
        fields = x.reshape(size, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return fields.reshape(size, height * width // 4, 4 * channels)

    def unpack(self, x: Tensor) -> Tensor:
        size, (channels, height, width) = len(x), self.shape
        fields = x.reshape(size, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return fields.reshape(size, channels, height, width)

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return super().forward(network, x, time / len(self.schedule), **arguments)


class Flux(Packed):
    """FLUX.1-dev: its networks take the guidance scale as an input, so a guided call of the teacher is one call."""

    pipelines = ("FluxPipeline",)
    network_class = FluxTransformer2DModel
    encoded: Sequence[tuple[str, int, int]] = (("encoder_hidden_states", 0, 0), ("pooled_projections", 1, 1))
    guidance = 1.0

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        if not config["guidance_embeds"]:
            raise ValueError(
                f"teacher {name}: guidance_embeds=False of the {part}, as in FLUX.1-schnell, which is distilled "
                "already: give FLUX.1-dev, or a fine-tune of it"
            )

    def embed_guidance(self, scales: Sequence[float]) -> bool:
        (self.guidance,) = scales
        return True

    def check_students(self, config: Any) -> None:
        super().check_students(config)
        if config.negative_prompt:
            raise ValueError(
                f"negative_prompt={config.negative_prompt!r}: a {self.name} takes the guidance scale as an input and "
                "no negative prompt: leave it out"
            )

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given = super().arguments(condition, like)
        given |= self.ids(given["encoder_hidden_states"].shape[1], like.device)
        return {**given, "guidance": torch.full([len(condition)], self.guidance, device=like.device)}

    def ids(self, tokens: int, device: torch.device) -> dict[str, Tensor]:
        """Returns the positions (0, row, column) of image tokens, and those of text tokens, which are 0."""
        rows, columns = (torch.arange(side // 2, device=device, dtype=torch.float32) for side in self.shape[1:])
        grid = torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
        return {"img_ids": grid, "txt_ids": torch.zeros(tokens, 3, device=device)}

    @classmethod
    def unguided(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        """The scale of the training, which the student takes as its teacher does."""
        return {"guidance_scale": (scheduler.guidance_scales or [1.0])[0]}

    @classmethod
    def prompt_shapes(cls, network: Any) -> dict[str, tuple[int, ...]]:
        config = network.config
        shapes = {"encoder_hidden_states": (512, config.joint_attention_dim)}
        return {**shapes, "pooled_projections": (config.pooled_projection_dim,)}
