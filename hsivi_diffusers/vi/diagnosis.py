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
    """Findings, by layer where they concern one.

    Args:
        findings: What was found.
        unchecked: What was not checked, and why; an empty list of findings says nothing of it.
    """

    def __init__(self, findings: Iterable[Finding], unchecked: Iterable[str]) -> None:
        super().__init__(findings)
        self.unchecked = tuple(unchecked)

    def __str__(self) -> str:
        """Returns a line for each finding, and for each thing that was not checked."""
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
    """Looks for all signs of failure.

    Args:
        layers: The sampler, one that takes no condition.
        bridge: What it was fitted to; its score at the level of layer 0 is the target's.
        critic: For signs of a lag, if there is one.
        critic_layers: See `critic_lag`.
        num_draws: N, draws of the sampler; chains go on from a quarter of them, weights are those of a half.
        generator: Source of all draws.

    Returns:
        What was found, and what was not checked; no findings if all is well as far as was checked.

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
