"""Classifier-free guidance of the teacher (Ho and Salimans 2022, arXiv 2207.12598), which the student takes in.

The last class label of the teacher is "no class". With w the scale of guidance, 1 for none, a guided solver uses
S_c + (w - 1) (S_c - S_none), the scores of the class and of no class. A condition of a row is class * G + g, with g the
number of its scale among the G that are trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..vi.bridges import Bridge
from ..vi.objectives import Critic, CriticObjective, LayerDraw, row_sum
from .bridge import TeacherBridge


class GuidedNetwork(nn.Module):
    """A teacher with guidance, for a solver: two calls of the network for each of its own.

    Args:
        unet: Its last class label is "no class".
        scales: w of each g.
    """

    def __init__(self, unet: UNet2DModel, scales: Sequence[float]) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config
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
        number, w = len(self.scales), self.scales.to(x)[class_labels % len(self.scales)]
        none = torch.full_like(class_labels, self.config.num_class_embeds - 1)
        of_class, of_none = (self.unet(x, time, class_labels=each).sample for each in (class_labels // number, none))
        return UNet2DOutput(sample=of_none + w.reshape(-1, *[1] * (x.ndim - 1)) * (of_class - of_none))


def to_solve(unet: UNet2DModel, scales: Sequence[float]) -> UNet2DModel | GuidedNetwork:
    """Returns what a solver follows: the teacher, guided if a scale is not 1."""
    return unet if all(w == 1 for w in scales) and len(scales) < 2 else GuidedNetwork(unet, scales)


class Guidance(CriticObjective):
    """Another objective, and guidance as a term with levels of its own: it is added above the level of a draw.

    The objective matches the student's marginal to that of the class, and the term moves it where the teacher is surer
    of the class (Decoupled DMD, arXiv 2511.22677). With x at a level s, the term is

        - x' . stopgrad((w - 1) (S_c(x') - S_none(x'))),    x' = r x + sqrt(sigma'^2 - r^2 sigma^2) z

    with r = alpha' / alpha, at a level s' drawn from those above s. The critic is not guided.
    """

    def __init__(self, objective: CriticObjective) -> None:
        super().__init__(objective.level_weight)
        self.objective, self.critic_gradient = objective, objective.critic_gradient

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns the loss of the objective and the term, shape (B,)."""
        assert isinstance(bridge, TeacherBridge)
        assert draw.condition is not None
        x, level = bridge.lift(draw.x, draw.level, draw.generator)
        with torch.no_grad():
            direction = bridge.guidance(x, level, draw.condition)
        product = self.level_weight(level) * row_sum(direction * x)
        return self.objective.layer_loss(critic, bridge, draw) - (product - product.detach())

    def critic_loss(self, critic: Critic, draw: LayerDraw) -> Tensor:
        return self.objective.critic_loss(critic, draw)
