"""Classifier-free guidance of the teacher (Ho and Salimans 2022, arXiv 2207.12598), which the student takes in.

The last class label of the teacher is "no class", of a text-to-image model the negative prompt. With w the scale of
guidance, 1 for none, the guided teacher has the score S_none + w (S_c - S_none), of the class and of no class. A
condition of a row is class * G + g, with g the number of its scale among the G that are trained. The critic is not
guided.

No law of images has these scores at all of its noise levels: where there is more noise, the score of a guided law has
less guidance. So the scale may be smaller the more noise there is (arXiv 2404.13040, arXiv 2404.07724).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .denoisers import Network, num_labels, predict


class GuidedNetwork(nn.Module):
    """A teacher with guidance, as bridge and for solvers: two calls of the network for each of its own.

    Args:
        unet: Its last class label is "no class".
        scales: w of each g.
        end: Time of the network at which no guidance is left, above 0: the scale is 1 + (w - 1) max(1 - time / end, 0).
            Without it the scale is w at all times.
    """

    def __init__(self, unet: Network, scales: Sequence[float], end: float | None = None) -> None:
        super().__init__()
        self.unet, self.config, self.end = unet, unet.config, end
        self.scales = torch.tensor(scales)

    @property
    def dtype(self) -> torch.dtype:
        """That of the network."""
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """That of the network."""
        return self.unet.device

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> UNet2DOutput:
        """Returns the guided prediction; the labels are conditions, shape (B,)."""
        number, w = len(self.scales), self.scales.to(x.device)[class_labels % len(self.scales)]
        if self.end is not None:
            w = 1 + (w - 1) * (1 - torch.as_tensor(time, device=x.device).float() / self.end).clamp_min(0)
        none = torch.full_like(class_labels, num_labels(self.unet) - 1)
        of_class, of_none = (predict(self.unet, x, time, each) for each in (class_labels // number, none))
        return UNet2DOutput(sample=of_none + w.to(x).reshape(-1, *[1] * (x.ndim - 1)) * (of_class - of_none))


def calls_of_step(network: Network | GuidedNetwork) -> int:
    """Network calls of a step of the teacher: two with guidance."""
    return 2 if isinstance(network, GuidedNetwork) else 1


def guided(unet: Network, scales: Sequence[float], end: float | None = None) -> Network | GuidedNetwork:
    """Returns the teacher that is followed, guided if a scale is not 1."""
    return unet if [*scales] == [1] else GuidedNetwork(unet, scales, end)
