"""PixArt-alpha and PixArt-Sigma: text-to-image transformers on latents; all weights are trained."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from .latents import TextLatents


class PixArt(TextLatents):
    """PixArt: text with a mask, and in the largest models the size of the image."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    network_class = PixArtTransformer2DModel
    encoded = (("encoder_hidden_states", 0, 2), ("encoder_attention_mask", 1, 3))

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        output: Tensor = network(x, timestep=time, **arguments).sample
        return output

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given = super().arguments(condition, like)
        added = {name: given.pop(name) for name in ("resolution", "aspect_ratio") if name in given}
        return {**given, "added_cond_kwargs": added} if added else given

    def sizes(self) -> dict[str, Tensor]:
        _, height, width = self.image_shape
        if not self.network.use_additional_conditions:
            return {}
        return {"resolution": torch.tensor([[height, width]]), "aspect_ratio": torch.tensor([[height / width]])}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (self.longest, self.network.config.caption_channels),
            "encoder_attention_mask": (self.longest,),
        }
        return shapes | ({"resolution": (2,), "aspect_ratio": (1,)} if self.network.use_additional_conditions else {})
