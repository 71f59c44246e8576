"""Posteriors p(x | data) ~ p(data | x) p(x) of Bayesian models, each with its score in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from hsivi_diffusers.vi import Target


class LogisticRegression(Target):
    """Coefficients of a logistic regression: P(label = 1) = sigmoid(features @ x), x ~ N(0, I).

    Features have the shape (N, d), with a column of ones where an intercept is wanted; labels 0 and 1 the shape (N,).

    Raises:
        ValueError: Shapes or labels are others.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)}: give (N, d) and "
                "(N,), one label a row"
            )
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"labels hold {labels.unique().tolist()[:5]}: give 0 and 1 alone")
        self.features = features
        self.labels = labels.to(features)
        self.dimension = features.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        sign = 2 * self.labels.to(x) - 1
        likelihood = logsigmoid(sign * (x @ self.features.to(x).T)).sum(1)
        return likelihood - 0.5 * x.square().sum(1)

    def score(self, x: Tensor) -> Tensor:
        features = self.features.to(x)
        residual = self.labels.to(x) - (x @ features.T).sigmoid()
        return residual @ features - x


class ConditionedDiffusion(Target):
    """Path of a double-well diffusion in d = 100 points, every fifth of which was seen with noise.

    The path is that of dX = 10 X (1 - X^2) dt + dW, X_0 = 0, by Euler-Maruyama: x_k = m(x_{k-1}) + sqrt(dt) w_k with
    m(x) = x + 10 x (1 - x^2) dt, dt = 1/100, x_0 = 0. The observations, shape (20,), are simulated: y_i = x_{5 i} +
    0.1 v_i. Detommaso et al. 2018 (arXiv 1806.03085); also in Yu and Zhang 2023 (SIVI-SM).
    """

    dimension, dt = 100, 0.01
    every, noise_std = 5, 0.1

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        wiener = math.sqrt(self.dt) * torch.randn(self.dimension, generator=generator, dtype=torch.float32)
        path = [torch.zeros((), dtype=torch.float32)]
        for increment in wiener:
            path.append(self._expected(path[-1]) + increment)
        seen = torch.stack(path[self.every :: self.every])
        noise = torch.randn(len(seen), generator=generator, dtype=torch.float32)
        self.observations = seen + self.noise_std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        steps = x - self._expected(pad(x, (1, -1)))
        misfit = self._misfit(x)
        return -0.5 * steps.square().sum(1) / self.dt - 0.5 * misfit.square().sum(1) / self.noise_std**2

    def score(self, x: Tensor) -> Tensor:
        """Each x_k ends one step and begins another."""
        noise = (x - self._expected(pad(x, (1, -1)))) / self.dt
        slope = 1 + 10.0 * self.dt * (1 - 3 * x.square())
        observed = x.new_zeros(self.dimension)
        observed[self.every - 1 :: self.every] = 1 / self.noise_std**2
        misfit = self._misfit(x).repeat_interleave(self.every, 1)
        return slope * pad(noise, (-1, 1)) - noise - observed * misfit

    def _expected(self, x: Tensor) -> Tensor:
        return x + 10.0 * self.dt * x * (1 - x.square())

    def _misfit(self, x: Tensor) -> Tensor:
        return x[:, self.every - 1 :: self.every] - self.observations.to(x)


class RareEvents(Target):
    """Logarithms of the rates of rare events in nine groups, and their common mean; its marginals are skewed.

    counts_i ~ Poisson(exposures_i exp(x_i)), x_i ~ N(mu, 3^2), mu ~ N(0, 3^2); d = 10, mu comes last.
    """

    dimension = 10

    def __init__(self) -> None:
        self.counts = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0])
        self.exposures = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 3.0, 5.0, 1.0, 0.2])

    def log_prob(self, x: Tensor) -> Tensor:
        rates, mean = x[:, :-1], x[:, -1]
        likelihood = self.counts.to(x) * rates - self.exposures.to(x) * rates.exp()
        spread = 0.5 * (rates - mean[:, None]).square() / 9.0
        return (likelihood - spread).sum(1) - 0.5 * mean.square() / 9.0

    def score(self, x: Tensor) -> Tensor:
        rates, mean = x[:, :-1], x[:, -1:]
        pull = (rates - mean) / 9.0
        of_rates = self.counts.to(x) - self.exposures.to(x) * rates.exp() - pull
        of_mean = pull.sum(1, keepdim=True) - mean / 9.0
        return torch.cat([of_rates, of_mean], 1)
