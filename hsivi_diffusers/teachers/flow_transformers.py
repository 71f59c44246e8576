"""Rectified-flow transformers on latents: v = noise - clean latents; their students are LoRA adapters by default.

Here are Stable Diffusion 3 and 3.5, AuraFlow and Sana.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from diffusers import AuraFlowTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler
from .adapters import Adapter
from .comfyui import Files
from .latents import CLIP_TOKENS, TextLatents

# Attention and feed-forward of image and text.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT_ATTENTION = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TARGETS = [*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


class FlowTransformer(TextLatents):
    """What rectified-flow transformers have in common; it serves those that take latents and the time N sigma as is.

    Where the shift of the noise levels depends on the size of the images (use_dynamic_shifting), that of the size of
    this run is set, as the pipeline computes it.
    """

    adapter = Adapter(TARGETS, "transformer")
    is_flow = True
    sends_sigmas: ClassVar[bool] = False  # its pipeline sends 1, ..., 1/T, before the shift
    prompt_dtype = torch.bfloat16  # of the encoders of the published ones; a prompt of FLUX.1 takes 4 MB
    prompts_of_file = 64  # of FLUX.2 1 GB
    knows_size = True

    def __init__(self, pipeline: Any, network: Any, schedule: HSIVIScheduler, rows: int = 0) -> None:
        super().__init__(pipeline, network, schedule, rows)
        self._dynamic = schedule.config if schedule.config.use_dynamic_shifting else None
        self.set_shift()

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        """Any size will do."""

    @staticmethod
    def default_size(config: Mapping[str, Any]) -> int:
        return int(config.get("sample_size") or 128)

    @property
    def positions(self) -> int | None:
        """Patches that a row or column of an image may have; None for any number."""
        return None

    def set_size(self, resolution: Sequence[int]) -> None:
        super().set_size(resolution)
        if self.positions is not None and max(resolution) > (most := self.patch * self.factor * self.positions):
            raise ValueError(
                f"resolution={[*resolution]}: this {self.name} has positions for {most} x {most} at most: give a "
                "smaller size"
            )
        self.set_shift()

    def set_shift(self) -> None:
        """Sets the shift that follows from the size of the images."""
        if self._dynamic is not None:
            mu = self.mu(self._dynamic)
            try:
                shift = math.exp(mu) if self._dynamic["time_shift_type"] == "exponential" else mu
            except OverflowError as error:
                raise ValueError(
                    f"resolution={[*self.image_shape[1:]]}: the noise levels would be shifted by exp({mu:.0f}): give a "
                    "smaller size"
                ) from error
            self.schedule = HSIVIScheduler.from_config(self.schedule.config, shift=shift, use_dynamic_shifting=False)

    @classmethod
    def euler_arguments(cls, scheduler: HSIVIScheduler) -> dict[str, Any] | None:
        config, ends = scheduler.config, {grid[-1] for grid in scheduler.trained_grids}
        if config.noise_eta != 0 or ends != {-1}:
            return None
        settings = {"shift": round(config.shift, 6), "num_train_timesteps": config.num_train_timesteps}
        return {**settings, "sigmas": [round(u, 6) for u in scheduler.unshifted_sigmas]}

    def mu(self, config: Mapping[str, Any]) -> float:
        """Returns mu of the config of a scheduler, which is linear in the number of tokens of an image."""
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (self.tokens - few) / (many - few))

    def stock_sigmas(self, num_steps: int) -> Tensor | None:
        return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64) if self.sends_sigmas else None

    @property
    def tokens(self) -> float:
        """Tokens of an image, as the pipeline counts them."""
        return math.prod(self.shape[1:]) / self.patch**2

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return self.unpack(network(self.pack(x), timestep=time, **arguments).sample)

    def pack(self, x: Tensor) -> Tensor:
        """Returns latents (B, C, H, W) in the layout of the network."""
        return x

    def unpack(self, x: Tensor) -> Tensor:
        """Returns latents of the layout of the network as (B, C, H, W)."""
        return x

    def unscale(self, x: Tensor) -> Tensor:
        return super().unscale(x) + (self.vae.config.get("shift_factor") or 0.0)


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5: three encoders, of which the third may be missing."""

    pipelines = ("StableDiffusion3Pipeline",)
    network_class = SD3Transformer2DModel
    adapter = Adapter(TARGETS, "transformer", idle=("attn.add_q_proj",))
    comfyui = Files(
        encoders=("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"),
        latent="EmptySD3LatentImage",
        pads_text=True,
    )
    encoded = (("encoder_hidden_states", 0, 1), ("pooled_projections", 2, 3))

    @property
    def positions(self) -> int:
        return int(self.network.config.pos_embed_max_size)

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        shapes = {"encoder_hidden_states": (CLIP_TOKENS + self.longest, config.joint_attention_dim)}
        return {**shapes, "pooled_projections": (config.pooled_projection_dim,)}


class AuraFlow(FlowTransformer):
    """AuraFlow: text of a fixed length, and the time sigma."""

    pipelines = ("AuraFlowPipeline",)
    network_class = AuraFlowTransformer2DModel
    encoded = (("encoder_hidden_states", 0, 2),)
    adapter = Adapter(
        [*JOINT_ATTENTION]
        + [f"{part}.{name}" for part in ("ff", "ff_context") for name in ("linear_1", "linear_2", "out_projection")],
        "transformer",
    )
    comfyui = Files(pads_text=True)
    knows_size = False  # nor does its pipeline

    @staticmethod
    def default_size(config: Mapping[str, Any]) -> int:
        """Of the 1024 pixels of the pipeline, whatever `sample_size` says."""
        return 128

    @property
    def positions(self) -> int:
        """Beyond these the network would take those of the other end."""
        return math.isqrt(self.network.config.pos_embed_max_size)

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return super().forward(network, x, time / len(self.schedule), **arguments)

    def unscale(self, x: Tensor) -> Tensor:
        return x / self.vae.config.scaling_factor  # its pipeline adds no shift

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.longest, self.network.config.joint_attention_dim)}


class Sana(FlowTransformer):
    """Sana: text with a mask, which an instruction precedes, and latents of an AutoencoderDC."""

    pipelines = ("SanaPipeline",)
    network_class = SanaTransformer2DModel
    encoded = (("encoder_hidden_states", 0, 2), ("encoder_attention_mask", 1, 3))
    adapter = Adapter([*ATTENTION, "ff.conv_inverted", "ff.conv_point"], "transformer")
    knows_size = False  # nor does its pipeline

    def __init__(self, pipeline: Any, network: Any, schedule: HSIVIScheduler, rows: int = 0) -> None:
        super().__init__(pipeline, network, schedule, rows)
        if schedule.config.resolution is None:  # of the pipeline it is 1024, for networks of other sizes too
            self.set_size(self.image_shape[1:])

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.vae.config.in_channels, self.factor * self.shape[1], self.factor * self.shape[2]

    def encoding(self) -> dict[str, Any]:
        name = "complex_human_instruction"
        return {name: signature(type(self.pipeline).__call__).parameters[name].default}

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return super().forward(network, x, time * network.config.timestep_scale, **arguments)

    def unpack(self, x: Tensor) -> Tensor:
        return x[:, : self.shape[0]]  # without a learned variance

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.longest
        return {
            "encoder_hidden_states": (length, self.network.config.caption_channels),
            "encoder_attention_mask": (length,),
        }
