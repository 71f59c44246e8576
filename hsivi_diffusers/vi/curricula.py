"""The stages of a training: which layers are trained, with which weights, for how many steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """`num_steps` layer updates with the weight beta(t) of each layer in the loss, shape (T,).

    The loss of a batch is the mean of beta(t) L_t over its rows.
    """

    beta: Tensor
    num_steps: int


def joint(num_layers: int, num_steps: int, critic_first: int = 0) -> list[Stage]:
    """All layers at once: the loss is the mean over t of L_t (sec. 3.3, the way for shared networks).

    In the first `critic_first` of the `num_steps` only the critic is trained: beta is 0.

    Raises:
        ValueError: critic_first is not from 0 to num_steps.
    """
    if not 0 <= critic_first <= num_steps:
        raise ValueError(f"critic_first={critic_first}: give a number of steps from 0 up to the {num_steps} of all")
    alone = [Stage(beta=torch.zeros(num_layers), num_steps=critic_first)] if critic_first else []
    return [*alone, Stage(beta=torch.ones(num_layers), num_steps=num_steps - critic_first)]


def sequential(num_layers: int, num_steps: int) -> list[Stage]:
    """One layer after the other, from the base down: t = T-1 learns, is frozen, and t = T-2 is next (sec. 3.3).

    Each of the T stages has `num_steps` updates, with inputs from a `FrozenPoolChain`. The layers need parameters of
    their own (`IndependentLayers`): an optimizer with momentum would move frozen rows of a shared tensor.
    """
    return [Stage(beta=one_layer, num_steps=num_steps) for one_layer in torch.eye(num_layers).flip(0)]


def cosine(share: float, end: float = 0.0) -> float:
    """Returns the factor of a learning rate that falls by half a cosine from 1 to `end`, at the share of 0 to 1."""
    return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2


class Plateau:
    """Detects that a loss has stopped falling, for `stop_stage` of `fit`.

    The mean over a window of updates is compared with the lowest such mean so far. The stage ends when `patience`
    windows in a row are not lower by a standard error. Call `reset` after a stage that ended by its number of updates.
    """

    window = 200
    patience = 3

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the values of the stage before."""
        self.values: list[float] = []
        self.best, self.waited = math.inf, 0

    def __call__(self, value: float) -> bool:
        """Takes the value of an update; returns whether the stage should end, and resets itself if so."""
        self.values.append(value)
        if len(self.values) < self.window:
            return False
        values = torch.tensor(self.values, dtype=torch.float64)
        self.values.clear()
        mean, error = float(values.mean()), float(values.std()) / self.window**0.5
        self.waited = 0 if mean < self.best - error else self.waited + 1
        self.best = min(self.best, mean)
        if self.waited < self.patience:
            return False
        self.reset()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"values": list(self.values), "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.values, self.best, self.waited = list(state["values"]), state["best"], state["waited"]
