"""Bridges {p_t}, t = 0..T-1, from a simple p_{T-1} to the target p_0, to which the layers are fitted (sec. 3.1)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .distributions import DiagonalGaussian
from .targets import DiffusibleTarget, IsotropicNormal, SampledTarget, Target, as_target

ScoreNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Bridge(ABC):
    """A family of densities p_level, of which layer t, 0..num_layers - 1, is fitted to the one at `level(t)`.

    A level is a position on the bridge's own scale, by default t itself. All methods take x of shape (B, ...), level
    and t of shape (B,), and a condition for each row.

    Raises:
        NotImplementedError: By `log_prob` if only the score is known, by `sample_level` and `place` if there are only
            the T levels of the layers.
    """

    num_layers: int

    @abstractmethod
    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the bridge score, grad_x log p_level(x), of the shape of x."""

    def log_prob(self, x: Tensor, level: Tensor) -> Tensor:
        """Returns log p_level(x) + constant, shape (B,), for `LowerBound`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no log-density: use LowerBound(surrogate=True) or a critic"
        )

    @abstractmethod
    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_T, the input of the first layer: shape (batch_size, ...)."""

    def level(self, t: Tensor) -> Tensor:
        """Returns the level of p_t, shape (B,); t itself by default."""
        return t

    def coordinate(self, k: int) -> str:
        """What a message calls x_k."""
        return f"coordinate {k}"

    def sample_level(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws levels at which layers t are scored, of the shape of t, for `scoring="random"`."""
        raise NotImplementedError(f'{type(self).__name__} has no random levels: use scoring="own"')

    def place(
        self,
        q: DiagonalGaussian,
        t: Tensor,
        level: Tensor,
        noise: Tensor,
        x_next: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[DiagonalGaussian, Tensor]:
        """Moves q_t(. | x_{t+1}) along the bridge to one of the levels that `sample_level` draws.

        Returns:
            The law of x there, and the standard normal noise of the draw that is scored: `noise`, of the shape of
            q.mean, or in rows that the generator chooses, partly the noise of the layer's input x_{t+1}.
        """
        raise NotImplementedError(f'{type(self).__name__} cannot re-noise a layer: use scoring="own"')


class GeometricBridge(Bridge):
    """Example 1: p_t(x) proportional to p_base(x)^(1 - lambda_t) p_target(x)^lambda_t, lambda_t = 1 - t/T.

    The level of p_t is 1 - lambda_t: 0 is the target, 1 the base.

    Args:
        target: p_target; also a distribution of torch.
        num_layers: T.
        base: p_base, of which x_T is drawn; N(0, I) by default.

    Raises:
        ValueError: T < 1, or target and base differ in dimension.
    """

    def __init__(self, target: Target | Distribution, num_layers: int, base: SampledTarget | None = None) -> None:
        self.target = as_target(target)
        self.num_layers = _at_least_one(num_layers)
        self.base = base or IsotropicNormal(self.target.dimension)
        if self.base.dimension != self.target.dimension:
            raise ValueError(f"the base has {self.base.dimension} dimensions, the target {self.target.dimension}")
        self.levels = torch.arange(num_layers, dtype=torch.float64) / num_layers

    def level(self, t: Tensor) -> Tensor:
        return self.levels.to(t.device)[t].float()

    def log_prob(self, x: Tensor, level: Tensor) -> Tensor:
        """Returns (1 - lambda) log p_base(x) + lambda log p_target(x), shape (B,)."""
        return _mix(level.to(x), self.base.log_prob, self.target.log_prob, x)

    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns (1 - lambda) S_base(x) + lambda S_target(x), shape (B, d)."""
        return _mix(level.to(x)[:, None], self.base.score, self.target.score, x)

    def coordinate(self, k: int) -> str:
        return self.target.coordinate(k)

    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        return self.base.sample(batch_size, generator)


class DiffusionBridge(Bridge):
    """Example 2: p_t is the law of alpha_t x + sigma_t z, x from the target, z ~ N(0, I).

    The level of p_t is its noise, sigma_t: 0 is the target, 1 the base N(0, I). The path between them is variance
    preserving, alpha_t^2 + sigma_t^2 = 1 with sigma_t = sin(pi t / 2T), or a rectified flow, alpha_t + sigma_t = 1 with
    sigma_t = t / T.

    Args:
        target: A `DiffusibleTarget`; any target, or None, with `score_network`.
        num_layers: T.
        score_network: Estimate of the score at a level, (x, level, condition) -> shape of x, instead of the exact one;
            sigma_t is then at least 0.05. A module is frozen in place.
        dimension: d; needed with `score_network` alone.
        device: Where the base is drawn.
        path: "variance preserving" or "flow".

    Raises:
        ValueError: T < 1, the path is unknown, the dimension is missing or does not fit, or the target cannot be
            diffused and there is no network.
    """

    def __init__(
        self,
        target: Target | None,
        num_layers: int,
        score_network: ScoreNetwork | None = None,
        dimension: int | None = None,
        device: torch.device | str | None = None,
        path: Literal["variance preserving", "flow"] = "variance preserving",
    ) -> None:
        if path not in ("variance preserving", "flow"):
            raise ValueError(f"path={path!r} is unknown: choose 'variance preserving' or 'flow'")
        if score_network is None and not isinstance(target, DiffusibleTarget):
            raise ValueError(
                f"the diffused law of a {type(target).__name__} is not known: give a DiffusibleTarget, or a "
                "score_network fitted to draws of the target; or take a GeometricBridge"
            )
        if target is not None and dimension not in (None, target.dimension):
            raise ValueError(f"dimension={dimension}, and the target has {target.dimension}: leave it out")
        dimension = dimension if target is None else target.dimension
        if dimension is None:
            raise ValueError("dimension is missing: give the number of coordinates of x with a score network")
        self.target = target
        self.num_layers = _at_least_one(num_layers)
        self.network = score_network
        if isinstance(score_network, nn.Module):
            score_network.requires_grad_(False)
        self.base = IsotropicNormal(dimension, device=device)
        self.is_flow = path == "flow"
        steps = torch.arange(num_layers, dtype=torch.float64) / num_layers
        lowest = 0.0 if score_network is None else 0.05  # networks are inaccurate without noise
        self.levels = (steps if self.is_flow else (0.5 * math.pi * steps).sin()).clamp_min(lowest)

    def level(self, t: Tensor) -> Tensor:
        return self.levels.to(t.device)[t].float()

    def log_prob(self, x: Tensor, level: Tensor) -> Tensor:
        if self.network is not None or not isinstance(self.target, DiffusibleTarget):
            raise NotImplementedError("a score network has no log-density: use LowerBound(surrogate=True) or a critic")
        return self.target.diffused_log_prob(x, *self._alpha_sigma(level, x))

    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.network is not None:
            return self.network(x, level, condition)
        assert isinstance(self.target, DiffusibleTarget)
        return self.target.diffused_score(x, *self._alpha_sigma(level, x))

    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        return self.base.sample(batch_size, generator)

    def _alpha_sigma(self, level: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        sigma = level.to(x)
        return 1 - sigma if self.is_flow else (1 - sigma.square()).sqrt(), sigma


def _at_least_one(num_layers: int) -> int:
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: a hierarchy has at least 1 layer, and a whole number of them")
    return num_layers


def _mix(level: Tensor, base: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(1 - lambda) base + lambda target, for the level 1 - lambda; a base of weight 0 may be infinite."""
    return level * base(x) + (1 - level) * target(x) if bool(level.any()) else target(x)
