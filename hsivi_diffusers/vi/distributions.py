"""The conditional law of one layer: N(mean, std^2), independent over coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """Gaussians N(mean, diag(std^2)): mean of shape (B, ...), std > 0 of any shape that broadcasts against it."""

    mean: Tensor
    std: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """Returns x = mean + std * noise, differentiable in both; noise is standard normal, of the shape of `mean`."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log N(x; mean, std^2), summed over all but the first dimension: shape (B,)."""
        z = (x - self.mean) / self.std
        log_density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(1).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """Returns grad_x log N(x; mean, std^2) = -(x - mean) / std^2, of the shape of `x`."""
        return -(x - self.mean) / self.std.square()

    def pairwise_log_prob(self, x: Tensor) -> Tensor:
        """Returns log N(x_i; mean_j, std_j^2) for each row i of x, shape (N, ...), and each Gaussian j: shape (N, B).

        By matrix products in double precision, since terms cancel where the std is small.
        """
        centre = self.mean.detach().mean(0, keepdim=True)
        dtype = x.dtype
        x, mean = (x - centre).flatten(1).double(), (self.mean - centre).flatten(1).double()
        std = self.std.expand_as(self.mean).flatten(1).double()
        precision = std.square().reciprocal()
        squares = x.square() @ precision.T - 2 * x @ (mean * precision).T + (mean.square() * precision).sum(1)
        log_density = -0.5 * squares - std.log().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return log_density.to(dtype)

    def diffuse(self, alpha_t: Tensor, sigma_t: Tensor, alpha: Tensor, sigma: Tensor) -> DiagonalGaussian:
        """Returns the law after diffusion from the noise level (alpha_t, sigma_t) up to (alpha, sigma).

        With r = alpha / alpha_t, x is taken to r x + sqrt(sigma^2 - r^2 sigma_t^2) z, z ~ N(0, I), the step that takes
        data diffused to the one level to the other; so the law is N(r mean, r^2 std^2 + sigma^2 - r^2 sigma_t^2).
        All four are of shapes that broadcast against `mean`, and sigma >= r sigma_t.
        """
        ratio = alpha / alpha_t
        variance = (ratio * self.std).square() + sigma.square() - (ratio * sigma_t).square()
        return DiagonalGaussian(mean=ratio * self.mean, std=variance.sqrt())

    def detach(self) -> DiagonalGaussian:
        """Returns the same law without gradients to its parameters."""
        return DiagonalGaussian(self.mean.detach(), self.std.detach())


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns standard normal noise like `x`, drawn on the generator's device, so that a seed fixes the draw."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
