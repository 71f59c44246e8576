r"""Signs of failure that show without a reference posterior: in the sampler, its critic and the score S of the target.

    variance collapse  std of layer t << sd of its outputs
    wrong spread       E_q[-(x_k - E x_k) S_k(x)] is not near 1, which by Stein's identity it is where q = p
    critic lag         E_q[s . (s - grad log q(x | x_next))] or d + E_q[(x - E x) . s] is not 0; both are if s is right
    lost modes         Langevin chains in S, from a wide start, that settle where the sampler never goes

The target is p at the level of layer 0, so the bridge is all that is needed of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bridges import Bridge
from .chains import draw_marginals
from .distributions import randn_like
from .layers import ConditionalLayers
from .objectives import Critic

STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class Finding:
    """A sign of failure.

    Attributes:
        signature: "variance_collapse", "under_dispersed", "over_dispersed", "critic_lag" or "lost_modes".
        layer: Layer t that shows it.
        value: What was measured.
        threshold: What it was held against.
        message: What was seen, and the remedy.
    """

    signature: str
    layer: int
    value: float
    threshold: float
    message: str


def diagnose(
    layers: ConditionalLayers,
    bridge: Bridge,
    *,
    critic: Critic | None = None,
    critic_layers: Sequence[int] | None = None,
    num_draws: int = 2000,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Looks for all signs of failure.

    Args:
        layers: The sampler, one that takes no condition.
        bridge: What it was fitted to; its score at the level of layer 0 is the target's.
        critic: For signs of a lag, if there is one.
        critic_layers: See `critic_lag`.
        num_draws: N, draws of the sampler.
        generator: Source of all draws.

    Returns:
        What was found, by layer where it concerns one; empty if all is well as far as can be seen.

    Raises:
        ValueError: A draw is not finite.
    """
    found = variance_collapse(layers, bridge, num_draws=num_draws, generator=generator)
    if critic is not None:
        found += critic_lag(layers, bridge, critic, critic_layers, num_draws=num_draws, generator=generator)
    return found + lost_modes(layers, bridge, num_draws=num_draws, generator=generator)


@torch.no_grad()
def variance_collapse(
    layers: ConditionalLayers,
    bridge: Bridge,
    *,
    num_draws: int = 2000,
    std_ratio: float = 1e-2,
    stein: float = 0.8,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Finds layers that have become deterministic, and coordinates that are narrower than the target's.

    Args:
        layers: The sampler.
        bridge: What it was fitted to.
        num_draws: N.
        std_ratio: A layer is collapsed in a coordinate if mean std < std_ratio * sd(x_t), and if mean std is less than
            a tenth of 1 / rms(S_t), the width that p_t has there.
        stein: The sampler is under-dispersed in a coordinate if `stein_ratio` is below this, and below 1 by more than
            (9 + 2 log d)^(1/2) standard errors; over-dispersed if it is as far above 1, beyond 1 / stein.
        generator: Source of the draws.

    Returns:
        At most one "variance_collapse" a layer, one "under_dispersed" and one "over_dispersed"; each with the worst
        coordinate's value.
    """
    found = []
    marginals = _draw(layers, bridge, num_draws, generator)
    for t in reversed(range(layers.num_layers)):
        std = layers(marginals[t + 1], _fill(t, marginals[t])).std.expand_as(marginals[t]).flatten(1)
        spread = marginals[t].flatten(1).std(0)
        ratio = std.mean(0) / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        score = _score(bridge, marginals[t], t)
        local = std.mean(0) * score.flatten(1).square().mean(0).sqrt()
        ratio = ratio.masked_fill(local > 0.1, math.inf)  # as narrow as p_t itself is, there
        narrow = int((ratio < std_ratio).sum())
        if narrow:
            message = (
                f"layer {t} is deterministic in {narrow} of {len(ratio)} coordinates: in coordinate "
                f"{int(ratio.argmin())} its std is {float(ratio.min()):.2g} of the spread of its outputs. Start from a "
                "larger std, lower the layers' learning rate, or train by LowerBound or KullbackLeibler in the place "
                "of ScoreMatching"
            )
            found.append(Finding("variance_collapse", t, float(ratio.min()), std_ratio, message))
    return found + _wrong_spread(marginals[0], score, stein)  # the score of the last layer, t = 0


def _wrong_spread(x: Tensor, score: Tensor, stein: float) -> list[Finding]:
    """At most one "under_dispersed" and one "over_dispersed", by `stein_ratio`."""
    found = []
    ratio, error = stein_ratio(x, score)
    errors = math.sqrt(STANDARD_ERRORS**2 + 2 * math.log(len(ratio)))  # the least of d ratios strays farther than one
    narrow = (ratio < stein) & (ratio + errors * error < 1)
    wide = (ratio > 1 / stein) & (ratio - errors * error > 1)
    if bool(narrow.any()):
        least = ratio.masked_fill(~narrow, math.inf)
        message = (
            f"x_0 is narrower than the target in {int(narrow.sum())} of {len(ratio)} coordinates: in coordinate "
            f"{int(least.argmin())} the Stein ratio E[-(x - E x) S(x)] is {float(least.min()):.2g} where the target "
            "has 1. Train longer, with a larger std at the start, or by LowerBound or KullbackLeibler in the place of "
            "ScoreMatching"
        )
        found.append(Finding("under_dispersed", 0, float(least.min()), stein, message))
    if bool(wide.any()):
        most = ratio.masked_fill(~wide, -math.inf)
        message = (
            f"x_0 is wider than the target in {int(wide.sum())} of {len(ratio)} coordinates, or in a thin direction: "
            f"in coordinate {int(most.argmax())} the Stein ratio E[-(x - E x) S(x)] is {float(most.max()):.3g} where "
            "the target has 1. Train longer; if the target is stiff, fit Whitened(target, moment_match(draws)), and "
            "that again"
        )
        found.append(Finding("over_dispersed", 0, float(most.max()), 1 / stein, message))
    return found


def stein_ratio(x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns E_q[-(x_k - E x_k) S_k(x)] for each coordinate k, and its standard error, both of shape (d,).

    Stein's identity makes it 1 where q = p; below 1 q is too narrow, above too wide. For Gaussians it is the k-th
    diagonal entry of cov_q cov_p^-1, so var_q / var_p if p has independent coordinates. It does not see the weights of
    modes, and where p is thin, along a curve or a ridge, it speaks of the thin direction.

    Args:
        x: Draws from q, shape (N, ...).
        score: Score of p at x, of the shape of x.
    """
    x, score = x.flatten(1), score.flatten(1)
    return _mean_and_error(-(x - x.mean(0)) * score)


@torch.no_grad()
def critic_lag(
    layers: ConditionalLayers,
    bridge: Bridge,
    critic: Critic,
    only: Sequence[int] | None = None,
    *,
    num_draws: int = 2000,
    threshold: float = 0.15,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    r"""Finds layers whose marginal the critic does not follow.

    The critic's loss is least over all multiples of s where E[s . (s - grad log q(x | x_next))] = 0, and the true score
    has E[(x - E x) . s] = -d besides. So a critic that lags is seen, whatever its network; one that is trained to the
    end and too small for the score may pass.

    Args:
        layers: The sampler.
        bridge: Tells the levels.
        critic: (x, level, condition, t) -> estimate of the marginal score.
        only: Layers t to look at, all by default. After layer-by-layer training the critic knows the last of them
            alone: give [0].
        num_draws: N; each is scored at mean + std z and mean - std z, which takes most of the noise off.
        threshold: Of |E[s . (s - grad log q)]| / E|s|^2 and of |1 + E[(x - E x) . s] / d|; either counts only if it is
            three standard errors from 0, too.
        generator: Source of the draws.

    Returns:
        At most one "critic_lag" a layer.
    """
    found = []
    marginals = _draw(layers, bridge, num_draws, generator)
    for t in reversed(range(layers.num_layers)) if only is None else only:
        signs = _critic_signs(layers, bridge, critic, marginals[t + 1], t, generator)
        seen = [abs(value) for value, error in signs if abs(value) > max(threshold, STANDARD_ERRORS * error)]
        if seen:
            by_score, by_place = (f"{value:.2g} +- {error:.1g}" for value, error in signs)
            message = (
                f"the critic lags behind layer {t}: E[s . (s - grad log q)] / E|s|^2 is {by_score} and "
                f"1 + E[(x - E x) . s] / d is {by_place}, where both should be 0. Give the critic more updates for "
                "each layer update or a higher learning rate, or the layers a lower one"
            )
            found.append(Finding("critic_lag", t, max(seen), threshold, message))
    return found


@torch.no_grad()
def lost_modes(
    layers: ConditionalLayers,
    bridge: Bridge,
    *,
    num_draws: int = 2000,
    num_probes: int = 500,
    num_steps: int = 300,
    inflation: float = 3.0,
    share: float = 0.01,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Finds places of high target density where the sampler never goes.

    Probes start from the base, inflated, and from the upper layers' outputs, and settle by Langevin steps in the
    target's score. A probe is lost if its nearest draw of the sampler is farther than q99 + 2 (q99 - median), of the
    distances from each draw to the nearest other one; all in the metric of the score's covariance over the draws, where
    each mode is round. What no probe reaches is not seen, and the score does not tell how much mass a lost place has.
    In many dimensions, where draws are far from each other, only modes that are farther still are seen.

    Args:
        layers: The sampler.
        bridge: Its base is the start, its score at the level of layer 0 the target's.
        num_draws: N.
        num_probes: Number of probes.
        num_steps: Langevin steps.
        inflation: Factor of the base draws about their mean.
        share: Of lost probes, above which it is reported.
        generator: Source of the draws.

    Returns:
        At most one "lost_modes".
    """
    marginals = _draw(layers, bridge, num_draws, generator)
    shape, center = marginals[0].shape[1:], marginals[0].flatten(1).mean(0)

    def score(x: Tensor) -> Tensor:
        x = x.reshape(-1, *shape)
        return bridge.score(x, bridge.level(_fill(0, x))).flatten(1)

    draws = marginals[0].flatten(1)
    root = _precision_root(score(draws), marginals[-1].flatten(1))
    inverse = torch.linalg.inv(root)
    start = (_starts(bridge, marginals[1:-1], num_probes, inflation, generator).flatten(1) - center) @ root
    probes = _settle(lambda u: score(center + u @ inverse) @ inverse.T, start, num_steps, generator)
    draws = (draws - center) @ root
    usual = torch.cdist(draws, draws).fill_diagonal_(math.inf).amin(1)
    far = 3 * usual.quantile(0.99) - 2 * usual.median()
    lost = center + probes[torch.cdist(probes, draws).amin(1) > far] @ inverse
    lost = lost[_is_dense(bridge, lost.reshape(-1, *shape), marginals[0])]
    value = len(lost) / num_probes
    if value <= share:
        return []
    place = ", ".join(f"{number:.3g}" for number in lost[0, :4].tolist())
    message = (
        f"{value:.1%} of {num_probes} probes settled where the target is dense and the sampler hardly goes, one at x = "
        f"[{place}{', ...' if len(center) > 4 else ''}]. Train by KullbackLeibler or LowerBound in the place of "
        "ScoreMatching, with more layers, a diffusion bridge or a wider base. Mend a collapsed variance first"
    )
    return [Finding("lost_modes", 0, value, share, message)]


def _score(bridge: Bridge, x: Tensor, t: int) -> Tensor:
    score = bridge.score(x, bridge.level(_fill(t, x)))
    if not bool(score.isfinite().all()):
        raise ValueError(f"the target's score is not finite at draws of x_{t}: the sampler diverged, train anew")
    return score


def _fill(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


def _draw(layers: ConditionalLayers, bridge: Bridge, size: int, generator: torch.Generator | None) -> list[Tensor]:
    marginals = draw_marginals(layers, bridge.sample_base(size, generator), generator)
    for t, x in enumerate(marginals):
        bad = int((~x.isfinite()).sum())
        if bad:
            raise ValueError(f"{bad} of {x.numel()} numbers of x_{t} are not finite: the sampler diverged, train anew")
    return marginals


def _mean_and_error(terms: Tensor) -> tuple[Tensor, Tensor]:
    return terms.mean(0), terms.std(0) / math.sqrt(len(terms))


def _critic_signs(
    layers: ConditionalLayers,
    bridge: Bridge,
    critic: Critic,
    x_next: Tensor,
    t: int,
    generator: torch.Generator | None,
) -> list[tuple[float, float]]:
    """The two signs of `critic_lag`, which should be 0, each with its standard error."""
    layer = _fill(t, x_next)
    q, level = layers(x_next, layer), bridge.level(layer)
    noise = randn_like(q.mean, generator)
    pair = [q.rsample(noise), q.rsample(-noise)]
    scores = [critic(x, level, None, layer) for x in pair]
    center, norm = torch.cat(pair).mean(0), torch.cat(scores).flatten(1).square().sum(1).mean()
    by_score = [(s * (s - q.score(x))).flatten(1).sum(1) / norm for x, s in zip(pair, scores, strict=True)]
    by_place = [1 + ((x - center) * s).flatten(1).mean(1) for x, s in zip(pair, scores, strict=True)]
    signs = [_mean_and_error((one + other) / 2) for one, other in (by_score, by_place)]
    return [(float(value), float(error)) for value, error in signs]


def _is_dense(bridge: Bridge, x: Tensor, draws: Tensor) -> Tensor:
    """Whether the target is as dense at x as at its least likely draws, less d; true where only the score is known."""
    try:
        least = bridge.log_prob(draws, bridge.level(_fill(0, draws))).min() - draws[0].numel()
        return bridge.log_prob(x, bridge.level(_fill(0, x))) > least
    except NotImplementedError:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)


def _precision_root(score: Tensor, base: Tensor) -> Tensor:
    """Cholesky root of cov(S), the mean precision of the modes, a little shrunk to a diagonal so that it has one."""
    dimension = score.shape[1]
    precision = torch.cov(score.double().T).reshape(dimension, dimension)
    shrinkage = dimension / (dimension + len(score))
    floor = 1e-2 / base.double().var(0).clamp_min(torch.finfo(base.dtype).eps)
    diagonal = shrinkage * precision.diagonal() + floor
    root, failed = torch.linalg.cholesky_ex((1 - shrinkage) * precision + diagonal.diag())
    if failed:
        raise ValueError(
            "the target's score is too large at draws of x_0 to be squared: the sampler diverged, train anew"
        )
    return root.to(score.dtype)


def _starts(
    bridge: Bridge, upper: list[Tensor], size: int, inflation: float, generator: torch.Generator | None
) -> Tensor:
    """Inflated base draws, and as many outputs of the upper layers if there are any."""
    base = bridge.sample_base(size if not upper else size - size // 2, generator)
    center = base.mean(0)
    rows = [center + inflation * (base - center)]
    rows += [x[: -(-(size // 2) // len(upper))] for x in upper]
    return torch.cat(rows)[:size]


def _settle(score: Callable[[Tensor], Tensor], u: Tensor, num_steps: int, generator: torch.Generator | None) -> Tensor:
    r"""Metropolis-adjusted Langevin steps, each row with a step of its own; returns the rows that settled.

    The score g is all that is known: log p(u') - log p(u) is taken as (g + g') . (u' - u) / 2, exact for Gaussians.
    With it the logarithm of the acceptance ratio is h (|g|^2 - |g'|^2) / 8. A row has settled if the second half of its
    chain has 70 % of what Stein's identity asks for, -cov(u, g) = d: one that is still on its way, or stuck, has less.
    """
    longest = 2 * math.log(max(1.0, 0.1 * float(u.square().mean().sqrt())))
    log_step = u.new_full((len(u),), math.log(0.1))
    g = score(u)
    sum_u, sum_g, sum_ug = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(log_step)
    kept = num_steps - num_steps // 2
    for index in range(num_steps):
        step = log_step.exp()
        proposal = u + 0.5 * step[:, None] * g + step.sqrt()[:, None] * randn_like(u, generator)
        proposed = score(proposal)
        rate = (step / 8 * (g.square().sum(1) - proposed.square().sum(1))).exp().nan_to_num(0).clamp(max=1)
        accept = (_uniform_like(rate, generator) < rate)[:, None]
        u, g = torch.where(accept, proposal, u), torch.where(accept, proposed, g)
        log_step = (log_step + 0.2 * (rate - 0.57)).clamp(max=longest)
        if index >= num_steps - kept:
            sum_u, sum_g, sum_ug = sum_u + u, sum_g + g, sum_ug + (u * g).sum(1)
    stein = ((sum_u * sum_g).sum(1) / kept - sum_ug) / kept
    return u[stein > 0.7 * u.shape[1]]


def _uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
