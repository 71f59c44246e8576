"""What is on trial until it is measured: an adversarial term, which needs draws of the bridge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .bridges import Bridge
from .objectives import Critic, Extended, LayerDraw


class Adversarial(Extended):
    """Another objective and, with a weight > 0, a game of layers and critic over draws of the bridge itself.

    The critic answers with a score and with logits D, which tell draws of the bridge (real) from draws of the layers;
    of several logits for a row the mean is taken. The best D is log p(x) / q(x). With d coordinates of x this is the
    term of adversarial score identity distillation (arXiv 2410.14919), and of DMD2 (arXiv 2405.14867); the weight of a
    level is not applied to it.
    """

    needs_real = True

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns the objective's loss + weight d softplus(-D(x)), from one call of the critic.

        Raises:
            TypeError: The critic answers with a score alone.
        """
        score, logits = _score_and_logits(draw.answer(critic))
        loss = self.objective.layer_loss(lambda *_: score, bridge, draw)
        return loss + self._scale(draw) * _mean(softplus(-logits))

    def critic_loss(self, critic: Critic, draw: LayerDraw, bridge: Bridge) -> Tensor:
        """Returns the objective's loss + weight d/2 (softplus(D(x)) + softplus(-D(x_real))): shape (B,).

        All 2 B rows go through the critic in one call, for it may reduce its gradients between processes.

        Raises:
            TypeError: The critic answers with a score alone.
            ValueError: The draw has no real rows.
        """
        if draw.real is None:
            raise ValueError("the draw has no real rows: take draw_layer(..., real=True)")
        size = len(draw.x)
        condition = None if draw.condition is None else torch.cat([draw.condition, draw.condition])
        answer = critic(torch.cat([draw.x, draw.real]), draw.level.repeat(2), condition, draw.t.repeat(2))
        score, logits = _score_and_logits(answer)
        loss = self.objective.critic_loss(lambda *_: score[:size], draw, bridge)
        game = _mean(softplus(logits[:size])) + _mean(softplus(-logits[size:]))
        return loss + 0.5 * self._scale(draw) * game

    def _scale(self, draw: LayerDraw) -> float:
        return self.weight * draw.x[0].numel()


def _score_and_logits(answer: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(answer, tuple):  # two rows of a score would be unpacked as well
        raise TypeError("the critic answers with a score alone: Adversarial needs one that returns a score and logits")
    score, logits = answer
    return score, logits


def _mean(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).mean(1)
