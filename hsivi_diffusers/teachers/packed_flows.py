"""Rectified-flow transformers whose tokens are fields of 2 x 2 latents: FLUX.1-dev, Chroma, Qwen-Image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler
from .adapters import Adapter
from .comfyui import Files
from .configs import Configs
from .flow_transformers import TARGETS, FlowTransformer
from .latents import Latents


class Packed(FlowTransformer):
    """Transformers whose tokens are fields of 2 x 2 latents: shape (B, H W / 4, 4 C); their time is sigma."""

    patch = 2
    sends_sigmas = True

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
        # In half precision the pipelines round the time before they divide it.
        return super().forward(network, x, time.to(x.dtype) / len(self.schedule), **arguments)

    def ids(self, tokens: int, device: torch.device) -> dict[str, Tensor]:
        """Returns the positions (0, row, column) of image tokens, and those of text tokens, which are 0."""
        rows, columns = (torch.arange(side // 2, device=device, dtype=torch.float32) for side in self.shape[1:])
        grid = torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
        return {"img_ids": grid, "txt_ids": torch.zeros(tokens, 3, device=device)}


class Flux(Packed):
    """FLUX.1-dev: its networks take the guidance scale as an input, so a guided call of the teacher is one call."""

    pipelines = ("FluxPipeline",)
    network_class = FluxTransformer2DModel
    encoded: Sequence[tuple[str, int, int]] = (("encoder_hidden_states", 0, 0), ("pooled_projections", 1, 1))
    embeds_guidance = True
    takes_negative = False
    undistilled = "FLUX.1-dev"
    comfyui: ClassVar[Files | None] = Files(
        encoders=("clip_l.safetensors", "t5xxl_fp16.safetensors"),
        decoder="ae.safetensors",
        type="flux",
        latent="EmptySD3LatentImage",
        pads_text=True,
    )
    guidance = 1.0

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        if not config["guidance_embeds"]:
            raise ValueError(
                f"teacher {name}: guidance_embeds=False of the {part}, as in models that are already distilled, such "
                f"as FLUX.1-schnell: give {cls.undistilled}, or a fine-tune of it"
            )

    def set_guidance(self, w: float) -> None:
        self.guidance = w

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given = super().arguments(condition, like)
        given |= self.ids(given["encoder_hidden_states"].shape[1], like.device)
        return {**given, "guidance": torch.full([len(condition)], self.guidance, device=like.device)}

    @classmethod
    def unguided(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        """The scale of the training, which the student takes as its teacher does."""
        return {"guidance_scale": (scheduler.guidance_scales or [1.0])[0]}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        shapes = {"encoder_hidden_states": (self.longest, config.joint_attention_dim)}
        return {**shapes, "pooled_projections": (config.pooled_projection_dim,)}


class Chroma(Packed):
    """Chroma: a Flux without guidance input. Its text has 512 tokens, of which those after the prompt weigh less."""

    pipelines = ("ChromaPipeline",)
    network_class = ChromaTransformer2DModel
    encoded = (("encoder_hidden_states", 0, 3), ("attention_mask", 2, 5))

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        given = super().arguments(condition, like)
        mask = given["attention_mask"]
        image = mask.new_ones(len(mask), like.shape[-2] * like.shape[-1] // 4)
        given |= self.ids(mask.shape[1], like.device)
        return {**given, "attention_mask": torch.cat([mask, image], dim=1)}

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        with _checkpointed(network, arguments["attention_mask"]):
            return super().forward(network, x, time, **arguments)

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length, width = self.longest, self.network.config.joint_attention_dim
        return {"encoder_hidden_states": (length, width), "attention_mask": (length,)}


@contextmanager
def _checkpointed(network: Any, mask: Tensor) -> Iterator[None]:
    """Gives the mask to the single blocks, which diffusers calls without it under gradient checkpointing."""
    own = network._gradient_checkpointing_func

    def call(block: Any, *given: Any) -> Any:
        return own(block, *given, mask) if len(given) == 3 else own(block, *given)

    network._gradient_checkpointing_func = call
    try:
        yield
    finally:
        network._gradient_checkpointing_func = own


class QwenImage(Packed):
    """Qwen-Image: prompts of their own length, guidance that keeps the norm of each token, and a VAE of videos."""

    pipelines = ("QwenImagePipeline",)
    network_class = QwenImageTransformer2DModel
    adapter = Adapter(
        [*TARGETS[:8], *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2"))],
        "transformer",
        idle=("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    comfyui = Files(
        encoders=("qwen_2.5_vl_7b_fp8_scaled.safetensors",),
        decoder="qwen_image_vae.safetensors",
        type="qwen_image",
        latent="EmptySD3LatentImage",
    )

    @classmethod
    def of_configs(cls, configs: Configs, schedule: HSIVIScheduler) -> Latents:
        """Makes the tables of rotary embeddings on the CPU: they are no buffers, so no plan can make them fake."""
        teacher = super().of_configs(configs, schedule)
        rope = teacher.network.pos_embed
        with torch.device("cpu"):
            teacher.network.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
        return teacher

    @classmethod
    def outputs(cls, config: Mapping[str, Any]) -> int:
        return int(config["patch_size"]) ** 2 * super().outputs(config)

    @property
    def factor(self) -> int:
        return int(2 ** len(self.vae.config.temperal_downsample))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.vae.config.input_channels, self.factor * self.shape[1], self.factor * self.shape[2]

    def prompt_tensors(self, encoded: Sequence[Any], are_negative: bool) -> dict[str, Tensor]:
        embedded, mask = encoded
        mask = embedded.new_ones(embedded.shape[:2]) if mask is None else mask.to(embedded.dtype)
        return {"encoder_hidden_states": embedded, "encoder_hidden_states_mask": mask}

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        size = (1, *(side // 2 for side in self.shape[1:]))
        return {**super().arguments(condition, like), "img_shapes": [[size]] * len(condition)}

    def guide(self, of_condition: Tensor, of_none: Tensor, w: Tensor) -> Tensor:
        """Rescales each token to the norm that it has without guidance."""
        plain, guided = self.pack(of_condition), self.pack(super().guide(of_condition, of_none, w))
        return self.unpack(guided * (plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)))

    @classmethod
    def unguided(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0}

    def guided(self, w: float) -> dict[str, Any]:
        return {"true_cfg_scale": w}

    def unscale(self, x: Tensor) -> Tensor:
        """As videos of one frame."""
        return self.unscale_channels(x).unsqueeze(2)

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(x)[:, :, 0]

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.longest
        return {
            "encoder_hidden_states": (length, self.network.config.joint_attention_dim),
            "encoder_hidden_states_mask": (length,),
        }
