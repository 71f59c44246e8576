"""Chains that persist between batches: live ones for joint training, frozen ones for layer-by-layer training.

A training step moves the chains of a `PoolChain` that it used by one layer, with the network call that trained them, so
no call is spent on simulation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .chains import Chain, ChainBatch, SampleBase, SimulatedChain
from .distributions import DiagonalGaussian, randn_like
from .layers import ConditionalLayers


class _PersistentChain(Chain):
    """States x_{t+1} of chains with their layers and conditions, between batches; empty before the first draw."""

    x_next: Tensor | None = None
    t: Tensor
    condition: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        if self.x_next is None:
            return {}
        state = {"x_next": self.x_next, "t": self.t}
        return state if self.condition is None else {**state, "condition": self.condition}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the chains, on the device that the base is drawn on."""
        self.x_next = self.condition = None
        if not state:
            return
        device = self.sample_base(1, None).device
        self.x_next, self.t = state["x_next"].to(device, copy=True), state["t"].to(device, copy=True)
        self.condition = state["condition"].to(device, copy=True) if "condition" in state else None


class PoolChain(_PersistentChain):
    """B T live chains at staggered depths; a batch is B of them, and `advance` moves those down by one layer.

    With several hierarchies T is the largest, and a chain stays in its own. The first draw fills the pool. A chain that
    has left the last layer restarts from the base. States are T steps old on average, so they are nearly, not exactly,
    draws from the present sampler.
    """

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        if self.num_layers == 1:
            return self._first_layer(generator)
        if self.x_next is None:
            self.t = self._staggered()
            self.x_next, self.condition = self._simulate(layers, self.t, generator)
            self.t = self.t.to(self.x_next.device)
        index = self._rows(generator).to(self.t.device)
        condition = None if self.condition is None else self.condition[index]
        return ChainBatch(x_next=self.x_next[index], t=self.t[index], condition=condition, index=index)

    @torch.no_grad()
    def advance(self, batch: ChainBatch, q: DiagonalGaussian, generator: torch.Generator | None = None) -> None:
        """Writes x_t ~ q_t(. | x_next) over x_next, or a new base draw where the chain has ended."""
        if self.num_layers == 1:
            return
        if self.x_next is None or batch.index is None:
            raise ValueError("advance() takes a batch that draw() of the same pool returned")
        x, condition = self._base(len(batch.t), generator)
        noise = randn_like(x, generator)
        done = batch.t == self.last.to(batch.t.device)[batch.t]
        keep = done.reshape(-1, *[1] * (x.ndim - 1))
        self.x_next[batch.index] = torch.where(keep, x, q.rsample(noise).to(x.dtype))
        self.t[batch.index] = torch.where(done, self.first.to(batch.t.device)[batch.t], batch.t - 1)
        if self.condition is not None and condition is not None and batch.condition is not None:
            self.condition[batch.index] = batch.condition  # the condition of the pair in rows with one
            self.condition[batch.index[done]] = condition[done]

    def _staggered(self) -> Tensor:
        """Layers of the chains at the start: the hierarchies in turn, each from its last layer up."""
        chain = torch.arange(self.batch_size * max(self.depths))
        return self._in_hierarchy(chain % len(self.depths), chain // len(self.depths))

    def _rows(self, generator: torch.Generator | None) -> Tensor:
        return torch.randperm(len(self.t), generator=generator)[: self.batch_size]


class CohortChain(PoolChain):
    """A pool of one hierarchy, whose batches are B chains at the same layer.

    `LowerBound` needs that: its extra draws are the other rows of the batch at that layer.

    Raises:
        ValueError: There are several hierarchies.
    """

    def __init__(
        self,
        sample_base: SampleBase,
        num_layers: int | Sequence[int],
        batch_size: int,
        sample_condition: SampleBase | None = None,
    ) -> None:
        super().__init__(sample_base, num_layers, batch_size, sample_condition)
        if len(self.depths) > 1:
            raise ValueError(f"num_layers={self.depths}: a CohortChain has one hierarchy: give one number of layers")

    def _rows(self, generator: torch.Generator | None) -> Tensor:
        first = int(torch.randint(self.num_layers, (), generator=generator))
        return torch.arange(first, len(self.t), self.num_layers)  # every T-th chain started at the same layer


class FrozenPoolChain(_PersistentChain):
    """For layer-by-layer training: `num_states` draws of x_{t+1} from the layers that are trained.

    When the curriculum goes to the next layer, the layer that was trained last moves the whole pool down. Batches are
    drawn with replacement; for t = T-1 the base is drawn afresh.
    """

    num_states = 60_000

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws rows of the pool for the layer with beta > 0.

        Raises:
            ValueError: There is not one such layer, or it is above a layer that was trained before.
        """
        here = self.num_layers - 1 if self.x_next is None else int(self.t)
        learning = [] if beta is None else beta.nonzero().flatten().tolist()
        if len(learning) != 1 or learning[0] > here:
            raise ValueError(
                f"layers {learning} are to learn, the pool is at layer {here}: a FrozenPoolChain trains one layer "
                "after the other, from the base down; use it with `sequential`, or take a SimulatedChain"
            )
        (t,) = learning
        if t == self.num_layers - 1:
            return self._first_layer(generator)
        x_next = self._move_down(layers, here, t, generator)
        index = torch.randint(self.num_states, (self.batch_size,), generator=generator).to(x_next.device)
        condition = None if self.condition is None else self.condition[index]
        return ChainBatch(x_next[index], torch.full((self.batch_size,), t, device=x_next.device), condition)

    @torch.no_grad()
    def _move_down(self, layers: ConditionalLayers, here: int, t: int, generator: torch.Generator | None) -> Tensor:
        x, condition = self.x_next, self.condition
        if x is None:
            x, condition = self._base(self.num_states, generator)
        for above in range(here, t, -1):
            noise = randn_like(x, generator)
            q = layers(x, torch.full((len(x),), above, device=x.device), condition)
            x = q.rsample(noise).to(noise.dtype)
        self.x_next, self.t, self.condition = x, torch.tensor(t), condition
        return x


def make_chain(
    source: Literal["pool", "simulate"],
    sample_base: SampleBase,
    num_layers: int | Sequence[int],
    batch_size: int,
    sample_condition: SampleBase | None = None,
) -> Chain:
    """Returns the chain of that name, a `PoolChain` or a `SimulatedChain`.

    Raises:
        ValueError: The name is unknown.
    """
    kinds: dict[str, type[Chain]] = {"pool": PoolChain, "simulate": SimulatedChain}
    if source not in kinds:
        raise ValueError(f"source={source!r} is unknown: choose 'pool' or 'simulate'")
    return kinds[source](sample_base, num_layers, batch_size, sample_condition)
