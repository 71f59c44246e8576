"""Where the inputs x_{t+1} of the layers come from: x_T ~ base, then x_t ~ q_t(. | x_{t+1}) without gradient.

`SimulatedChain` runs a fresh chain down to each layer that is trained (the paper); see `pools` for persistent chains,
and `regression` for pairs.

Several hierarchies, of T_1, T_2, ... layers, may share a network: layers are numbered one hierarchy after the other,
each from the data side, and every hierarchy gets an equal part of the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributions import DiagonalGaussian, randn_like
from .layers import ConditionalLayers, hierarchy_ends

SampleBase = Callable[[int, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class ChainBatch:
    """A batch of inputs of layers."""

    x_next: Tensor  # x_{t+1}, shape (B, ...)
    t: Tensor  # layer of each row, shape (B,)
    condition: Tensor | None = None  # of each chain, shape (B, ...)
    index: Tensor | None = None  # index of each row in a pool, shape (B,)
    end: Tensor | None = None  # end of the pair, the target of the layer's mean, like x_next; NaN without a pair


@torch.no_grad()
def draw_marginals(layers: ConditionalLayers, x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    """Runs chains of one hierarchy from base draws x_T, shape (B, ...), to the end.

    Returns:
        [x_0, x_1, ..., x_T], each of shape (B, ...): x_t is a draw from the marginal q_t.
    """
    marginals = [x]
    for t in reversed(range(layers.num_layers)):
        q = layers(x, torch.full((len(x),), t, device=x.device))
        x = q.rsample(randn_like(x, generator)).to(x.dtype)
        marginals.insert(0, x)
    return marginals


@torch.no_grad()
def simulate(
    layers: ConditionalLayers,
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Runs chains from base draws x, shape (B, ...), down to the inputs x_{t+1} of the layers t, shape (B,).

    noise, shape (T, B, ...), is for the outputs: noise[s] makes x_s from x_{s+1}. Each chain starts with the layer
    `first`, shape (B,); T-1 by default.
    """
    x, above = x.clone(), torch.full_like(t, len(noise) - 1) if first is None else first.clone()
    while len(rows := (above > t).nonzero().squeeze(1)):
        q = layers(x[rows], above[rows], None if condition is None else condition[rows])
        x[rows] = q.rsample(noise[above[rows], rows]).to(x.dtype)
        above[rows] -= 1
    return x


class Chain(ABC):
    """A source of layer inputs. With one layer all chains draw fresh inputs from the base.

    Args:
        sample_base: Draws x_T: (batch_size, generator) -> shape (batch_size, ...).
        num_layers: T; or a list, the T of each of several hierarchies.
        batch_size: B, rows of a batch.
        sample_condition: Draws a condition for each chain, of shape (batch_size, ...).
    """

    def __init__(
        self,
        sample_base: SampleBase,
        num_layers: int | Sequence[int],
        batch_size: int,
        sample_condition: SampleBase | None = None,
    ) -> None:
        self.sample_base = sample_base
        self.depths = [num_layers] if isinstance(num_layers, int) else list(num_layers)
        self.num_layers = sum(self.depths)
        self.batch_size = batch_size
        self.sample_condition = sample_condition
        # The first and the last layer of each layer's hierarchy.
        self.first, self.last = (
            ends.repeat_interleave(torch.tensor(self.depths)) for ends in hierarchy_ends(self.depths)
        )

    @abstractmethod
    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws inputs of the present layers; t, base draws and noise come from the generator.

        A chain for layer-by-layer training takes the layer from beta, the weight of each layer in the loss, shape (T,).
        The others draw a hierarchy, then t uniformly from its layers.
        """

    def advance(self, batch: ChainBatch, q: DiagonalGaussian, generator: torch.Generator | None = None) -> None:
        """Takes the output q_t(. | x_next) of the layers for a batch; only a pool uses it."""
        del batch, q, generator

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the tensors that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        del state

    def _base(self, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        condition = None if self.sample_condition is None else self.sample_condition(size, generator)
        return self.sample_base(size, generator), condition

    def _in_hierarchy(self, hierarchy: Tensor, number: Tensor) -> Tensor:
        """Returns layer (number modulo T) of each hierarchy, counted over all."""
        return self.last.unique()[hierarchy] + number % torch.tensor(self.depths)[hierarchy]

    def _any_layer(self, generator: torch.Generator | None) -> Tensor:
        """Draws a layer for each row, uniformly from a hierarchy that is drawn before it."""
        common = math.lcm(*self.depths)
        draw = torch.randint(len(self.depths) * common, (self.batch_size,), generator=generator)
        return self._in_hierarchy(draw // common, draw % common)

    def _first_layer(self, generator: torch.Generator | None) -> ChainBatch:
        x_next, condition = self._base(self.batch_size, generator)
        t = torch.full((self.batch_size,), self.num_layers - 1, device=x_next.device)
        return ChainBatch(x_next=x_next, t=t, condition=condition)

    def _simulate(
        self, layers: ConditionalLayers, t: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        x, condition = self._base(len(t), generator)
        noise = torch.stack([randn_like(x, generator) for _ in range(self.num_layers)])
        t, first = t.to(x.device), self.first[t].to(x.device)
        return simulate(layers, x, t, noise, condition, first), condition


class SimulatedChain(Chain):
    """Fresh chains for every batch, as in the paper, at up to T-1 network calls a batch."""

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        if self.num_layers == 1:
            return self._first_layer(generator)
        t = self._any_layer(generator)
        x_next, condition = self._simulate(layers, t, generator)
        return ChainBatch(x_next=x_next, t=t.to(x_next.device), condition=condition)
