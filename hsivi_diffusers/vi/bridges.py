"""What the layers are fitted to: a bridge {p_t}, t = 0..T-1, from an easy p_{T-1} to the target p_0 (sec. 3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .distributions import DiagonalGaussian


class Bridge(ABC):
    """A family of densities p_level, of which layer t is fitted to the one at `level(t)`.

    Levels are positions on the bridge's own clock. For a bridge with one density per layer the level is t itself (the
    default); for a diffusion bridge it is a timestep, and the family is richer than the T densities of the grid.

    Attributes:
        num_layers: T, the number of layers.
    """

    num_layers: int

    @abstractmethod
    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the bridge score, grad_x log p_level(x).

        Args:
            x: Shape (B, ...).
            level: Shape (B,).
            condition: Opaque to the core; passed on by layers, bridge and critic alike.
        """

    @abstractmethod
    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_T, the input of the first layer: shape (batch_size, ...)."""

    def level(self, t: Tensor) -> Tensor:
        """Returns the level of p_t on the bridge's clock, shape (B,); here t itself."""
        return t

    def sample_level(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws levels at which layers t are scored, of the shape of t, for `scoring="random"`.

        Raises:
            NotImplementedError: This bridge has only the T levels of its layers.
        """
        raise NotImplementedError(f'{type(self).__name__} has no random levels: use scoring="own"')

    def renoise(self, q: DiagonalGaussian, t: Tensor, level: Tensor) -> DiagonalGaussian:
        """Moves the law of x_t given x_{t+1} along the bridge to another level, for `scoring="random"`.

        Args:
            q: Law of layer t, q_t(. | x_{t+1}).
            t: Layer indices, shape (B,).
            level: Where to, shape (B,), of those that `sample_level` draws.

        Raises:
            NotImplementedError: This bridge has only the T levels of its layers.
        """
        raise NotImplementedError(f'{type(self).__name__} cannot re-noise a layer: use scoring="own"')
