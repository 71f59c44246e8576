"""Rectified-flow transformers whose time is 1 - sigma and whose output is -v: Lumina Image 2.0 and Z-Image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler
from .adapters import Adapter
from .comfyui import Files
from .configs import Configs
from .flow_transformers import ATTENTION, FlowTransformer
from .latents import Latents


class Lumina2(FlowTransformer):
    """Lumina Image 2.0: text with a mask, and guidance that keeps the norm of each row of the output."""

    pipelines = ("Lumina2Pipeline",)
    network_class = Lumina2Transformer2DModel
    encoded = (("encoder_hidden_states", 0, 2), ("encoder_attention_mask", 1, 3))
    sends_sigmas = True
    adapter = Adapter([*ATTENTION, *(f"feed_forward.linear_{i}" for i in (1, 2, 3))], "transformer")

    @property
    def positions(self) -> int:
        return _positions(self.network)

    @property
    def tokens(self) -> float:
        """The channels, which its pipeline takes for the tokens."""
        return self.shape[0]

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given, mask = super().arguments(condition, like), "encoder_attention_mask"
        lengths = torch.tensor(self.conditions.lengths(mask, condition), device=like.device)
        return {**given, mask: torch.arange(given[mask].shape[1], device=like.device) < lengths[:, None]}

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return -super().forward(network, x, 1 - time / len(self.schedule), **arguments)

    def guide(self, of_condition: Tensor, of_none: Tensor, w: Tensor) -> Tensor:
        guided = super().guide(of_condition, of_none, w)
        return guided * (of_condition.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @classmethod
    def of_configs(cls, configs: Configs, schedule: HSIVIScheduler) -> Latents:
        teacher = super().of_configs(configs, schedule)
        positions = teacher.network.rope_embedder
        with torch.device("cpu"):  # they are no weights, and need their numbers
            axes = positions.axes_dim, positions.axes_lens, positions.theta
            positions.freqs_cis = positions._precompute_freqs_cis(*axes)
        return teacher

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.longest
        return {
            "encoder_hidden_states": (length, self.network.config.cap_feat_dim),
            "encoder_attention_mask": (length,),
        }


class ZImage(FlowTransformer):
    """Z-Image: lists of latents (C, 1, H, W), and of prompts of their own lengths."""

    pipelines = ("ZImagePipeline",)
    network_class = ZImageTransformer2DModel
    adapter = Adapter([*ATTENTION, *(f"feed_forward.w{i}" for i in (1, 2, 3))], "transformer")
    comfyui = Files(
        encoders=("qwen_3_4b.safetensors",),
        decoder="ae.safetensors",
        type="lumina2",
        latent="EmptySD3LatentImage",
    )
    patch = 2

    @property
    def positions(self) -> int:
        return _positions(self.network)

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        """Refuses Z-Image-Turbo by its name: its configs are those of Z-Image."""
        if "z-image-turbo" in f"{name} {config.get('_name_or_path')}".lower().replace("_", "-"):
            raise ValueError(f"teacher {name}: Z-Image-Turbo is distilled already: give Z-Image, or a fine-tune of it")

    def prompt_tensors(self, encoded: Sequence[Any], are_negative: bool) -> Mapping[str, Iterable[Tensor]]:
        rows = encoded[are_negative]
        return {"cap_feats": rows, "mask": [torch.ones(len(row)) for row in rows]}

    def negative(self, texts: list[str]) -> list[str]:
        """A copy, because the pipeline writes its template into the list of prompts."""
        return [*texts]

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        rows, lengths = super().arguments(condition, like)["cap_feats"], self.conditions.lengths("mask", condition)
        return {"cap_feats": [row[:length] for row, length in zip(rows, lengths, strict=True)]}

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        size = len(self.schedule)
        if not torch.is_grad_enabled():
            x = x.detach()  # else its rows would say that they require a gradient
        return -torch.stack(network([*x.unsqueeze(2)], (size - time) / size, **arguments).sample).squeeze(2)

    @classmethod
    def unguided(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        return {"guidance_scale": 0.0}

    def guided(self, w: float) -> dict[str, Any]:
        """Its guided velocity is c + scale (c - u)."""
        return {"guidance_scale": w - 1}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"cap_feats": (self.longest, self.network.config.cap_feat_dim), "mask": (self.longest,)}


def _positions(network: Any) -> int:
    """Of rows and columns; the first axis is that of the text."""
    return int(min(network.config.axes_lens[1:]))
