"""FLUX.2: dev, which takes the guidance scale as an input, and the Klein base models, which are guided by two calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from .adapters import Adapter
from .flow_transformers import TARGETS
from .packed_flows import Flux, Packed

FEED_FORWARD = [f"{stream}.linear_{end}" for stream in ("ff", "ff_context") for end in ("in", "out")]
# By number: `attn.to_out` alone would be that of double blocks too, which is a list. FLUX.2-dev has 48.
SINGLE = ["to_qkv_mlp_proj", *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(48))]
STEPS = 50  # of the pipelines by default


class Flux2Base(Packed):
    """What the models of FLUX.2 have in common; all prompts have 512 tokens, of which none is masked."""

    network_class = Flux2Transformer2DModel
    adapter = Adapter([*(target for target in TARGETS if "ff" not in target), *FEED_FORWARD, *SINGLE], "transformer")
    encoded: Sequence[tuple[str, int, int]] = (("encoder_hidden_states", 0, 0),)

    def mu(self, config: Mapping[str, Any]) -> float:
        """Returns the pipeline's fit to tokens and steps, at its default number of steps; beyond 4300 it has no steps.

        It is linear in the number of steps through the lines of 10 and 200 steps.
        """
        tokens = self.shape[1] * self.shape[2] / self.patch**2
        many = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333
        return few + (many - few) * (STEPS - 10) / (200 - 10)

    def ids(self, tokens: int, device: torch.device) -> dict[str, Tensor]:
        """Returns the positions (0, row, column, 0) of image tokens, and (0, 0, 0, place) of text tokens."""
        rows, columns, places = (
            torch.arange(count, device=device, dtype=torch.float32)
            for count in (self.shape[1] // 2, self.shape[2] // 2, tokens)
        )
        none = torch.zeros(1, device=device)
        image = torch.cartesian_prod(none, rows, columns, none)
        return {"img_ids": image, "txt_ids": torch.cartesian_prod(none, none, none, places)}

    def unscale(self, x: Tensor) -> Tensor:
        """The VAE has mean and variance of each channel of a field of 2 x 2."""
        norm = self.vae.bn
        mean, scale = norm.running_mean, (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return self.unpack(self.pack(x) * scale.to(x) + mean.to(x))

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.longest, self.network.config.joint_attention_dim)}


class Flux2(Flux2Base, Flux):
    """FLUX.2-dev: its networks take the guidance scale as an input."""

    pipelines = ("Flux2Pipeline",)
    undistilled = "FLUX.2-dev"
    comfyui = None


class Flux2Klein(Flux2Base):
    """The base models of FLUX.2 Klein, guided by two calls, of which one has the empty prompt."""

    pipelines = ("Flux2KleinPipeline",)
    takes_negative = False

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given = super().arguments(condition, like)
        return {**given, **self.ids(given["encoder_hidden_states"].shape[1], like.device)}
