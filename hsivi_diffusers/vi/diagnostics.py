"""Checks of the sampler and its critic that need the target's score S, and no reference posterior.

The target is p at the level of layer 0 of the bridge. `marginals` are draws of the sampler, see `draw_marginals`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bridges import Bridge
from .distributions import randn_like
from .layers import ConditionalLayers
from .lower_bound import LowerBound
from .objectives import Critic, KullbackLeibler, Objective, ScoreMatching
from .regression import WithPairs

STANDARD_ERRORS = 3.0
STD_RATIO = 1e-2  # below it a layer has collapsed: its std over the spread of its outputs
STEIN = 0.8  # below it draws are too narrow: their Stein ratio
LAG = 0.15  # above it a critic lags: its errors in two identities


@dataclass(frozen=True)
class Finding:
    """A sign of a bad fit."""

    signature: str  # the name of the check: "variance_collapse", "under_dispersed", "over_dispersed", "critic_lag",
    # "lost_modes", "drift" or "wrong_masses"
    layer: int
    value: float
    threshold: float
    message: str  # what was measured, and the remedy


def other_objective(objective: Objective | None) -> str:
    """Returns the remedy that concerns the objective, for layers that were trained with this one; None if unknown."""
    if isinstance(objective, WithPairs):
        objective = objective.objective
    if isinstance(objective, ScoreMatching):
        return "train by LB or KL instead of SM"
    if isinstance(objective, LowerBound):
        return "give LB a larger batch, or train by KL with several critic updates"
    if isinstance(objective, KullbackLeibler):
        return "give the critic more updates, 3 or 5, or train by LB"
    return "try another objective"


@torch.no_grad()
def variance_collapse(
    layers: ConditionalLayers, bridge: Bridge, marginals: list[Tensor], objective: Objective | None = None
) -> list[Finding]:
    """Finds layers that have become deterministic, and coordinates whose spread is not the target's.

    A layer is collapsed in a coordinate if mean std < `STD_RATIO` sd(x_t), and if mean std is less than a tenth of
    1 / rms(S_t), the width that p_t has there. The sampler is under-dispersed in a coordinate if `stein_ratio` is below
    `STEIN`, and below 1 by more than (9 + 2 log d)^(1/2) standard errors; over-dispersed if it is as far above 1,
    beyond 1 / `STEIN`.

    Returns:
        At most one "variance_collapse" a layer, one "under_dispersed" and one "over_dispersed"; each with the worst
        coordinate's value.

    Raises:
        ValueError: The target's score is not finite.
    """
    found = []
    for t in reversed(range(layers.num_layers)):
        std = layers(marginals[t + 1], fill(t, marginals[t])).std.expand_as(marginals[t]).flatten(1)
        spread = marginals[t].flatten(1).std(0)
        ratio = std.mean(0) / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        score = bridge.score(marginals[t], bridge.level(fill(t, marginals[t])))
        if not bool(score.isfinite().all()):
            raise ValueError(f"the target's score is not finite at draws of x_{t}: the sampler diverged, train again")
        local = std.mean(0) * score.flatten(1).square().mean(0).sqrt()
        ratio = ratio.masked_fill(local > 0.1, math.inf)  # as narrow as p_t itself is, there
        narrow = int((ratio < STD_RATIO).sum())
        if narrow:
            message = (
                f"layer {t} is deterministic in {narrow} of {len(ratio)} coordinates: in "
                f"{bridge.coordinate(int(ratio.argmin()))} its std is {float(ratio.min()):.2g} of the spread of its "
                f"outputs. Start from a larger std, lower the layers' learning rate, or {other_objective(objective)}"
            )
            found.append(Finding("variance_collapse", t, float(ratio.min()), STD_RATIO, message))
    return found + _wrong_spread(marginals[0], score, bridge, objective)  # the score at the last layer, t = 0


def _wrong_spread(x: Tensor, score: Tensor, bridge: Bridge, objective: Objective | None) -> list[Finding]:
    """At most one "under_dispersed" and one "over_dispersed", by `stein_ratio`."""
    ratio, error = stein_ratio(x, score)
    errors = math.sqrt(STANDARD_ERRORS**2 + 2 * math.log(len(ratio)))  # the extreme of d ratios strays farther than one
    narrow = (ratio < STEIN) & (ratio + errors * error < 1)
    wide = (ratio > 1 / STEIN) & (ratio - errors * error > 1)
    found = []
    for signature, threshold, seen, where, remedy in (
        (
            "under_dispersed",
            STEIN,
            narrow,
            f"narrower than the target in {int(narrow.sum())} of {len(ratio)} coordinates",
            f"Train longer or start from a larger std; otherwise {other_objective(objective)}",
        ),
        (
            "over_dispersed",
            1 / STEIN,
            wide,
            f"wider than the target in {int(wide.sum())} of {len(ratio)} coordinates, or in a thin direction",
            "Train longer; if the target is stiff, fit it in coordinates whitened by the mean and covariance of these "
            "draws, and repeat",
        ),
    ):
        if bool(seen.any()):
            worst = int((ratio - 1).abs().masked_fill(~seen, -math.inf).argmax())
            message = (
                f"x_0 is {where}: in {bridge.coordinate(worst)} the Stein ratio E[-(x - E x) S(x)] is "
                f"{float(ratio[worst]):.3g}, and 1 for the target. {remedy}"
            )
            found.append(Finding(signature, 0, float(ratio[worst]), threshold, message))
    return found


def stein_ratio(x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Returns E_q[-(x_k - E x_k) S_k(x)] for each coordinate k, and its standard error, both of shape (d,).

    Stein's identity makes it 1 where q = p; below 1 q is too narrow, above too wide. For Gaussians it is the k-th
    diagonal entry of cov_q cov_p^-1, so var_q / var_p if p has independent coordinates. It does not see the weights of
    modes, and where p is thin, along a curve or a ridge, it speaks of the thin direction. x are draws from q, shape
    (N, ...), and score that of p there.
    """
    x, score = x.flatten(1), score.flatten(1)
    return _mean_and_error(-(x - x.mean(0)) * score)


@torch.no_grad()
def critic_lag(
    layers: ConditionalLayers,
    bridge: Bridge,
    critic: Critic,
    marginals: list[Tensor],
    which: Iterable[int],
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Finds layers, of `which`, whose marginal the critic, an estimate of its score, does not follow.

    The critic's loss is least over all multiples of s where E[s . (s - grad log q(x | x_next))] = 0, and the true score
    has E[(x - E x) . s] = -d besides. So a critic that lags is seen, whatever its network; one that is trained to the
    end and too small for the score may pass. Each draw is scored at mean + std z and mean - std z, which takes most of
    the noise off.

    Returns:
        At most one "critic_lag" a layer: |E[s . (s - grad log q)]| / E|s|^2 or |1 + E[(x - E x) . s] / d| is above
        `LAG`, and three standard errors from 0.
    """
    found = []
    for t in which:
        signs = _critic_signs(layers, bridge, critic, marginals[t + 1], t, generator)
        seen = [abs(value) for value, error in signs if abs(value) > max(LAG, STANDARD_ERRORS * error)]
        if seen:
            by_score, by_place = (f"{value:.2g} +- {error:.1g}" for value, error in signs)
            message = (
                f"the critic lags behind layer {t}: E[s . (s - grad log q)] / E|s|^2 is {by_score} and "
                f"1 + E[(x - E x) . s] / d is {by_place}, where both should be 0. Give the critic more updates for "
                "each layer update or a higher learning rate, or the layers a lower one"
            )
            found.append(Finding("critic_lag", t, max(seen), LAG, message))
    return found


def fill(t: int, x: Tensor) -> Tensor:
    """Returns layer t for each row of x, shape (B,)."""
    return torch.full((len(x),), t, device=x.device)


def _mean_and_error(terms: Tensor) -> tuple[Tensor, Tensor]:
    return terms.mean(0), terms.std(0) / math.sqrt(len(terms))


def _critic_signs(
    layers: ConditionalLayers, bridge: Bridge, critic: Critic, x_next: Tensor, t: int, generator: torch.Generator | None
) -> list[tuple[float, float]]:
    """The two signs of `critic_lag`, which should be 0, each with its standard error."""
    layer = fill(t, x_next)
    q, level = layers(x_next, layer), bridge.level(layer)
    noise = randn_like(q.mean, generator)
    pair = [q.rsample(noise), q.rsample(-noise)]
    scores = [critic(x, level, None, layer) for x in pair]
    center, norm = torch.cat(pair).mean(0), torch.cat(scores).flatten(1).square().sum(1).mean()
    by_score = [(s * (s - q.score(x))).flatten(1).sum(1) / norm for x, s in zip(pair, scores, strict=True)]
    by_place = [1 + ((x - center) * s).flatten(1).mean(1) for x, s in zip(pair, scores, strict=True)]
    signs = [_mean_and_error((one + other) / 2) for one, other in (by_score, by_place)]
    return [(float(value), float(error)) for value, error in signs]
