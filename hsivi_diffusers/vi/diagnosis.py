"""Runs all checks of a fitted sampler, and says what could not be checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bridges import Bridge
from .chains import draw_marginals
from .diagnostics import Finding, critic_lag, variance_collapse
from .layers import ConditionalLayers
from .masses import REACH, drift, lost_modes, wrong_masses
from .objectives import Critic, Objective

NUM_DRAWS = 4000


class Diagnosis(list[Finding]):
    """A list of findings; `unchecked` names what was not checked and why, so an empty list proves nothing."""

    def __init__(self, findings: Iterable[Finding], unchecked: Iterable[str]) -> None:
        super().__init__(findings)
        self.unchecked = tuple(unchecked)

    def __str__(self) -> str:
        found = [f"{finding.signature}: {finding.message}" for finding in self] or ["no sign of a bad fit was found"]
        return "\n".join([*found, *(f"not checked: {thing}" for thing in self.unchecked)])


def diagnose(
    layers: ConditionalLayers,
    bridge: Bridge,
    *,
    critic: Critic | None = None,
    critic_layers: Sequence[int] | None = None,
    objective: Objective | None = None,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Runs all checks on 4,000 draws of a sampler; the chains and the weights use half of them.

    Args:
        layers: The sampler.
        bridge: What it was fitted to.
        critic: Checked if given.
        critic_layers: Layers at which the critic is checked, all by default. After layer-by-layer training it knows the
            last layer only: [0].
        objective: What the layers were trained with; the remedies depend on it.
        condition: Of all draws, if the layers take one.
        generator: Source of the draws.

    Raises:
        ValueError: A draw is not finite.
    """
    if condition is not None:
        layers, bridge, critic = _at_condition(condition, layers, bridge, critic)
    marginals = draw_marginals(layers, bridge.sample_base(NUM_DRAWS, generator), generator)
    for t, x in enumerate(marginals):
        if bad := int((~x.isfinite()).sum()):
            raise ValueError(f"{bad} of {x.numel()} numbers of x_{t} are not finite: the sampler diverged, train again")
    half = [x[: NUM_DRAWS // 2] for x in marginals]
    found = variance_collapse(layers, bridge, marginals, objective)
    if critic is not None:
        which = reversed(range(layers.num_layers)) if critic_layers is None else critic_layers
        found += critic_lag(layers, bridge, critic, marginals, which, generator)
    found += lost_modes(bridge, half, objective, generator)
    found += drift(bridge, half, objective, generator)
    masses, why = wrong_masses(layers, bridge, half)
    unchecked = [f"modes that attract no start within {REACH:g} times the spread of the base, and their masses"]
    return Diagnosis(found + masses, [*unchecked, *([] if why is None else [why])])


def _at_condition(
    condition: Tensor, layers: ConditionalLayers, bridge: Bridge, critic: Critic | None
) -> tuple[ConditionalLayers, Bridge, Critic | None]:
    """Returns the three with the condition bound, since the checks pass none."""

    def bind(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, at, _=None, *more: call(x, at, condition.expand(len(x), *condition.shape), *more)

    layers, bridge = copy.copy(layers), copy.copy(bridge)  # shallow: the weights are shared
    layers.forward, bridge.score = bind(layers.forward), bind(bridge.score)  # type: ignore[method-assign]
    return layers, bridge, critic and bind(critic)
