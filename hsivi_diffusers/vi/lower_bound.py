"""HSIVI-LB: a loss of the layers without a critic, from extra draws of x_next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bridges import Bridge
from .distributions import DiagonalGaussian
from .objectives import Critic, LayerDraw, Objective, row_sum


class LowerBound(Objective):
    """HSIVI-LB: the bound of semi-implicit variational inference, layer by layer (sec. 3.1).

    The mean of the loss is an upper bound of KL(q || p) - log Z that becomes tight as K grows. The K extra draws of
    x_{t+1} are the inputs of the other rows of the batch at the same level, so the mixture costs one B x B matrix and
    no network call. A small K makes q too narrow, since the bound sees little of the spread between inputs.

    Args:
        surrogate: Take stopgrad(S(x)) . x instead of log p(x), which has the same gradient, for a target whose score
            only is known. The value then has no meaning.
    """

    def __init__(self, surrogate: bool = False) -> None:
        self.surrogate = surrogate

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns log 1/(K+1) sum_k q(x | x_next^(k)) - log p(x), where x was drawn from the input x_next^(0).

        Raises:
            ValueError: The rows have conditions, or all have levels of their own.
        """
        if draw.condition is not None:
            raise ValueError(
                "LowerBound mixes the rows of a batch, so it takes no conditions: use an objective with a critic"
            )
        levels = draw.level.unique()
        if 1 < len(levels) == len(draw.level):
            raise ValueError(
                f"each of the {len(levels)} rows has a level of its own, so there is nothing to mix: use "
                'scoring="own", and a larger batch'
            )
        marginal = draw.x.new_empty(len(draw.x))
        for level in levels:
            rows = (draw.level == level).nonzero().squeeze(1)
            std = draw.q.std.expand_as(draw.q.mean)[rows]
            matrix = DiagonalGaussian(draw.q.mean[rows], std).pairwise_log_prob(draw.x[rows])
            marginal = marginal.index_put((rows,), matrix.logsumexp(1) - math.log(len(rows)))
        return marginal - self._log_target(bridge, draw)

    def _log_target(self, bridge: Bridge, draw: LayerDraw) -> Tensor:
        if not self.surrogate:
            return bridge.log_prob(draw.x, draw.level)
        with torch.no_grad():
            score = bridge.score(draw.x, draw.level)
        return row_sum(score * draw.x)
