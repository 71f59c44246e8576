"""Checks for mass of the target that is missing or misplaced: by probes, Langevin chains and importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .bridges import Bridge
from .diagnostics import STANDARD_ERRORS, Finding, fill, other_objective
from .langevin import langevin, precision_root
from .layers import ConditionalLayers
from .objectives import Objective

NUM_PROBES = 500
NUM_STEPS = 300  # of each chain; chains of `drift` that have not mixed go on to three times as many
LOST = 0.01  # above it modes are lost: share of lost probes
SAME = 0.8  # below it a variance has changed: ratio of before and after
DISTANCE = 0.1  # above it masses are wrong: distance of distribution functions
REACH = 20.0  # the widest start of a probe, in spreads of the base
SETTLED = 0.7  # share of what Stein's identity asks of a chain that has mixed; of a single chain
MIXED = 0.9  # the same of all chains together, in their slowest coordinate
RELIABLE = 0.2  # below it importance weights say nothing: effective share of draws


@torch.no_grad()
def lost_modes(
    bridge: Bridge,
    marginals: list[Tensor],
    objective: Objective | None = None,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Finds places of high target density where the sampler never goes.

    Probes start from the base, inflated about its mean up to `REACH` times, and from the upper layers' outputs, and
    settle by Langevin steps in the target's score. A probe is lost if its nearest draw of the sampler is farther than
    q99 + 2 (q99 - median), of the distances from each draw to the nearest other one. Distances are in the metric of the
    score's covariance over the draws, where each mode is round. What no probe reaches is not seen, and the score does
    not tell how much mass a lost place has. In many dimensions, where draws are far from each other, only modes that
    are farther still are seen.

    Returns:
        At most one "lost_modes", if more than `LOST` of the probes are lost.
    """
    draws = marginals[0].flatten(1)
    shape, center = marginals[0].shape[1:], draws.mean(0)
    score, root, inverse = _round(bridge, marginals)
    start = (_starts(bridge, marginals[1:-1], NUM_PROBES, generator).flatten(1) - center) @ root
    probes, stein = langevin(lambda u: score(center + u @ inverse) @ inverse.T, start, NUM_STEPS, generator)
    probes = probes[stein.mean(1) > SETTLED]
    draws = (draws - center) @ root
    usual = torch.cdist(draws, draws).fill_diagonal_(math.inf).amin(1)
    far = 3 * usual.quantile(0.99) - 2 * usual.median()
    lost = center + probes[torch.cdist(probes, draws).amin(1) > far] @ inverse
    if len(lost):  # not all distributions of torch take none
        lost = lost[_is_dense(bridge, lost.reshape(-1, *shape), marginals[0])]
    value = len(lost) / NUM_PROBES
    if value <= LOST:
        return []
    place = ", ".join(f"{number:.3g}" for number in lost[0, :4].tolist())
    message = (
        f"{value:.1%} of {NUM_PROBES} probes settled where the target is dense and the sampler hardly goes, one at x = "
        f"[{place}{', ...' if len(center) > 4 else ''}]. Train with more layers, a diffusion bridge or "
        f"a wider base, or {other_objective(objective)}. Fix a collapsed variance first"
    )
    return [Finding("lost_modes", 0, value, LOST, message)]


@torch.no_grad()
def drift(
    bridge: Bridge,
    marginals: list[Tensor],
    objective: Objective | None = None,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Finds coordinates whose mean or variance changes when Langevin chains continue from the draws of x_0.

    Draws of p have the same law after any number of steps, so what changes is wrong, in any dimension. Chains that have
    not mixed go on for longer, so that a curved or thin target is followed into its tails. They do not cross between
    modes that are far apart: see `wrong_masses`.

    Returns:
        At most one "drift": significantly, a ratio of the variances before and after is below `SAME`, or above its
        inverse, or a mean has moved by 1 - `SAME` standard deviations.
    """
    before = marginals[0].flatten(1)
    score, root, inverse = _round(bridge, marginals)
    u, found, done = before @ root, [], 0
    for num_steps in (NUM_STEPS, 2 * NUM_STEPS):
        u, stein = langevin(lambda u: score(u @ inverse) @ inverse.T, u, num_steps, generator, together=True)
        done += num_steps
        found = _changes(bridge, before, u @ inverse, done, objective)
        if found or float(stein.mean(0).min()) > MIXED:
            break
    return found


def _changes(
    bridge: Bridge, before: Tensor, after: Tensor, num_steps: int, objective: Objective | None
) -> list[Finding]:
    """At most one "drift", between rows of draws before and after the steps."""
    center, variance = after.mean(0), after.var(0).clamp_min(torch.finfo(after.dtype).tiny)
    square = ((before - center).square() - (after - center).square()) / variance
    shift = (before - after) / variance.sqrt()
    errors = math.sqrt(STANDARD_ERRORS**2 + 2 * math.log(2 * len(center))) / math.sqrt(len(before))
    changes = before.var(0) / variance
    wrong = ((changes < SAME) | (changes > 1 / SAME)) & (square.mean(0).abs() > errors * square.std(0))
    wrong |= (shift.mean(0).abs() > 1 - SAME) & (shift.mean(0).abs() > errors * shift.std(0))
    if not bool(wrong.any()):
        return []
    worst = int((changes.log().abs() + shift.mean(0).abs()).masked_fill(~wrong, -math.inf).argmax())
    message = (
        f"x_0 does not stay as it is under Langevin steps in the target in {int(wrong.sum())} of {len(wrong)} "
        f"coordinates: in {bridge.coordinate(worst)} the variance of the draws is {float(changes[worst]):.2g} of that "
        f"after {num_steps} steps, their mean {float(shift.mean(0)[worst]):+.2g} standard deviations off. Train longer "
        f"or with more layers; otherwise {other_objective(objective)}"
    )
    return [Finding("drift", 0, float(changes[worst]), SAME, message)]


@torch.no_grad()
def wrong_masses(
    layers: ConditionalLayers, bridge: Bridge, marginals: list[Tensor]
) -> tuple[list[Finding], str | None]:
    """Finds coordinates whose distribution changes when each draw is weighted by p / q.

    q is the mixture of layer 0 over N inputs. The weights compare the masses of modes that the sampler visits, however
    far apart they are; what it never visits they do not see. In many dimensions the mixture is too rough.

    Returns:
        At most one "wrong_masses", if the two distribution functions of a coordinate differ by more than `DISTANCE`
        (Kolmogorov-Smirnov); and why nothing was checked, or None if it was.
    """
    x, x_next, num_draws = marginals[0], marginals[1], len(marginals[0])
    try:
        log_p = bridge.log_prob(x, bridge.level(fill(0, x)))
    except NotImplementedError:
        return [], "the masses of modes: only the score of the target is known"
    matrix = layers(x_next, fill(0, x_next)).pairwise_log_prob(x)
    log_q = matrix.fill_diagonal_(-math.inf).logsumexp(1)  # the input of a draw would vouch for it
    weights = (log_p - log_q).double().softmax(0)
    effective = float(1 / weights.square().sum()) / num_draws
    if not effective > RELIABLE:
        why = f"importance weights use {effective:.1%} of the draws, {RELIABLE:.0%} are needed"
        return [], f"the masses of modes: {why}"
    order = x.flatten(1).argsort(0)
    even = torch.arange(1, num_draws + 1, device=x.device, dtype=torch.float64)[:, None] / num_draws
    gaps = (weights[order].cumsum(0) - even).abs().amax(0)
    if not float(gaps.max()) > DISTANCE:
        return [], None
    message = (
        f"the masses are wrong: weighted by p / q, the draws have another distribution in "
        f"{bridge.coordinate(int(gaps.argmax()))}, by {float(gaps.max()):.2g} of all mass. Train longer, with more "
        "layers, a diffusion bridge or a wider base"
    )
    return [Finding("wrong_masses", 0, float(gaps.max()), DISTANCE, message)], None


def _round(bridge: Bridge, marginals: list[Tensor]) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Returns the target's score of rows (N, d), the root of the metric in which modes are round, and its inverse."""

    def score(x: Tensor) -> Tensor:
        x = x.reshape(-1, *marginals[0].shape[1:])
        return bridge.score(x, bridge.level(fill(0, x))).flatten(1)

    root = precision_root(score(marginals[0].flatten(1)), marginals[-1].flatten(1))
    return score, root, torch.linalg.inv(root)


def _is_dense(bridge: Bridge, x: Tensor, draws: Tensor) -> Tensor:
    """Whether log p at x reaches that of the least likely draw, less d; true if only the score is known."""
    try:
        least = bridge.log_prob(draws, bridge.level(fill(0, draws))).min() - draws[0].numel()
        return bridge.log_prob(x, bridge.level(fill(0, x))) > least
    except NotImplementedError:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)


def _starts(bridge: Bridge, upper: list[Tensor], size: int, generator: torch.Generator | None) -> Tensor:
    """Base draws, inflated 1 to `REACH` times, and as many outputs of the upper layers if there are any."""
    base = bridge.sample_base(size if not upper else size - size // 2, generator)
    center = base.mean(0)
    factors = torch.logspace(0, math.log10(REACH), len(base), dtype=base.dtype, device=base.device)
    rows = [center + factors.reshape(-1, *[1] * (base.ndim - 1)) * (base - center)]
    rows += [x[: -(-(size // 2) // len(upper))] for x in upper]
    return torch.cat(rows)[:size]
