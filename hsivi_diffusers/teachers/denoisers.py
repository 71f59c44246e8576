"""Networks as denoisers, (x, level, condition) -> (x0, eps), each called in its own precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..scheduling_hsivi import HSIVIScheduler
from .prompts import PromptTable

Network = UNet2DModel | DiTTransformer2DModel | UNet2DConditionModel | PixArtTransformer2DModel


def sample_shape(network: Any) -> tuple[int, int, int]:
    """Returns (channels, height, width) of what a network denoises, images or latents."""
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def num_labels(network: Any) -> int:
    """Class labels that a network takes, 0 without classes, or numbers of prompts.

    The last one of a DiT is "no class", that of prompts the negative prompt.
    """
    config = network.config
    if (prompts := prompts_of(network)) is not None:
        return len(prompts)
    return config.num_embeds_ada_norm + 1 if _is_dit(network) else config.get("num_class_embeds") or 0


def _is_dit(network: Any) -> bool:
    """Whether it is a DiT, guided or not."""
    return bool(network.config.get("norm_type") == "ada_norm_zero")


def give_prompts(network: Any, prompts: PromptTable) -> None:
    """Lets a network that takes text be called with numbers of prompts, and copies of it too."""
    network.prompts = prompts


def prompts_of(network: Any) -> PromptTable | None:
    """The prompts that `give_prompts` gave."""
    prompts: PromptTable | None = getattr(network, "prompts", None)
    return prompts


def num_classes(network: Any, guides: bool = False) -> int:
    """Classes or prompts that are drawn, 0 without: all labels but "no class".

    A UNet has one if it guides, a DiT and a network that takes text always.

    Raises:
        ValueError: It guides, and has no such labels.
    """
    if guides and num_labels(network) < 2:
        raise ValueError(
            "guidance_scale was given, and the teacher has no class labels, of which the last must be 'no class': "
            "leave guidance_scale out"
        )
    return num_labels(network) - (guides or _is_dit(network) or prompts_of(network) is not None)


def keep_labels(network: nn.Module) -> None:
    """Turns off that a DiT in training mode replaces a tenth of the labels by "no class"."""
    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0


def call_network(network: Any, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
    """Calls a network at times of its own, in its precision, and answers in that of x, as every later formula needs."""
    cast = x.to(network.dtype)
    output: Tensor = predict(network, cast, time.to(x.device).expand(len(x)), condition).to(x.dtype)
    return output


def predict(network: Any, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
    """Returns what a network predicts, told of class labels, or of prompts by their numbers, (B,)."""
    prompts = prompts_of(network)
    if prompts is not None and condition is not None:
        output = network(x, timestep=time, **prompts.arguments(condition, x))
    else:
        output = network(x, time, **({} if condition is None else {"class_labels": condition}))
    sample: Tensor = output.sample
    return sample


def denoise(
    network: Any, schedule: HSIVIScheduler, x: Tensor, level: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the clean image and the noise that a network sees in x, both (B, C, H, W), at levels (B,)."""
    return schedule.predict(call_network(network, x, schedule.levels.time(level), condition), level, x)


# Where an image just begins to show, see signal_timestep: at timestep 800 of 8x8 grey pixels, 956 of 32x32.
LOWEST_SIGNAL = 0.312


def signal_timestep(schedule: HSIVIScheduler, shape: tuple[int, ...], signal: float) -> int:
    """Returns the first timestep where sqrt(C H W) alpha / sigma is at most a number, or the last where alpha > 0.

    A mean over n values has the noise of one by sqrt(n). So levels of images of other sizes and channels mean the same
    where this product is the same (Hoogeboom et al. 2023, arXiv 2301.11093). On the linear clock of 1000, 3.2 is at
    timestep 440 of 8x8 grey pixels, 674 of 32x32, 750 of 32x32 in colour, 836 of 64x64 in colour.

    Args:
        schedule: Gives alpha and sigma at each timestep.
        shape: (C, H, W) of the images.
        signal: Above 0.
    """
    alpha, sigma = schedule.alpha_sigma(torch.arange(len(schedule)), torch.zeros(1))
    above = math.sqrt(math.prod(shape)) * alpha / sigma > signal
    return min(int(above.sum()), int((alpha > 0).sum()) - 1)
