r"""Named parameters with constraints: a density over a dictionary of tensors, as a target on R^d.

    log p(x) = log p(theta_1, ..., theta_m) + sum_i log |det d theta_i / d x_i|,   theta_i = f_i(x_i)

f_i is torch's bijection for the constraint of the i-th parameter, `torch.distributions.biject_to`, and x is x_1, ...,
x_m side by side (change of variables; Kucukelbir et al. 2017, arXiv 1603.00788, sec. 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint

from .targets import Target, check_dimension, check_value

Samples = dict[str, Tensor]


class Parameter(NamedTuple):
    """A parameter theta = f(x)."""

    constraint: Constraint
    shape: tuple[int, ...]  # of theta
    transform: Transform  # f
    free_shape: torch.Size  # of x


class NamedTarget(Target):
    """A log-density over named parameters with constraints, as a target on R^d.

    For example eight schools:

        parameters = {"mu": constraints.real, "tau": constraints.positive, "theta": (constraints.real, (8,))}
        target = NamedTarget(log_prob, parameters)

    Layers are fitted to the target, and `constrain` brings their draws back.

    Args:
        log_prob: A dictionary of tensors of shape (B, *shape) -> log p + constant, shape (B,), differentiable by torch.
        parameters: The constraint of each name, from `torch.distributions.constraints`, for a number; or (constraint,
            shape) for a tensor. The shape is a whole one: K of a simplex of K numbers is in it.

    Attributes:
        dimension: d, of all parameters without their constraints: K - 1 for a simplex of K numbers.

    Raises:
        ValueError: A constraint is none, is discrete or has no bijection; a shape does not fit its constraint. Later:
            `log_prob` asks for a name that is no parameter, or returns another shape.
    """

    def __init__(
        self,
        log_prob: Callable[[Samples], Tensor],
        parameters: Mapping[str, Constraint | tuple[Constraint, tuple[int, ...]]],
    ) -> None:
        self._log_prob = log_prob
        self.parameters = {name: _parameter(name, of) for name, of in parameters.items()}
        self._sizes = [parameter.free_shape.numel() for parameter in self.parameters.values()]
        self.dimension = check_dimension(sum(self._sizes))

    def constrain(self, x: Tensor) -> Samples:
        """Returns the parameters at x of shape (B, d): for each name a tensor of shape (B, *shape)."""
        return {name: self.parameters[name].transform(free) for name, free in self._split(x).items()}

    def unconstrain(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Returns the x of shape (B, d) with `constrain(x)` equal to the samples, tensors of shape (B, *shape).

        Raises:
            ValueError: A name is missing or unknown, a shape is another, or a value is outside its constraint or at its
                end.
        """
        if samples.keys() != self.parameters.keys():
            raise ValueError(f"the samples are {_listed(samples)}, and the parameters {_listed(self.parameters)}")
        size = min(len(value) if value.ndim else 0 for value in samples.values())
        for name, parameter in self.parameters.items():
            value, shape = samples[name], (size, *parameter.shape)
            if value.shape != shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}: give {shape}")
            if bad := int((~parameter.constraint.check(value)).sum()):
                raise ValueError(f"{name}: {bad} of its values do not satisfy the constraint {parameter.constraint}")
        free = [self.parameters[name].transform.inv(samples[name]) for name in self.parameters]
        for name, each in zip(self.parameters, free, strict=True):
            if bad := int((~each.isfinite()).sum()):
                raise ValueError(f"{name}: {bad} of its values are at the end of {self.parameters[name].constraint}")
        return torch.cat([each.reshape(size, of) for each, of in zip(free, self._sizes, strict=True)], 1)

    def coordinate(self, k: int) -> str:
        """x_k and the parameter it is of, such as "coordinate 3 (w[2])"; x has it without its constraint."""
        indices = {name: product(*map(range, of.free_shape)) for name, of in self.parameters.items()}
        names = [f"{name}{[*index] or ''}" for name, each in indices.items() for index in each]
        return f"coordinate {k} ({names[k]})"

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density, shape (B,).

        It is -inf, with an infinite score, where a parameter is rounded to an end of its constraint that the
        distributions of `log_prob` refuse, such as a scale of exp(-200) = 0.
        """
        try:
            return self._log_density(x)
        except ValueError:
            if bool((inside := self._inside(x.detach())).all()):
                raise
        value = self._log_density(torch.where(inside[:, None], x, 0))
        outside = torch.where(inside[:, None], x.detach(), x)  # keeps the infinite score from the rows inside
        return torch.where(inside, value, -math.inf * outside.square().sum(1))

    def _inside(self, x: Tensor) -> Tensor:
        """Whether each row's parameters satisfy their constraints, rounded as they are, shape (B,)."""
        inside = x.isfinite().all(1)
        for name, theta in self.constrain(x).items():
            holds = self.parameters[name].constraint.check(theta)
            inside &= holds.reshape(len(x), -1).all(1) & theta.reshape(len(x), -1).isfinite().all(1)
        return inside

    def _log_density(self, x: Tensor) -> Tensor:
        free = self._split(x)
        theta = _Named({name: self.parameters[name].transform(free[name]) for name in free})
        value = check_value(self._log_prob(theta), x, x.shape[:1], "log_prob")
        for name in free:
            value = value + _log_jacobian(self.parameters[name].transform, free[name], theta[name])
        return value

    def _split(self, x: Tensor) -> Samples:
        """x_i of each parameter, of shape (B, *free_shape).

        Raises:
            ValueError: x has another shape than (B, d).
        """
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"x has the shape {tuple(x.shape)}: give (B, {self.dimension}), without constraints")
        parts = zip(self.parameters.items(), x.split(self._sizes, 1), strict=True)
        return {name: part.reshape(len(x), *parameter.free_shape) for (name, parameter), part in parts}


class _Named(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"log_prob asks for {name!r}, and the parameters are {_listed(self)}")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"


def _parameter(name: str, of: Constraint | tuple[Constraint, tuple[int, ...]]) -> Parameter:
    constraint, shape = of if isinstance(of, tuple) and len(of) == 2 else (of, ())
    if not isinstance(constraint, Constraint):
        raise ValueError(
            f"{name}: {of!r} is no constraint: give one of torch.distributions.constraints, or (constraint, shape)"
        )
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"{name} has the shape {shape!r}: give a tuple of whole numbers >= 1, such as (8,)")
    try:
        transform, together = biject_to(constraint), constraint.event_dim
    except NotImplementedError as error:
        remedy = "sum a discrete parameter out, or take another constraint"
        raise ValueError(f"{name}: torch has no bijection from R^n to {constraint}: {remedy}") from error
    if len(shape) < together:
        raise ValueError(
            f"{name} has the shape {shape}: {constraint} constrains the last {together} dimensions together"
        )
    try:
        free_shape = torch.Size(transform.inverse_shape(torch.Size(shape)))
    except ValueError as error:
        raise ValueError(f"{name} has the shape {shape}, which {constraint} does not fit: {error}") from error
    return Parameter(constraint, shape, transform, free_shape)


def _log_jacobian(transform: Transform, free: Tensor, theta: Tensor) -> Tensor:
    """Returns log |det d theta / d x| of each row, shape (B,)."""
    value: Tensor = transform.log_abs_det_jacobian(free, theta)
    return value.flatten(1).sum(1) if value.ndim > 1 else value
