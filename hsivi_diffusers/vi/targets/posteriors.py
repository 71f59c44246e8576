"""Posteriors p(x | data) ~ p(data | x) p(x) of Bayesian models, each with its score in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from .target import Target


class LogisticRegression(Target):
    """Coefficients of a logistic regression: P(label = 1) = sigmoid(features @ x), x ~ N(0, prior_std^2 I).

    Features have the shape (N, d), with a column of ones where an intercept is wanted; labels 0 and 1 the shape (N,).

    Raises:
        ValueError: Shapes, labels or prior_std are others.
    """

    def __init__(self, features: Tensor, labels: Tensor, prior_std: float = 1.0) -> None:
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)}: give (N, d) and "
                "(N,), one label a row"
            )
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"labels hold {labels.unique().tolist()[:5]}: give 0 and 1 alone")
        _check_positive("prior_std", prior_std)
        self.features = features
        self.labels = labels.to(features)
        self.prior_std = prior_std
        self.dimension = features.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        sign = 2 * self.labels.to(x) - 1
        likelihood = logsigmoid(sign * (x @ self.features.to(x).T)).sum(1)
        return likelihood - 0.5 * x.square().sum(1) / self.prior_std**2

    def score(self, x: Tensor) -> Tensor:
        features = self.features.to(x)
        residual = self.labels.to(x) - (x @ features.T).sigmoid()
        return residual @ features - x / self.prior_std**2


class ConditionedDiffusion(Target):
    """Path of a double-well diffusion, seen at some of its points with noise.

    The path is that of dX = drift X (1 - X^2) dt + dW, X_0 = 0, by Euler-Maruyama: x_k = m(x_{k-1}) + sqrt(dt) w_k with
    m(x) = x + drift x (1 - x^2) dt, k = 1..d, x_0 = 0, up to the time `horizon`. The observations, shape (n,), are
    y_i = x_{every i} + noise_std v_i, so d = n every.

    Raises:
        ValueError: There is no observation, or another argument but the drift is not positive.
    """

    def __init__(
        self, observations: Tensor, every: int = 5, horizon: float = 1.0, drift: float = 10.0, noise_std: float = 0.1
    ) -> None:
        _check_vector("observations", observations)
        for name, value in {"every": every, "horizon": horizon, "noise_std": noise_std}.items():
            _check_positive(name, value)
        self.observations = observations
        self.every = every
        self.drift = drift
        self.noise_std = noise_std
        self.dimension = len(observations) * every
        self.dt = horizon / self.dimension

    def log_prob(self, x: Tensor) -> Tensor:
        steps = x - self._expected(pad(x, (1, -1)))
        misfit = self._misfit(x)
        return -0.5 * steps.square().sum(1) / self.dt - 0.5 * misfit.square().sum(1) / self.noise_std**2

    def score(self, x: Tensor) -> Tensor:
        """Each x_k ends one step and begins another."""
        noise = (x - self._expected(pad(x, (1, -1)))) / self.dt
        slope = 1 + self.drift * self.dt * (1 - 3 * x.square())
        observed = x.new_zeros(self.dimension)
        observed[self.every - 1 :: self.every] = 1 / self.noise_std**2
        misfit = self._misfit(x).repeat_interleave(self.every, 1)
        return slope * pad(noise, (-1, 1)) - noise - observed * misfit

    def _expected(self, x: Tensor) -> Tensor:
        return x + self.drift * self.dt * x * (1 - x.square())

    def _misfit(self, x: Tensor) -> Tensor:
        return x[:, self.every - 1 :: self.every] - self.observations.to(x)


class RareEvents(Target):
    """Logarithms of the rates of rare events in n groups, and their common mean; its marginals are skewed to the left.

    counts_i ~ Poisson(exposures_i exp(x_i)), x_i ~ N(mu, rate_std^2), mu ~ N(0, mean_std^2); d = n + 1, mu comes last.
    Counts >= 0 and exposures > 0 have the shape (n,).

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(self, counts: Tensor, exposures: Tensor, rate_std: float = 3.0, mean_std: float = 3.0) -> None:
        _check_vector("counts", counts)
        if exposures.shape != counts.shape or not (exposures > 0).all():
            raise ValueError(f"exposures {exposures.tolist()}: give one number > 0 for each of {len(counts)} counts")
        if not (counts >= 0).all():
            raise ValueError(f"counts {counts.tolist()}: give numbers >= 0")
        _check_positive("rate_std", rate_std)
        _check_positive("mean_std", mean_std)
        self.counts = counts
        self.exposures = exposures
        self.rate_std = rate_std
        self.mean_std = mean_std
        self.dimension = len(counts) + 1

    def log_prob(self, x: Tensor) -> Tensor:
        rates, mean = x[:, :-1], x[:, -1]
        likelihood = self.counts.to(x) * rates - self.exposures.to(x) * rates.exp()
        spread = 0.5 * (rates - mean[:, None]).square() / self.rate_std**2
        return (likelihood - spread).sum(1) - 0.5 * mean.square() / self.mean_std**2

    def score(self, x: Tensor) -> Tensor:
        rates, mean = x[:, :-1], x[:, -1:]
        pull = (rates - mean) / self.rate_std**2
        of_rates = self.counts.to(x) - self.exposures.to(x) * rates.exp() - pull
        of_mean = pull.sum(1, keepdim=True) - mean / self.mean_std**2
        return torch.cat([of_rates, of_mean], 1)


def conditioned_diffusion(seed: int = 0) -> ConditionedDiffusion:
    """Returns the example of d = 100 with 20 observations of a path that is simulated from the seed.

    Detommaso et al. 2018 (arXiv 1806.03085); also in Yu and Zhang 2023 (SIVI-SM).
    """
    generator = torch.Generator().manual_seed(seed)
    target = ConditionedDiffusion(torch.zeros(20))  # for its dynamics
    wiener = math.sqrt(target.dt) * torch.randn(target.dimension, generator=generator, dtype=torch.float32)
    path = [torch.zeros((), dtype=torch.float32)]
    for increment in wiener:
        path.append(target._expected(path[-1]) + increment)
    seen = torch.stack(path[target.every :: target.every])
    noise = torch.randn(len(seen), generator=generator, dtype=torch.float32)
    return ConditionedDiffusion(seen + target.noise_std * noise)


def rare_events() -> RareEvents:
    """Returns nine groups, most of which saw no event or one: d = 10."""
    counts = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0])
    exposures = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 3.0, 5.0, 1.0, 0.2])
    return RareEvents(counts, exposures)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}: give a number > 0")


def _check_vector(name: str, value: Tensor) -> None:
    if value.ndim != 1 or not len(value):
        raise ValueError(f"{name} of shape {tuple(value.shape)}: give a vector, shape (n,) with n > 0")
