"""Stable Diffusion 1 and 2, and SDXL: text-to-image U-Nets on latents; their students are LoRA adapters by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from .adapters import Adapter
from .comfyui import Files
from .latents import CLIP_TOKENS, TextLatents

# Attention, feed-forward and convolutions: those of diffusers' LCM-LoRA example.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
TARGETS += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
# Options of the network that say what else it takes beside text, and what of it is supported.
SUPPORTED = {
    "addition_embed_type": (None, "text_time"),  # SDXL's
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
}


class StableDiffusion(TextLatents):
    """Stable Diffusion 1 and 2."""

    pipelines = ("StableDiffusionPipeline",)
    network_class = UNet2DConditionModel
    part = "unet"
    adapter = Adapter(TARGETS, "unet")
    comfyui = Files()
    scales_input = True
    encoded: Sequence[tuple[str, int, int]] = (("encoder_hidden_states", 0, 1),)

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        super().check(name, part, config)
        for option, accepted in SUPPORTED.items():
            if (given := config.get(option)) not in accepted:
                raise ValueError(
                    f"teacher {name}: {option}={given!r} of the unet, and only {' or '.join(map(repr, accepted))} is "
                    "supported: give a text-to-image model that takes text alone"
                )

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.network.config.cross_attention_dim  # of all blocks, or of each
        return {"encoder_hidden_states": (CLIP_TOKENS, width if isinstance(width, int) else width[0])}


class StableDiffusionXL(StableDiffusion):
    """SDXL: two encoders, and a network that takes the pooled text and the size of the image too."""

    pipelines = ("StableDiffusionXLPipeline",)
    comfyui = Files(knows_edm=True)
    encoded = (("encoder_hidden_states", 0, 1), ("text_embeds", 2, 3))

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given = super().arguments(condition, like)
        return {"encoder_hidden_states": given.pop("encoder_hidden_states"), "added_cond_kwargs": given}

    def sizes(self) -> dict[str, Tensor]:
        """An original of that size, without a crop."""
        _, height, width = self.image_shape
        return {"time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]])}

    def negative(self, texts: list[str]) -> list[str] | None:
        """Without a negative prompt SDXL takes zeros."""
        return texts if any(texts) else None

    def unscale(self, x: Tensor) -> Tensor:
        latents, config = super().unscale(x), self.vae.config
        given = config.get("latents_mean"), config.get("latents_std")
        return latents if None in given else self.unscale_channels(latents)

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().prompt_shapes(), "text_embeds": (pooled,), "time_ids": (6,)}
