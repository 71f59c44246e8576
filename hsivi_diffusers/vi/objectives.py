r"""The losses of the layers and, where there is one, of the critic: unreduced, of shape (B,).

With x ~ q(. | x_next), S the bridge score, s the critic's estimate of the marginal score and v = S - s:

    critic        1/2 |s(x) - grad log q(x | x_next)|^2            denoising score matching (the max of sec. 3.2)
    HSIVI-SM      v(x) . (S(x) - grad log q(x | x_next)) - 1/2 |v(x)|^2                    (sec. 3.2)
    HSIVI-KL      x . stopgrad(s(x) - S(x))                        gradient of KL(q || p), as the layer sees it

`regression` adds a loss on pairs of a map, and `lower_bound` needs no critic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .bridges import Bridge
from .distributions import DiagonalGaussian, randn_like

Critic = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
Weight = Callable[[Tensor], Tensor]
Scoring = Literal["own", "random"]


@dataclass(frozen=True)
class LayerDraw:
    """A draw x ~ q(. | x_next) from a layer, at the level where it is scored."""

    q: DiagonalGaussian  # law of x: given x_next for `scoring="own"`, else moved by `Bridge.place`
    x: Tensor  # shape (B, ...)
    level: Tensor  # of q on the bridge, shape (B,)
    t: Tensor  # layer of each row, shape (B,)
    condition: Tensor | None = None  # of each row
    residual: Tensor | None = None  # mean of the layer, at its own level, minus the end of the pair; 0 without a pair

    @property
    def layer_score(self) -> Tensor:
        """grad_x log q(x | x_next), of the shape of x."""
        return self.q.score(self.x)

    def answer(self, critic: Critic) -> Tensor:
        """Returns critic(x, level, condition, t)."""
        return critic(self.x, self.level, self.condition, self.t)

    def detach(self) -> LayerDraw:
        """The same draw, cut from the graph of the layers."""
        residual = None if self.residual is None else self.residual.detach()
        return replace(self, q=self.q.detach(), x=self.x.detach(), residual=residual)

    def take(self, rows: Tensor) -> LayerDraw:
        """The rows of these numbers, shape (R,)."""
        q = DiagonalGaussian(self.q.mean[rows], self.q.std.expand_as(self.q.mean)[rows])
        condition, residual = (None if each is None else each[rows] for each in (self.condition, self.residual))
        return LayerDraw(q, self.x[rows], self.level[rows], self.t[rows], condition, residual)


def draw_layer(
    q: DiagonalGaussian,
    t: Tensor,
    bridge: Bridge,
    *,
    x_next: Tensor | None = None,
    scoring: Scoring = "own",
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
    end: Tensor | None = None,
) -> LayerDraw:
    """Draws from q = q_t(. | x_next), with layers t of shape (B,).

    It is scored at the level of the layer ("own", the paper), or at a level that the bridge draws and moves q to
    ("random"). `end` is the end of the pair of each row, NaN in rows without a pair.

    Raises:
        ValueError: `scoring` is neither of these.
    """
    if scoring not in ("own", "random"):
        raise ValueError(f"scoring={scoring!r} is unknown: choose 'own' or 'random'")
    residual = None if end is None else torch.where(end.isnan(), 0, q.mean - end)
    level = bridge.level(t) if scoring == "own" else bridge.sample_level(t, generator)
    noise = randn_like(q.mean, generator)
    if scoring == "random":
        q, noise = bridge.place(q, t, level, noise, x_next, generator)
    x = q.rsample(noise)
    return LayerDraw(q=q, x=x, level=level, t=t, condition=condition, residual=residual)


def unit_weight(level: Tensor) -> Tensor:
    return torch.ones_like(level, dtype=torch.float32)


class Objective(ABC):
    """Base class of training objectives."""

    critic_gradient = False  # whether the layers' loss needs the gradient through the critic

    @abstractmethod
    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns the loss whose gradient in the layers' parameters pulls q towards p: shape (B,).

        The critic is (x, level, condition, t) -> estimate of grad log q(x), of the shape of x.
        """

    def scored(self, draw: LayerDraw) -> LayerDraw:
        """The rows that a critic is asked for, by the loss of the layers, and trained on: here all."""
        return draw


class CriticObjective(Objective):
    """Base class of objectives with a critic: the critic's loss, and the weights.

    Args:
        level_weight: w(level) >= 0 of both losses, (B,) -> (B,), in score units; 1 by default.
    """

    critic_gradient = True

    def __init__(self, level_weight: Weight = unit_weight) -> None:
        self.level_weight = level_weight

    def critic_loss(self, critic: Critic, draw: LayerDraw) -> Tensor:
        """Returns w/2 |s(x) - grad log q(x | x_next)|^2, shape (B,); the draw is cut from the graph of the layers."""
        error = draw.answer(critic) - draw.layer_score
        return 0.5 * self.level_weight(draw.level) * row_sum(error.square())


class ScoreMatching(CriticObjective):
    """HSIVI-SM: the Fisher divergence as a game between layers and critic (sec. 3.2).

    At the best critic, the marginal score s_q, its mean is half the Fisher divergence, 1/2 E|S - s_q|^2.
    """

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns w (v . (S - grad log q(x | x_next)) - 1/2 |v|^2), its gradient through both networks."""
        bridge_score = bridge.score(draw.x, draw.level, draw.condition)
        v = bridge_score - draw.answer(critic)
        loss = row_sum(v * (bridge_score - draw.layer_score) - 0.5 * v.square())
        return self.level_weight(draw.level) * loss


class KullbackLeibler(CriticObjective):
    """HSIVI-KL: the gradient of KL(q || p), with the critic for the marginal score."""

    critic_gradient = False

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns a loss with the gradient of w x . stopgrad(s - S), that of KL(q || p).

        KL itself is not known; the value is w/2 |s - S|^2, in the mean the critic's estimate of the Fisher divergence,
        which is 0 at the truth as KL is.
        """
        with torch.no_grad():
            bridge_score = bridge.score(draw.x, draw.level, draw.condition)
            gap = draw.answer(critic) - bridge_score
            value = 0.5 * row_sum(gap.square())
        product = row_sum(gap * draw.x)
        return self.level_weight(draw.level) * (value + (product - product.detach()))


def row_sum(x: Tensor) -> Tensor:
    """Returns the sum over all but the first dimension, shape (B,)."""
    return x.flatten(1).sum(1)
