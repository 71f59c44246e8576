"""Targets in coordinates in which they look like N(0, I): by Laplace's approximation, or by the moments of draws."""

from __future__ import annotations

import torch
from torch import Tensor

from hsivi_diffusers.vi import Target
from hsivi_diffusers.vi.distributions import randn_like


class FullNormal:
    """N(mean, L L^T): mean of shape (d,) and L, `scale`, lower triangular with a positive diagonal, shape (d, d)."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.mean, self.scale = mean, scale

    def whiten(self, x: Tensor) -> Tensor:
        """Returns z = L^{-1} (x - mean), shape (B, d)."""
        return torch.linalg.solve_triangular(self.scale.to(x), (x - self.mean.to(x)).T, upper=False).T

    def unwhiten(self, z: Tensor) -> Tensor:
        """Returns x = mean + L z, shape (B, d)."""
        return self.mean.to(z) + z @ self.scale.to(z).T

    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Returns draws in torch's default precision, shape (size, d)."""
        return self.unwhiten(randn_like(torch.empty(size, len(self.mean), device=self.mean.device), generator))


def laplace(target: Target) -> FullNormal:
    """Fits Laplace's approximation, in double precision: mode, and inverse of the negative Hessian of log p there.

    The mode is found from 0 by L-BFGS, on the log-density or, without one, on the score.

    Raises:
        ValueError: No mode was found: the score is not 0 there, or the density is not log-concave there; or the target
            cannot be evaluated in double precision.
    """
    x = _ascend(target, torch.zeros(target.dimension, dtype=torch.float64))
    for _ in range(2):  # Newton's method, for the last digits
        hessian = torch.autograd.functional.jacobian(lambda x: target.score(x[None])[0], x)
        precision = -(hessian + hessian.T) / 2
        factor, failed = torch.linalg.cholesky_ex(precision)
        score = target.score(x[None])[0]
        step = torch.cholesky_solve(score[:, None], factor)[:, 0]
        if failed or not step.abs().max() < 1e-2 * precision.diagonal().rsqrt().max():
            raise ValueError(
                f"no mode was found (largest slope {float(score.abs().max()):.2g}): a target without a single smooth "
                "mode has no Laplace approximation; use moment_match(draws of a rough fit)"
            )
        x = x + step
    covariance = torch.cholesky_inverse(factor)
    return FullNormal(mean=x, scale=torch.linalg.cholesky(covariance))


def _ascend(target: Target, x: Tensor) -> Tensor:
    """L-BFGS with the score for gradient; the line search sees log p, or without one takes plain steps."""
    x.requires_grad_(True)
    has_density = type(target).log_prob is not Target.log_prob
    search = "strong_wolfe" if has_density else None
    rate = 1.0 if has_density else 0.5
    optimizer = torch.optim.LBFGS(
        [x], lr=rate, max_iter=500, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn=search
    )

    def closure() -> Tensor:
        with torch.no_grad():
            x.grad = -target.score(x[None])[0]
            return -target.log_prob(x[None])[0] if has_density else x.grad.square().sum()

    try:
        optimizer.step(closure)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise ValueError(
            f"Laplace's approximation is found in double precision, which the target did not take ({error}): convert "
            "its constants to that of x, as in features.to(x)"
        ) from error
    return x.detach()


class Whitened(Target):
    """A target in the coordinates z of x = mean + L z of an approximation, by default `laplace(target)`.

    Its log-density is log p(mean + L z) + log det L, its score L^T S(mean + L z). Fit the layers to it, and bring their
    draws back with `unwhiten`.
    """

    def __init__(self, target: Target, approximation: FullNormal | None = None) -> None:
        self.target = target
        self.approximation = laplace(target) if approximation is None else approximation
        self.dimension = target.dimension

    def unwhiten(self, z: Tensor) -> Tensor:
        """Returns x = mean + L z, shape (B, d)."""
        return self.approximation.unwhiten(z)

    def log_prob(self, x: Tensor) -> Tensor:
        log_volume = float(self.approximation.scale.diagonal().log().sum())
        return self.target.log_prob(self.unwhiten(x)) + log_volume

    def score(self, x: Tensor) -> Tensor:
        return self.target.score(self.unwhiten(x)) @ self.approximation.scale.to(x)


def moment_match(draws: Tensor) -> FullNormal:
    """Returns the Gaussian with the mean and the covariance of draws of a rough fit, shape (N, d).

    Raises:
        ValueError: The draws have no positive definite covariance.
    """
    draws = draws.double()
    covariance = torch.cov(draws.T).reshape(draws.shape[1], draws.shape[1])
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or len(draws) <= draws.shape[1]:
        raise ValueError(
            f"{len(draws)} draws of {draws.shape[1]} coordinates have no positive definite covariance: give more "
            "draws, of a sampler that has not collapsed"
        )
    return FullNormal(mean=draws.mean(0), scale=factor)
