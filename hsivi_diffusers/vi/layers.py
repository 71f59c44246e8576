"""The sampler: T conditional layers q_t(x_t | x_{t+1}; phi), t = T-1, ..., 0 (sec. 3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from .distributions import DiagonalGaussian


class ConditionalLayers(nn.Module, ABC):
    """All layers of a hierarchy, each a reparameterisable Gaussian given the state above it.

    Attributes:
        num_layers: T, the number of layers.
    """

    num_layers: int

    @abstractmethod
    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        """Returns q_t(. | x_next).

        Args:
            x_next: Input of the layer, x_{t+1}, shape (B, ...).
            t: Layer index of each row, shape (B,), values 0 (the data side) .. T-1.
            condition: Opaque to the core, such as class labels of shape (B,).
        """
