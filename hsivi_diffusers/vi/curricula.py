"""Which layers learn, how much each counts, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        beta: Share beta(t) of each layer in the loss, shape (T,), mean 1.
        num_steps: Layer updates in this stage.
    """

    beta: Tensor
    num_steps: int


def joint(num_layers: int, num_steps: int, beta: Sequence[float] | None = None) -> list[Stage]:
    """All layers at once: the loss is the mean over t of beta(t) L_t (sec. 3.3, the way for shared networks).

    Args:
        num_layers: T.
        num_steps: Layer updates.
        beta: T shares, >= 0 and not all zero, rescaled to mean 1; equal by default.

    Returns:
        One stage.

    Raises:
        ValueError: T < 1, or `beta` does not fit.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: a hierarchy has at least 1 layer")
    shares = torch.ones(num_layers) if beta is None else torch.as_tensor(beta, dtype=torch.float32)
    if shares.shape != (num_layers,) or bool((shares < 0).any()) or not float(shares.sum()) > 0:
        raise ValueError(f"beta={beta!r}: give {num_layers} shares, none negative and not all zero")
    return [Stage(beta=shares / shares.mean(), num_steps=num_steps)]
