"""The target of inference: a density p(x) on R^d, known up to a constant or by its score only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from .distributions import randn_like

LogProb = Callable[[Tensor], Tensor]
MAX_DIMENSION = 10**6


class Target(ABC):
    """A density on R^d; a subclass gives `log_prob`, `score` or both. By default the score is the gradient."""

    dimension: int  # d

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log p(x) + constant, shape (B,), for x of shape (B, d).

        Raises:
            NotImplementedError: Only the score is known.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has a score and no log-density: use LowerBound(surrogate=True) or a critic"
        )

    def score(self, x: Tensor) -> Tensor:
        """Returns grad_x log p(x), shape (B, d); on the graph of x where x has one."""
        return gradient(self.log_prob, x)

    def coordinate(self, k: int) -> str:
        """What a message calls x_k."""
        return f"coordinate {k}"


class SampledTarget(Target):
    """A density with exact draws, such as the base of a bridge."""

    @abstractmethod
    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Returns draws, shape (size, d)."""


class IsotropicNormal(SampledTarget):
    """N(0, std^2 I), the usual base.

    Raises:
        ValueError: std <= 0, or the dimension is not a whole number from 1 to 10^6.
    """

    def __init__(self, dimension: int, std: float = 1.0, device: torch.device | str | None = None) -> None:
        if not std > 0:
            raise ValueError(f"std={std}: a standard deviation is positive")
        self.dimension, self.std, self.device = check_dimension(dimension), std, device

    def log_prob(self, x: Tensor) -> Tensor:
        constant = self.dimension * math.log(self.std * math.sqrt(2 * math.pi))
        return -0.5 * (x / self.std).square().sum(1) - constant

    def score(self, x: Tensor) -> Tensor:
        return -x / self.std**2

    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        return self.std * randn_like(torch.empty(size, self.dimension, device=self.device), generator)


class DiffusibleTarget(SampledTarget):
    """A density whose diffused form, the law of alpha x + sigma z, is known; its own has alpha = 1 and sigma = 0."""

    @abstractmethod
    def diffused_log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns the log-density of the diffused law, shape (B,), at x of shape (B, d), with alpha > 0, sigma >= 0."""

    def diffused_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns the score of the diffused law, shape (B, d)."""
        return gradient(lambda x: self.diffused_log_prob(x, alpha, sigma), x)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.diffused_log_prob(x, *_undiffused(x))

    def score(self, x: Tensor) -> Tensor:
        return self.diffused_score(x, *_undiffused(x))


class LogProbTarget(Target):
    """A function as a target: x of shape (B, d) -> log p(x) + constant, shape (B,), differentiable by torch.

    Raises:
        ValueError: The dimension is not a whole number from 1 to 10^6, or a call of the function returns no tensor of
            that shape, or one without a gradient where it is needed.
    """

    def __init__(self, log_prob: LogProb, dimension: int) -> None:
        self._log_prob = log_prob
        self.dimension = check_dimension(dimension)

    def log_prob(self, x: Tensor) -> Tensor:
        try:
            value = self._log_prob(x)
        except Exception as error:
            error.add_note(
                f"log_prob was called with x of shape {tuple(x.shape)}: if that is wrong, check "
                f"dimension={self.dimension}; if x has parameters with bounds, such as a scale, take a NamedTarget"
            )
            raise
        return check_value(value, x, x.shape[:1], "log_prob")


class ScoreTarget(Target):
    """A target known by its score only: x -> grad log p(x), both of shape (B, d); see `LogProbTarget`.

    It serves `KullbackLeibler`, `LowerBound(surrogate=True)` and, if differentiable by torch, `ScoreMatching`.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], dimension: int) -> None:
        self._score = score
        self.dimension = check_dimension(dimension)

    def score(self, x: Tensor) -> Tensor:
        return check_value(self._score(x), x, x.shape, "score")


def as_target(source: Target | Distribution) -> Target:
    """Returns a target unchanged, and wraps a distribution of torch over R^d.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(source, Target):
        return source
    if isinstance(source, Distribution):
        return LogProbTarget(source.log_prob, _dimension_of(source))
    raise ValueError(
        f"a target of type {type(source).__name__}: give a Target, a torch distribution, or "
        "LogProbTarget(function, dimension)"
    )


def check_dimension(dimension: int) -> int:
    if not isinstance(dimension, int) or not 1 <= dimension <= MAX_DIMENSION:
        raise ValueError(f"dimension={dimension}: give the number of coordinates, a whole number from 1 to 1,000,000")
    return dimension


def check_value(value: object, x: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Returns the output of a user's function at x if it can be used."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} returned a {type(value).__name__}: write it in torch, and return a tensor")
    if value.shape != shape:
        raise ValueError(
            f"{name} returned the shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: return {tuple(shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad and not value.requires_grad:
        raise ValueError(
            f"{name} has no gradient in x: write it in torch, without detach, no_grad or NumPy; a score that cannot be "
            "differentiated goes with KullbackLeibler or LowerBound(surrogate=True)"
        )
    return value


def gradient(log_prob: LogProb, x: Tensor) -> Tensor:
    """Returns grad_x of log_prob at each row, shape (B, d), differentiable if x requires a gradient."""
    keep = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        point = x if keep else x.detach().requires_grad_(True)
        value = log_prob(point).sum()
        return torch.autograd.grad(value, point, create_graph=keep)[0]


def _undiffused(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_ones(len(x)), x.new_zeros(len(x))


def _dimension_of(distribution: Distribution) -> int:
    shape = distribution.event_shape
    if len(shape) != 1 or distribution.batch_shape:
        raise ValueError(
            f"{distribution} has event shape {tuple(shape)} and batch shape {tuple(distribution.batch_shape)}: a "
            "target is one law of vectors; wrap it in torch.distributions.Independent"
        )
    support = distribution.support
    if not _is_whole_space(support):
        raise ValueError(f"{distribution} lives on {support}: a target has all of R^d; transform it first")
    return int(shape[0])


def _is_whole_space(support: object) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is torch.distributions.constraints.real or support is torch.distributions.constraints.real_vector
