r"""The density of a sampler, and what its importance weights p / q say.

    log q(x) ~ log 1/K sum_k q_0(x | x_1^(k)),   x_1^(k) ~ q_1 by chains from the base

The mean over k is unbiased for q(x), so by Jensen's inequality its logarithm is too low on average:
E[log q_K(x)] <= log q(x), with equality as K grows; and weights p / q_K are too large on average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bridges import Bridge
from .chains import draw_marginals
from .layers import ConditionalLayers

FEWEST = 25  # weights of `pareto_k`
ROWS = 256  # of x at a time, each against all inputs


@torch.no_grad()
def log_density(
    layers: ConditionalLayers, bridge: Bridge, x: Tensor, num_inputs: int, generator: torch.Generator | None = None
) -> Tensor:
    """Estimates log q(x) of a sampler, a lower bound in expectation, at x of shape (N, d).

    The gap is about Var(q_0(x | x_1)) / (2 K q(x)^2), with K = `num_inputs`: it is large where layer 0 is narrow
    against the spread of its inputs, and in many dimensions. It costs K chains and an N x K matrix.

    Args:
        layers: The sampler.
        bridge: Where its chains begin.
        x: Where the density is asked for; not drawn from the same inputs, which would make it too high.
        num_inputs: K >= 1.
        generator: Source of the inputs.

    Returns:
        log q_K(x), shape (N,); exact if layer 0 ignores its input.

    Raises:
        ValueError: x has another shape, or num_inputs < 1.
    """
    if num_inputs < 1:
        raise ValueError(f"num_inputs={num_inputs}: give 1 input of the last layer or more")
    x_next = draw_marginals(layers, bridge.sample_base(num_inputs, generator), generator)[1]
    shape = tuple(x_next.shape[1:])
    if not isinstance(x, Tensor) or x.shape[1:] != shape:
        given = f"the shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"the type {type(x).__name__}"
        raise ValueError(f"x has {given}: give draws of shape (N, {', '.join(map(str, shape))}), a tensor")
    q = layers(x_next, torch.zeros(num_inputs, dtype=torch.long, device=x_next.device))
    rows = [q.pairwise_log_prob(each).logsumexp(1) for each in x.split(ROWS)]
    return torch.cat(rows) - math.log(num_inputs)


def effective_sample_size(log_weights: Tensor) -> float:
    """Returns (sum w)^2 / sum w^2, from 1 to N, of importance weights w = p / q given by log w + constant, shape (N,).

    It is N if all weights are equal. It misses what no draw has reached: see `pareto_k`.
    """
    return float(1 / log_weights.double().softmax(0).square().sum())


def pareto_k(log_weights: Tensor) -> float:
    """Returns k-hat, the shape of a generalised Pareto law of the largest importance weights.

    Weights have 1 / k finite moments. Below 0.7 the estimates they give can be trusted, and q is near p; above 1 they
    have no mean, as q misses a tail or a mode of p. The law is fitted to the 3 sqrt(N) largest weights, or N / 5 if
    these are fewer, by the method of Zhang & Stephens (2009), with a weak prior at 0.5.

    Source: Vehtari et al., Pareto smoothed importance sampling, JMLR 2024 (arXiv 1507.02646).

    Args:
        log_weights: log w + constant of independent draws, shape (N,), N >= 25.

    Returns:
        k-hat; infinite if a weight is NaN or infinite, or all are 0.

    Raises:
        ValueError: There are fewer than 25 weights.
    """
    size = len(log_weights)
    if size < FEWEST:
        raise ValueError(f"{size} weights have no tail to look at: give {FEWEST} or more")
    if not log_weights.max().isfinite():
        return math.inf
    weights = (log_weights.double() - log_weights.max()).exp().sort().values
    tail = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    excess = weights[-tail:] - weights[-tail - 1]
    return _pareto_shape(excess[excess > 0])


def _pareto_shape(excess: Tensor) -> float:
    """The posterior mean of the shape k of a generalised Pareto law, of sorted draws > 0.

    Of hardly any it is infinite, and of none, where all weights are equal, -inf.

    With theta = -k / sigma the profile likelihood is known, k(theta) = mean log(1 - theta x); theta is averaged over
    a grid (Zhang & Stephens 2009), and k drawn towards 0.5 as by ten more draws.
    """
    size = len(excess)
    if size < 5:
        return math.inf if size else -math.inf
    points = 30 + math.isqrt(size)
    grid = 1 - (points / (torch.arange(points, dtype=torch.float64, device=excess.device) + 0.5)).sqrt()
    theta = 1 / excess[-1] + grid / (3 * excess[int(size / 4 + 0.5) - 1])
    k = (-theta[:, None] * excess).log1p().mean(1)
    log_likelihood = size * ((-theta / k).log() - k - 1)
    theta_mean = (log_likelihood.softmax(0) * theta).sum()
    shape = float((-theta_mean * excess).log1p().mean())
    return (size * shape + 10 * 0.5) / (size + 10)
