"""What is on trial until it is measured: inputs from data and an adversarial term, which need draws of the bridge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .bridges import Bridge
from .chains import Chain, ChainBatch, SampleBase
from .layers import ConditionalLayers
from .objectives import Critic, Extended, LayerDraw

SampleInput = Callable[[Tensor, Tensor | None, torch.Generator | None], Tensor]


class DataChain(Chain):
    """Draws of the bridge at the level of the input: x_{t+1} ~ p_{t+1}, of the first layer x_T ~ base.

    That is data noised to tau_{t+1}, as in continuous semi-implicit models (arXiv 2506.06778). It costs no network call
    and keeps no state. A layer then sees the inputs that it would have if those before it were perfect, so what these
    do wrong it does not learn to mend. Besides what `Chain` takes it is given `sample_input`, which draws x_{t+1}:
    (t, condition, generator) -> shape (B, ...), for layers t of shape (B,).
    """

    def __init__(
        self,
        sample_base: SampleBase,
        num_layers: int | Sequence[int],
        batch_size: int,
        sample_condition: SampleBase | None = None,
        *,
        sample_input: SampleInput,
    ) -> None:
        super().__init__(sample_base, num_layers, batch_size, sample_condition)
        self.sample_input = sample_input

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        if self.num_layers == 1:
            return self._first_layer(generator)
        t = self._any_layer(generator)
        base, condition = self._base(self.batch_size, generator)
        t, is_first = t.to(base.device), (t == self.first[t]).to(base.device)
        data = self.sample_input(t, condition, generator)
        x_next = torch.where(is_first.reshape(-1, *[1] * (base.ndim - 1)), base, data)
        return ChainBatch(x_next=x_next, t=t, condition=condition)


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
