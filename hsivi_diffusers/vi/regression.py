"""Pairs (x_next, end) of a map, such as the teacher's ODE from noise to data: the chains and the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .bridges import Bridge
from .chains import Chain, ChainBatch
from .distributions import DiagonalGaussian
from .layers import ConditionalLayers
from .objectives import Critic, CriticObjective, LayerDraw, Objective, row_sum

ResidualLoss = Callable[[Tensor, Tensor], Tensor]
SamplePairs = Callable[[Tensor, torch.Generator | None], tuple[Tensor, Tensor, Tensor | None]]
ALONE_WEIGHT = 0.01  # of the pairs of layers that nothing else is asked of, see `WithPairs`


class PairChain(Chain):
    """Pairs of a map from the base to the mean of a layer that takes it: for `Regression`.

    `sample_pairs` draws the pairs of layers t, the first of their hierarchies: (t of shape (B,), generator) -> (x_T,
    end, condition), tensors of shape (B, ...); the condition may be None. The rest is as in `Chain`.
    """

    def __init__(self, sample_pairs: SamplePairs, num_layers: int | Sequence[int], batch_size: int) -> None:
        super().__init__(self._sample_base, num_layers, batch_size)
        self.sample_pairs = sample_pairs

    def _sample_base(self, size: int, generator: torch.Generator | None) -> Tensor:
        return self.sample_pairs(torch.full((size,), self.num_layers - 1), generator)[0]

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        one = self.num_layers == 1
        t = torch.zeros(self.batch_size, dtype=torch.long) if one else self.first[self._any_layer(generator)]
        x_next, end, condition = self.sample_pairs(t, generator)
        return ChainBatch(x_next=x_next, t=t.to(x_next.device), condition=condition, end=end)


class PairMixingChain(Chain):
    """Another chain, where pairs replace rows of the layers that take the base: for `WithPairs`.

    Args:
        chain: The other chain.
        sample_pairs: See `PairChain`.
        alone: Layers that learn from pairs alone; all of their rows are replaced.
        share: The probability that a row of the other layers is replaced, 0 to 1. The rest keep fresh draws of the
            base: of pairs that return many times a layer learns more than of the base that it draws from.
    """

    def __init__(self, chain: Chain, sample_pairs: SamplePairs, alone: Sequence[int] = (), share: float = 1.0) -> None:
        super().__init__(chain.sample_base, chain.depths, chain.batch_size, chain.sample_condition)
        self.chain, self.sample_pairs, self.share = chain, sample_pairs, share
        self.alone = torch.tensor([*alone], dtype=torch.long)

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws a batch of the chain, with pairs for base draws as the class says; `end` is NaN in the other rows."""
        batch = self.chain.draw(layers, generator, beta)
        first = self.first.to(batch.t.device)[batch.t]
        x_next, end, condition = self.sample_pairs(first.cpu(), generator)
        drawn = torch.rand(len(first), generator=generator) < self.share
        starts = (batch.t == first) & (drawn | torch.isin(first.cpu(), self.alone)).to(first.device)
        rows = starts.reshape(-1, *[1] * (end.ndim - 1))
        if condition is not None and batch.condition is not None:
            condition = torch.where(starts.reshape(-1, *[1] * (condition.ndim - 1)), condition, batch.condition)
        x_next, end = torch.where(rows, x_next, batch.x_next), torch.where(rows, end, torch.nan)
        return replace(batch, x_next=x_next, condition=condition, end=end)

    def advance(self, batch: ChainBatch, q: DiagonalGaussian, generator: torch.Generator | None = None) -> None:
        self.chain.advance(batch, q, generator)

    def state_dict(self) -> dict[str, Tensor]:
        return self.chain.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.chain.load_state_dict(state)


def half_square(residual: Tensor, t: Tensor | None = None) -> Tensor:
    return 0.5 * row_sum(residual.square())


class Regression(Objective):
    """The layer is fitted to pairs of a map, without critic or score (arXiv 2101.02388): a start for other objectives.

    The best mean is the map where that is smooth, and a local average elsewhere, so details are lost; but each part of
    the target gets its mass. `loss` takes the residuals mu(x_next) - end, shape (B, ...), with the mean mu of the
    layer, and the layers t; it returns shape (B,), by default 1/2 |residual|^2.
    """

    def __init__(self, loss: ResidualLoss = half_square) -> None:
        self.loss = loss

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns the loss of mu(x_next) - end.

        Raises:
            ValueError: The draw has no pair.
        """
        if draw.residual is None:
            raise ValueError(
                "the draw has no pair: Regression takes its inputs from a PairChain, WithPairs from a PairMixingChain"
            )
        return self.loss(draw.residual, draw.t)


class WithPairs(CriticObjective):
    """Another objective plus a weight times `Regression`: the regression loss of DMD (arXiv 2311.18828).

    Objectives with a critic see missing mass at high levels only, where the critic is inaccurate; a small weight keeps
    the masses of the map, a larger one costs detail. The weight > 0 is in units of `KullbackLeibler` with a weight
    sigma^2: try 0.005.

    Of several layers the first has a smooth map to learn, of which regression loses little. Rows of `alone`, layers
    with such pairs, have 0.01 times `Regression` as their only loss.

    Raises:
        ValueError: The weight is not above 0.
    """

    def __init__(
        self,
        objective: CriticObjective,
        weight: float,
        loss: ResidualLoss = half_square,
        alone: Sequence[int] = (),
    ) -> None:
        if not weight > 0:
            raise ValueError(f"weight={weight}: give a number > 0, or take the objective without pairs")
        super().__init__(objective.level_weight)
        self.objective, self.weight, self.alone = objective, weight, torch.tensor([*alone], dtype=torch.long)
        self.regression = Regression(loss)
        self.critic_gradient = objective.critic_gradient

    def layer_loss(self, critic: Critic, bridge: Bridge, draw: LayerDraw) -> Tensor:
        """Returns the objective's loss + weight times that of `Regression`, which is 0 in rows without a pair.

        Rows of the layers `alone` have the latter with a weight of their own.

        Raises:
            ValueError: No row has a pair.
        """
        of_pairs = self.regression.layer_loss(critic, bridge, draw)
        others = self._others(draw.t)
        loss = torch.where(others, self.weight * of_pairs, ALONE_WEIGHT * of_pairs)
        of_objective = self.objective.layer_loss(critic, bridge, self._take_others(draw))
        return loss + torch.zeros_like(loss, dtype=of_objective.dtype).masked_scatter(others, of_objective)

    def _others(self, t: Tensor) -> Tensor:
        """Which rows are of layers that are not `alone`."""
        return torch.isin(t, self.alone.to(t.device), invert=True)

    def _take_others(self, draw: LayerDraw) -> LayerDraw:
        """Their rows; all if there are none, since in a sharded run every process takes part in each call."""
        if not len(self.alone):  # a GPU would wait for the numbers of the rows
            return draw
        rows = self._others(draw.t).nonzero().squeeze(1)
        return draw.take(rows) if 0 < len(rows) < len(draw.t) else draw

    def scored(self, draw: LayerDraw) -> LayerDraw:
        """The rows of layers that are not `alone`, which nobody scores; all if there are none."""
        return self.objective.scored(self._take_others(draw))

    def critic_loss(self, critic: Critic, draw: LayerDraw) -> Tensor:
        return self.objective.critic_loss(critic, draw)
