"""Which layers learn, how much each counts, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A stretch of training of `num_steps` layer updates, with the share beta(t) of each layer in the loss, shape (T,).

    The loss of a batch is the mean of beta(t) L_t over its rows; a chain that draws all layers alike wants shares of
    mean 1, one that draws one layer a share of 1.
    """

    beta: Tensor
    num_steps: int


def joint(num_layers: int, num_steps: int, critic_first: int = 0) -> list[Stage]:
    """All layers at once: the loss is the mean over t of L_t (sec. 3.3, the way for shared networks).

    Before that stage of the T layers there may be another: of all `num_steps` the first `critic_first`, in which the
    critic alone learns, for the layers' shares are 0.

    Raises:
        ValueError: The steps of the critic are not from 0 up to all of them.
    """
    if not 0 <= critic_first <= num_steps:
        raise ValueError(f"critic_first={critic_first}: give a number of steps from 0 up to the {num_steps} of all")
    alone = [Stage(beta=torch.zeros(num_layers), num_steps=critic_first)] if critic_first else []
    return [*alone, Stage(beta=torch.ones(num_layers), num_steps=num_steps - critic_first)]


def sequential(num_layers: int, num_steps: int) -> list[Stage]:
    """One layer after the other, from the base down: t = T-1 learns, is frozen, and t = T-2 is next (sec. 3.3).

    The layers need parameters of their own, such as those of `IndependentLayers`: of a tensor that layers share, an
    optimizer with momentum moves the rows of those that are frozen, too. Inputs come from a `FrozenPoolChain`. Each of
    the T stages has `num_steps` updates.
    """
    return [Stage(beta=one_layer, num_steps=num_steps) for one_layer in torch.eye(num_layers).flip(0)]


def cosine(share: float, end: float = 0.0) -> float:
    """Returns the factor of a rate that falls by half a cosine from 1 to `end`; the share done is from 0 to 1."""
    return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2


class Plateau:
    """Tells when a value has stopped falling: `stop_stage` of `fit`.

    The mean of the value over a window of updates is compared with the lowest such mean so far. When `patience` windows
    in a row are not lower by a standard error of that mean, the stage ends. A stage that ends by its number of updates
    calls for `reset`.
    """

    window = 200
    patience = 3

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts over, as a stage must that is not to be compared with the one before."""
        self.values: list[float] = []
        self.best, self.waited = math.inf, 0

    def __call__(self, value: float) -> bool:
        """Takes the value of an update; returns whether the stage should end, and starts over if so."""
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
        """What a resumed run needs."""
        return {"values": list(self.values), "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.values, self.best, self.waited = list(state["values"]), state["best"], state["waited"]
