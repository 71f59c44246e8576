"""Where the inputs x_{t+1} of the layers come from: x_T ~ base, then x_t ~ q_t(. | x_{t+1}) without gradient.

`SimulatedChain` runs a fresh chain down to each layer that is trained (the paper). `PoolChain` keeps live chains at
staggered depths: a training step moves the chains it used by one layer, with the very network call that trained them,
so that no call is spent on simulation alone. `DataChain` takes draws of the bridge in the place of the layers'.
`PairChain` also tells where they are to lead, and `GuidedChain` where those of another chain do that are base draws.

Layers may serve several hierarchies, of T_1, T_2, ... layers, that share a network: they are counted one hierarchy
after the other, each from the data side, and every hierarchy gets an equal part of the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .distributions import DiagonalGaussian, randn_like
from .layers import ConditionalLayers, hierarchy_ends

SampleBase = Callable[[int, torch.Generator | None], Tensor]
SampleInput = Callable[[Tensor, Tensor | None, torch.Generator | None], Tensor]
SamplePairs = Callable[[Tensor, torch.Generator | None], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class ChainBatch:
    """Inputs of layers.

    Attributes:
        x_next: x_{t+1}, shape (B, ...).
        t: Layer that takes it, shape (B,).
        condition: Condition of each chain, shape (B, ...), or None.
        index: Place of each row in a pool, shape (B,), or None.
        end: What the layer is to make of each row, of the shape of x_next, NaN in rows of which that is unknown, or
            None; see `PairChain`.
    """

    x_next: Tensor
    t: Tensor
    condition: Tensor | None = None
    index: Tensor | None = None
    end: Tensor | None = None


@torch.no_grad()
def draw_marginals(
    layers: ConditionalLayers,
    x: Tensor,
    generator: torch.Generator | None = None,
    condition: Tensor | None = None,
    hierarchy: int | None = None,
) -> list[Tensor]:
    """Runs chains from the base to the end.

    Args:
        layers: The sampler, with T layers, or of several hierarchies.
        x: Base draws x_T, shape (B, ...).
        generator: Source of the noise.
        condition: Condition of each chain.
        hierarchy: Place in `layers.depths` of the one to run; needed where there are several.

    Returns:
        [x_0, x_1, ..., x_T], each of shape (B, ...): x_t is a draw from the marginal q_t.

    Raises:
        ValueError: There are several hierarchies and none is chosen, or there is none of that place.
    """
    depths, marginals = layers.depths, [x]
    place = 0 if hierarchy is None and len(depths) == 1 else hierarchy
    if place is None or not 0 <= place < len(depths):
        raise ValueError(
            f"hierarchy={hierarchy}, but the layers serve {len(depths)}, of {depths} layers: give the place of one, "
            f"from 0 to {len(depths) - 1}"
        )
    last = sum(depths[:place])
    for t in reversed(range(last, last + depths[place])):
        q = layers(x, torch.full((len(x),), t, device=x.device), condition)
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
    """Runs chains from the base down to the inputs of the given layers.

    Args:
        layers: The sampler, with T layers.
        x: Base draws x_T, shape (B, ...).
        t: Layer whose input is wanted, shape (B,).
        noise: Draws for the outputs of layers 0..T-1, shape (T, B, ...); noise[s] makes x_s from x_{s+1}.
        condition: Condition of each chain.
        first: Layer that each chain starts with, shape (B,); T-1 by default.

    Returns:
        x_{t+1} for each row, shape (B, ...). A row with t = T-1 is x_T itself.
    """
    x, above = x.clone(), torch.full_like(t, len(noise) - 1) if first is None else first.clone()
    while len(rows := (above > t).nonzero().squeeze(1)):
        q = layers(x[rows], above[rows], None if condition is None else condition[rows])
        x[rows] = q.rsample(noise[above[rows], rows]).to(x.dtype)
        above[rows] -= 1
    return x


class Chain(ABC):
    """A source of layer inputs.

    With one layer all chains are alike: its inputs are fresh draws of the base.

    Args:
        sample_base: Draws x_T: (batch_size, generator) -> shape (batch_size, ...).
        num_layers: T; or a list, the T of each of several hierarchies.
        batch_size: B, rows of a batch.
        sample_condition: Draws a condition per chain, of shape (batch_size, ...); None for no condition.
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
        """Draws inputs of the layers.

        Args:
            layers: The sampler as it is now.
            generator: Source of t, the base draws and the noise.
            beta: Share of each layer in the loss, shape (T,): tells a chain for layer-by-layer training its layer. The
                others draw t uniformly over all layers.
        """

    def advance(self, batch: ChainBatch, q: DiagonalGaussian, generator: torch.Generator | None = None) -> None:
        """Takes back the layers' answer q_t(. | x_next) for a drawn batch; only a pool has use for it."""
        del batch, q, generator

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
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
    """Fresh chains for every batch: the paper's way. Costs up to T-1 network calls a batch."""

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws t uniformly for each row, of a hierarchy drawn before it, and simulates its chain."""
        del beta
        if self.num_layers == 1:
            return self._first_layer(generator)
        t = self._any_layer(generator)
        x_next, condition = self._simulate(layers, t, generator)
        return ChainBatch(x_next=x_next, t=t.to(x_next.device), condition=condition)


class DataChain(Chain):
    """Draws of the bridge at the level of the input: x_{t+1} ~ p_{t+1}, of the first layer x_T ~ base.

    That is data noised to tau_{t+1}, as in continuous semi-implicit models (arXiv 2506.06778). It costs no network call
    and keeps no state. A layer then sees the inputs that it would have if those before it were perfect, so what these
    do wrong it does not learn to mend.

    Args:
        sample_base: See `Chain`.
        num_layers: See `Chain`.
        batch_size: B.
        sample_condition: See `Chain`.
        sample_input: Draws x_{t+1}: (t, condition, generator) -> shape (B, ...), for layers t of shape (B,).
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
        """Draws t uniformly for each row, of a hierarchy drawn before it, and its input."""
        del layers, beta
        if self.num_layers == 1:
            return self._first_layer(generator)
        t = self._any_layer(generator)
        base, condition = self._base(self.batch_size, generator)
        t, is_first = t.to(base.device), (t == self.first[t]).to(base.device)
        data = self.sample_input(t, condition, generator)
        x_next = torch.where(is_first.reshape(-1, *[1] * (base.ndim - 1)), base, data)
        return ChainBatch(x_next=x_next, t=t, condition=condition)


class PairChain(Chain):
    """Pairs of a map from the base to the target: the input of a layer, and where its mean is to lead.

    The map, such as the teacher's ODE, is known by draws alone; `Regression` makes use of them.

    Args:
        sample_pairs: Draws (x_{t+1}, end, condition) for layers t: (t of shape (B,), generator) -> tensors of shape
            (B, ...), or None for no condition. Of a single layer that is (x_1, x_0).
        num_layers: T, see `Chain`.
        batch_size: B.
    """

    def __init__(self, sample_pairs: SamplePairs, num_layers: int | Sequence[int], batch_size: int) -> None:
        super().__init__(self._sample_base, num_layers, batch_size)
        self.sample_pairs = sample_pairs

    def _sample_base(self, size: int, generator: torch.Generator | None) -> Tensor:
        return self.sample_pairs(torch.full((size,), self.num_layers - 1), generator)[0]

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws t uniformly for each row, of a hierarchy drawn before it, and a pair."""
        del layers, beta
        alone = self.num_layers == 1
        t = torch.zeros(self.batch_size, dtype=torch.long) if alone else self._any_layer(generator)
        x_next, end, condition = self.sample_pairs(t, generator)
        return ChainBatch(x_next=x_next, t=t.to(x_next.device), condition=condition, end=end)


class GuidedChain(Chain):
    """Another chain, in which the inputs of the layers that take the base are those of pairs, for `Guided`.

    Args:
        chain: Where the rows come from; those below the first layer stay as they are.
        sample_pairs: See `PairChain`.
    """

    def __init__(self, chain: Chain, sample_pairs: SamplePairs) -> None:
        super().__init__(chain.sample_base, chain.depths, chain.batch_size, chain.sample_condition)
        self.chain = chain
        self.sample_pairs = sample_pairs

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws a batch of the chain, and a pair in the place of each base draw; `end` is NaN in the other rows.

        Raises:
            ValueError: The pairs have conditions and the chain has none, or the reverse.
        """
        batch = self.chain.draw(layers, generator, beta)
        first = self.first.to(batch.t.device)[batch.t]
        x_next, end, condition = self.sample_pairs(first.cpu(), generator)
        starts = batch.t == first
        rows = starts.reshape(-1, *[1] * (end.ndim - 1))
        if (condition is None) != (batch.condition is None):
            raise ValueError(
                f"the pairs have {'no' if condition is None else 'a'} condition and the chain has "
                f"{'no' if batch.condition is None else 'a'} condition: give both one, or neither"
            )
        if condition is not None and batch.condition is not None:
            condition = torch.where(starts.reshape(-1, *[1] * (condition.ndim - 1)), condition, batch.condition)
        x_next, end = torch.where(rows, x_next, batch.x_next), torch.where(rows, end, torch.nan)
        return replace(batch, x_next=x_next, condition=condition, end=end)

    def advance(self, batch: ChainBatch, q: DiagonalGaussian, generator: torch.Generator | None = None) -> None:
        """See `Chain`."""
        self.chain.advance(batch, q, generator)

    def state_dict(self) -> dict[str, Tensor]:
        """That of the chain."""
        return self.chain.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """That of the chain."""
        self.chain.load_state_dict(state)


class PoolChain(Chain):
    """B T live chains at staggered depths; a batch is B of them, and `advance` moves those down by one layer.

    With several hierarchies T is the largest, and a chain stays in its own.

    A chain that has left the last layer starts again from the base. A state is as old as the B T / B = T steps since
    it was made, on average, so it is nearly, not exactly, a draw from today's sampler.

    Args:
        sample_base: See `Chain`.
        num_layers: T, see `Chain`.
        batch_size: B.
        sample_condition: See `Chain`.
        cohorts: A batch is B chains that go down together, all of them at the same layer: what the lower bound needs,
            whose K extra draws are the other rows of the batch at that layer.

    Raises:
        ValueError: Cohorts of several hierarchies.
    """

    x_next: Tensor | None = None
    t: Tensor
    condition: Tensor | None = None

    def __init__(
        self,
        sample_base: SampleBase,
        num_layers: int | Sequence[int],
        batch_size: int,
        sample_condition: SampleBase | None = None,
        cohorts: bool = False,
    ) -> None:
        super().__init__(sample_base, num_layers, batch_size, sample_condition)
        self.cohorts = cohorts
        self.size = batch_size * max(self.depths)
        if cohorts and len(self.depths) > 1:
            raise ValueError(f"cohorts go down one hierarchy, and there are {len(self.depths)}: give one num_layers")

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws B chains of the pool without replacement; the first call fills the pool."""
        del beta
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
        """Writes x_t ~ q_t(. | x_next) in the place of x_next, or a new base draw where the chain has ended."""
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
            self.condition[batch.index] = batch.condition  # of a guided row it is that of the pair
            self.condition[batch.index[done]] = condition[done]

    def _staggered(self) -> Tensor:
        """Layers of the chains at the start: the hierarchies take turns, each from its last layer up."""
        chain = torch.arange(self.size)
        return self._in_hierarchy(chain % len(self.depths), chain // len(self.depths))

    def _rows(self, generator: torch.Generator | None) -> Tensor:
        if self.cohorts:  # every T-th chain started at the same layer
            first = int(torch.randint(self.num_layers, (), generator=generator))
            return torch.arange(first, self.size, self.num_layers)
        return torch.randperm(self.size, generator=generator)[: self.batch_size]

    def state_dict(self) -> dict[str, Tensor]:
        """The states, depths and conditions of all chains; empty before the first draw."""
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


class FrozenPoolChain(Chain):
    """For layer-by-layer training: many draws of x_{t+1} from layers that have learnt and move no more.

    When the curriculum goes on to the next layer, the whole pool is moved down by the layer that has just been trained.

    Args:
        sample_base: See `Chain`.
        num_layers: T, of one hierarchy.
        batch_size: B.
        sample_condition: See `Chain`.
        num_states: Draws of x_{t+1} that are kept; batches are drawn from them with replacement. For t = T-1 the base
            is drawn afresh every time.
    """

    def __init__(
        self,
        sample_base: SampleBase,
        num_layers: int,
        batch_size: int,
        sample_condition: SampleBase | None = None,
        num_states: int = 60_000,
    ) -> None:
        super().__init__(sample_base, num_layers, batch_size, sample_condition)
        self.num_states = num_states
        self.x_next: Tensor | None = None
        self.condition: Tensor | None = None
        self.t = num_layers - 1

    def draw(
        self, layers: ConditionalLayers, generator: torch.Generator | None = None, beta: Tensor | None = None
    ) -> ChainBatch:
        """Draws rows of the pool of the one layer that learns.

        Raises:
            ValueError: Not one layer learns, or one above a layer that was trained before.
        """
        t = self._learning(beta)
        if t == self.num_layers - 1:
            return self._first_layer(generator)
        self._move_down(layers, t, generator)
        if self.x_next is None:
            raise AssertionError("the pool is filled on the way down")
        index = torch.randint(self.num_states, (self.batch_size,), generator=generator).to(self.x_next.device)
        x_next, condition = self.x_next[index], None if self.condition is None else self.condition[index]
        return ChainBatch(x_next, torch.full((len(x_next),), t, device=x_next.device), condition)

    def _learning(self, beta: Tensor | None) -> int:
        learning = [] if beta is None else beta.nonzero().flatten().tolist()
        if len(learning) != 1 or learning[0] > self.t:
            raise ValueError(
                f"layers {learning} are to learn, the pool is at layer {self.t}: a FrozenPoolChain trains one layer "
                "after the other, from the base down; use it with `sequential`, or take a SimulatedChain"
            )
        return int(learning[0])

    @torch.no_grad()
    def _move_down(self, layers: ConditionalLayers, t: int, generator: torch.Generator | None) -> None:
        if self.x_next is None:
            self.x_next, self.condition = self._base(self.num_states, generator)
        for above in range(self.t, t, -1):
            noise = randn_like(self.x_next, generator)
            q = layers(self.x_next, torch.full((self.num_states,), above, device=noise.device), self.condition)
            self.x_next = q.rsample(noise).to(noise.dtype)
        self.t = t

    def state_dict(self) -> dict[str, Tensor]:
        """The pool and its layer; empty while the first layer learns."""
        if self.x_next is None:
            return {}
        state = {"x_next": self.x_next, "t": torch.tensor(self.t)}
        return state if self.condition is None else {**state, "condition": self.condition}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the pool, on the device that the base is drawn on."""
        self.x_next, self.condition, self.t = None, None, self.num_layers - 1
        if not state:
            return
        device = self.sample_base(1, None).device
        self.x_next, self.t = state["x_next"].to(device), int(state["t"])
        self.condition = state["condition"].to(device) if "condition" in state else None


def make_chain(
    source: Literal["pool", "simulate", "data"],
    sample_base: SampleBase,
    num_layers: int | Sequence[int],
    batch_size: int,
    sample_condition: SampleBase | None = None,
    sample_input: SampleInput | None = None,
) -> Chain:
    """Returns the chain of that name, see `PoolChain`, `SimulatedChain` and `DataChain`.

    Raises:
        ValueError: The name is unknown, or "data" without `sample_input`.
    """
    if source == "data":
        if sample_input is None:
            raise ValueError("source='data' needs sample_input, which draws the inputs of the layers")
        return DataChain(sample_base, num_layers, batch_size, sample_condition, sample_input=sample_input)
    kinds: dict[str, type[Chain]] = {"pool": PoolChain, "simulate": SimulatedChain}
    if source not in kinds:
        raise ValueError(f"source={source!r} is unknown: choose 'pool', 'simulate' or 'data'")
    return kinds[source](sample_base, num_layers, batch_size, sample_condition)
