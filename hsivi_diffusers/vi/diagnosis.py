"""All signs of failure together, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .bridges import Bridge
from .diagnostics import Finding, critic_lag, variance_collapse
from .layers import ConditionalLayers
from .masses import REACH, drift, lost_modes, wrong_masses
from .objectives import Critic


class Diagnosis(list[Finding]):
    """Findings, and `unchecked`: what was not checked and why, of which an empty list of findings says nothing."""

    def __init__(self, findings: Iterable[Finding], unchecked: Iterable[str]) -> None:
        super().__init__(findings)
        self.unchecked = tuple(unchecked)

    def __str__(self) -> str:
        found = [f"{finding.signature}: {finding.message}" for finding in self] or ["nothing was found"]
        return "\n".join([*found, *(f"not checked: {thing}" for thing in self.unchecked)])


def diagnose(
    layers: ConditionalLayers,
    bridge: Bridge,
    *,
    critic: Critic | None = None,
    critic_layers: Sequence[int] | None = None,
    num_draws: int = 4000,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Looks for all signs of failure in draws of a sampler without conditions.

    Chains go on from a quarter of the `num_draws` draws, weights are those of a half. See `critic_lag` for the layers
    at which a critic is looked at.

    Raises:
        ValueError: A draw is not finite.
    """
    found = variance_collapse(layers, bridge, num_draws=num_draws, generator=generator)
    if critic is not None:
        found += critic_lag(layers, bridge, critic, critic_layers, num_draws=num_draws, generator=generator)
    found += lost_modes(layers, bridge, num_draws=num_draws // 2, generator=generator)
    found += drift(layers, bridge, num_draws=num_draws // 4, generator=generator)
    masses, why = wrong_masses(layers, bridge, num_draws=num_draws // 2, generator=generator)
    unchecked = [f"modes that attract no start within {REACH:g} times the spread of the base, and their masses"]
    return Diagnosis(found + masses, [*unchecked, *([] if why is None else [why])])
