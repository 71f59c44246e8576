"""All signs of failure together, and what was not looked at."""

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
from .objectives import Critic

NUM_DRAWS = 4000


class Diagnosis(list[Finding]):
    """Findings, and `unchecked`: what was not checked and why, of which an empty list of findings says nothing."""

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
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Looks for all signs of failure in 4,000 draws of a sampler, of which all have the one `condition`, if any.

    Chains continue from a quarter of them, weights are those of a half. The critic is looked at for all layers, or for
    `critic_layers`: after layer-by-layer training it knows the last of them alone, [0].

    Raises:
        ValueError: A draw is not finite.
    """
    if condition is not None:
        layers, bridge, critic = _given(condition, layers, bridge, critic)
    marginals = draw_marginals(layers, bridge.sample_base(NUM_DRAWS, generator), generator)
    for t, x in enumerate(marginals):
        if bad := int((~x.isfinite()).sum()):
            raise ValueError(f"{bad} of {x.numel()} numbers of x_{t} are not finite: the sampler diverged, train again")
    half, quarter = ([x[: NUM_DRAWS // part] for x in marginals] for part in (2, 4))
    found = variance_collapse(layers, bridge, marginals)
    if critic is not None:
        which = reversed(range(layers.num_layers)) if critic_layers is None else critic_layers
        found += critic_lag(layers, bridge, critic, marginals, which, generator)
    found += lost_modes(bridge, half, generator)
    found += drift(bridge, quarter, generator)
    masses, why = wrong_masses(layers, bridge, half)
    unchecked = [f"modes that attract no start within {REACH:g} times the spread of the base, and their masses"]
    return Diagnosis(found + masses, [*unchecked, *([] if why is None else [why])])


def _given(
    condition: Tensor, layers: ConditionalLayers, bridge: Bridge, critic: Critic | None
) -> tuple[ConditionalLayers, Bridge, Critic | None]:
    """Returns the three as they are where each row has this condition; the checks give none."""

    def bind(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, at, _=None, *more: call(x, at, condition.expand(len(x), *condition.shape), *more)

    layers, bridge = copy.copy(layers), copy.copy(bridge)  # of the module alone, not of its weights
    layers.forward, bridge.score = bind(layers.forward), bind(bridge.score)  # type: ignore[method-assign]
    return layers, bridge, critic and bind(critic)
