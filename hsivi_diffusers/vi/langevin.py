"""Langevin chains in a score: where a density has its mass, and whether draws keep their law."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .distributions import randn_like


def precision_root(score: Tensor, base: Tensor) -> Tensor:
    """Returns a Cholesky root of cov(S), the mean precision of the modes, shrunk a little towards its diagonal.

    S at draws has the shape (N, d); the spread of draws of the base, shape (M, d), bounds the precision from below.

    Raises:
        ValueError: The squares of the score overflow.
    """
    dimension = score.shape[1]
    precision = torch.cov(score.double().T).reshape(dimension, dimension)
    shrinkage = dimension / (dimension + len(score))
    floor = 1e-2 / base.double().var(0).clamp_min(torch.finfo(base.dtype).eps)
    diagonal = shrinkage * precision.diagonal() + floor
    root, failed = torch.linalg.cholesky_ex((1 - shrinkage) * precision + diagonal.diag())
    if failed:
        raise ValueError(
            "the target's score is too large at draws of x_0 to be squared: the sampler diverged, train again"
        )
    return root.to(score.dtype)


def langevin(
    score: Callable[[Tensor], Tensor],
    u: Tensor,
    num_steps: int,
    generator: torch.Generator | None = None,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs Metropolis-adjusted Langevin chains in a score g, u of shape (N, d) -> grad log p(u), from the starts u.

    The score is all that is known: log p(u') - log p(u) is Simpson's rule along the line, (u' - u) . (g + 4 g_m + g')
    / 6 with g_m in the middle, exact where log p is a polynomial of degree four. With the step h the logarithm of the
    acceptance ratio is 2/3 (u' - u) . (g_m - (g + g') / 2) + h (|g|^2 - |g'|^2) / 8. A step calls the score twice.
    Where the score is not finite a chain never goes, and one that starts there stays, with a NaN of Stein's identity.
    Chains that go on `together` have one step size, fixed after the first half, so that draws of p stay draws of p; by
    default each has its own.

    Returns:
        The ends, shape (N, d), and for each chain and coordinate -cov(u, g) over its second half, shape (N, d): by
        Stein's identity 1 for a chain that has mixed; less for one that is still on its way, or stuck.
    """
    longest = 2 * math.log(max(1.0, 0.1 * float(u.square().mean().sqrt())))
    log_step = u.new_full((len(u),), math.log(0.1))
    g = score(u)
    sum_u, sum_g, sum_ug = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u)
    kept = num_steps - num_steps // 2
    for index in range(num_steps):
        step = log_step.exp()
        move = 0.5 * step[:, None] * g + step.sqrt()[:, None] * randn_like(u, generator)
        move = torch.where(move.isfinite().all(1, keepdim=True), move, 0)
        middle, ahead = score(u + 0.5 * move), score(u + move)
        log_ratio = (move * (2 * middle - g - ahead)).sum(1) / 3
        log_ratio += step / 8 * (g.square().sum(1) - ahead.square().sum(1))
        rate = log_ratio.exp().nan_to_num(0).clamp(max=1)
        accept = (_uniform_like(rate, generator) < rate)[:, None]
        u, g = torch.where(accept, u + move, u), torch.where(accept, ahead, g)
        if not together or index < num_steps - kept:
            log_step = (log_step + 0.2 * ((rate.mean() if together else rate) - 0.57)).clamp(max=longest)
        if index >= num_steps - kept:
            sum_u, sum_g, sum_ug = sum_u + u, sum_g + g, sum_ug + u * g
    return u, (sum_u * sum_g / kept - sum_ug) / kept


def _uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
