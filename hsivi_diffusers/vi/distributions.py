"""The conditional law of one layer: N(mean, std^2), independent over coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    r"""A batch of Gaussians with diagonal covariance, N(mean, diag(std^2)).

    Attributes:
        mean: Shape (B, ...).
        std: Standard deviation, > 0, any shape that broadcasts against `mean`.
    """

    mean: Tensor
    std: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """Returns x = mean + std * noise, differentiable in both parameters.

        Args:
            noise: Standard Gaussian draw of the shape of `mean`.
        """
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log N(x; mean, std^2), summed over all but the first dimension: shape (B,)."""
        z = (x - self.mean) / self.std
        log_density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(1).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """Returns grad_x log N(x; mean, std^2) = -(x - mean) / std^2, of the shape of `x`."""
        return -(x - self.mean) / self.std.square()

    def detach(self) -> DiagonalGaussian:
        """The same law, cut from the graph of its parameters."""
        return DiagonalGaussian(self.mean.detach(), self.std.detach())


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gaussian draw like `x`, made on the generator's device: one seed, one draw, on every device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
