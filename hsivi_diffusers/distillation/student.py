"""The student's layers and the critic: diffusion UNets as what the core calls, score = -eps / sigma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.denoisers import Network, call_network, denoise
from ..vi.distributions import DiagonalGaussian
from ..vi.layers import ConditionalLayers, hierarchy_ends

SPREAD = 0.25  # how far apart the embeddings of scales of guidance start


class UNetCritic(nn.Module):
    """A diffusion UNet as the score of the density at each noise level: -eps(x, level) / sigma_level.

    Args:
        unet: Predicts what the scheduler's `prediction_type` says.
        scheduler: Gives alpha and sigma.
        num_layers: Layers that the unet tells apart, see `label_layers`; 0 for one that does not.
    """

    def __init__(self, unet: Any, scheduler: HSIVIScheduler, num_layers: int = 0) -> None:
        super().__init__()
        self.unet, self.scheduler, self.num_layers = unet, scheduler, num_layers

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Returns the score at x, shape (B, C, H, W).

        Args:
            x: Shape (B, C, H, W).
            level: Timesteps, 0..N-1, shape (B,).
            condition: Class labels, shape (B,), or None.
            t: Layers, 0..L-1, shape (B,); needed with `num_layers`, ignored without it.
        """
        if self.num_layers:
            if t is None:
                raise ValueError(
                    f"t is missing: this critic tells {self.num_layers} layers apart; give one for each row"
                )
            condition = t if condition is None else condition * self.num_layers + t  # see label_layers
        _, noise_pred = denoise(self.unet, self.scheduler, x, level, condition)
        _, sigma = self.scheduler.alpha_sigma(level, noise_pred)
        return -noise_pred / sigma


class UNetLayers(ConditionalLayers):
    """The student: one UNet shared by all layers, q_t(x_t | x_{t+1}) by `HSIVIScheduler.transition`.

    Args:
        unet: Starts as a copy of the teacher's.
        scheduler: Holds the grid, or the grids of several hierarchies.
        noise_scale: The learned scale per pixel, or None for that of the scheduler's config.
        clip_images: Clip the mean of the last layer to [-1, 1], as pipelines do with what is drawn, and let its
            gradient pass as if it were not clipped (straight through).
    """

    def __init__(
        self,
        unet: Network,
        scheduler: HSIVIScheduler,
        noise_scale: HSIVINoiseScale | None = None,
        clip_images: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.scheduler, self.noise_scale = unet, scheduler, noise_scale
        self.clip_images, self.num_layers = clip_images, sum(scheduler.depths)

    @property
    def depths(self) -> list[int]:
        """T of each grid."""
        return self.scheduler.depths

    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        """Returns q_t(. | x_next), see `ConditionalLayers`; the condition is class labels of shape (B,)."""
        level = self.scheduler.input_level(t)
        model_output = call_network(self.unet, x_next, self.scheduler.levels.time(level), condition)
        several = len(self.scheduler.depths) > 1  # grids, which may share an input and not the output
        prev_level = self.scheduler.output_level(t) if several else None
        scale = None if self.noise_scale is None else self.noise_scale()
        mean, std = self.scheduler.transition(model_output, level, x_next, scale, prev_level)
        if self.clip_images:
            _, last = hierarchy_ends(self.depths)
            is_last = torch.isin(t, last.to(t.device)).reshape(-1, *[1] * (mean.ndim - 1))
            mean = torch.where(is_last, mean + (mean.clamp(-1, 1) - mean).detach(), mean)
        return DiagonalGaussian(mean=mean, std=std)


def check_labels(unet: Network, given: str = "several layers") -> None:
    """Refuses, with ValueError, a network whose classes are no numbers, or that is no `UNet2DModel`."""
    is_unet = isinstance(unet, UNet2DModel)
    if not is_unet or unet.config.class_embed_type is not None:
        what = f"class_embed_type={unet.config.class_embed_type!r} of the unet" if is_unet else type(unet).__name__
        raise ValueError(
            f"{given}: {what} leaves no place to tell it a layer or a scale of guidance: train one number of steps and "
            "one scale, where it need not be told"
        )


def label_layers(unet: Network, num_layers: int) -> UNet2DModel:
    """Returns a copy of a UNet that is told the layer, 0..L-1: for each one it starts as the UNet itself.

    The copy takes class labels, t of a UNet without classes, otherwise class * L + t.

    Raises:
        ValueError: See `check_labels`.
    """
    check_labels(unet)
    classes = unet.config.num_class_embeds
    labelled: UNet2DModel = UNet2DModel.from_config(unet.config, num_class_embeds=num_layers * (classes or 1))
    state, name = dict(unet.state_dict()), "class_embedding.weight"
    old = state[name] if classes else torch.zeros_like(labelled.class_embedding.weight[:1])
    labelled.load_state_dict({**state, name: old.detach().repeat_interleave(num_layers, 0)})
    if (unet.device, unet.dtype) != (labelled.device, labelled.dtype):  # fake tensors, of a plan, cannot be moved
        labelled = labelled.to(unet.device, unet.dtype)
    return labelled.train(unet.training)


@torch.no_grad()
def label_scales(unet: Network, scales: Sequence[float]) -> UNet2DModel:
    """Returns a copy of a UNet that is told a scale of guidance w beside the class, as class * G + g.

    For w = 1 it starts as the UNet itself. The embeddings of others start at e_none + (1 + SPREAD (w - 1)) (e_c -
    e_none), with those of the class and of no class: from equal ones it would not learn to tell the scales apart.

    Raises:
        ValueError: See `check_labels`.
    """
    labelled = label_layers(unet, len(scales))
    rows = labelled.class_embedding.weight.unflatten(0, (-1, len(scales)))
    none, w = rows[-1], torch.tensor(scales).to(rows)[:, None]
    rows.copy_(none + (1 + SPREAD * (w - 1)) * (rows - none))
    return labelled
