"""The sampler: T conditional layers q_t(x_t | x_{t+1}; phi), t = T-1, ..., 0 (sec. 3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .distributions import DiagonalGaussian


class ConditionalLayers(nn.Module, ABC):
    """All T = `num_layers` layers of a hierarchy, each a Gaussian given the state above it."""

    num_layers: int

    @abstractmethod
    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        """Returns q_t(. | x_next), for inputs x_{t+1} of shape (B, ...) and layers t of shape (B,), 0 the data side.

        The condition, such as class labels of shape (B,), is passed on as it is.
        """


def hierarchy_ends(depths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the first layer of each hierarchy, which takes the base, and the last, t = 0 of a single one."""
    sizes = torch.tensor(depths)
    ends = sizes.cumsum(0)
    return ends - 1, ends - sizes


class IndependentLayers(ConditionalLayers):
    """A network x_next -> `DiagonalGaussian` for each layer, from the data side up: for sequential training.

    Raises:
        ValueError: There is no network, or `forward` gets a condition.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("networks=[]: give a network for each of the T layers, at least one")
        self.networks = nn.ModuleList(networks)
        self.num_layers = len(networks)

    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        _refuse_condition(condition)
        present = t.unique().tolist()
        if len(present) == 1:
            q: DiagonalGaussian = self.networks[present[0]](x_next)
            return q
        rows = [(t == layer).nonzero().squeeze(1) for layer in present]
        answers = [self.networks[layer](x_next[of]) for layer, of in zip(present, rows, strict=True)]
        place = torch.cat(rows).argsort()
        mean = torch.cat([q.mean for q in answers])[place]
        std = torch.cat([q.std.expand_as(q.mean) for q in answers])[place]
        return DiagonalGaussian(mean=mean, std=std)


class SharedLayers(ConditionalLayers):
    """One network (x_next, t) -> `DiagonalGaussian` for all layers: for joint training.

    Raises:
        ValueError: `forward` gets a condition.
    """

    def __init__(self, network: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.network = network
        self.num_layers = num_layers

    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        _refuse_condition(condition)
        q: DiagonalGaussian = self.network(x_next, t)
        return q


def _refuse_condition(condition: Tensor | None) -> None:
    if condition is not None:
        raise ValueError("these layers take no condition: write a ConditionalLayers of your own that does")
