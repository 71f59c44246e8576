"""Five posteriors over named parameters, as in posteriordb (github.com/stan-dev/posteriordb) but with data made here.

    eight_schools_centred, eight_schools_noncentred      y_j ~ N(theta_j, s_j^2), theta_j ~ N(mu, tau^2)
    logistic_regression                                  labels ~ Bernoulli(sigmoid(a + X b))
    poisson_groups                                       counts ~ Poisson(exp(a + X b + sigma z_group))
    funnel                                               v ~ N(0, 3^2), z_i ~ N(0, exp(v)), ten dimensions

The schools are those of Rubin (1981), the priors N(0, 5^2) of mu and a half-Cauchy law of scale 5 of tau; the funnel is
that of Neal (2003, Slice sampling, sec. 8). Both have exact draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from hsivi_diffusers.vi import NamedTarget

Samples = dict[str, Tensor]
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Model(NamedTuple):
    """A posterior, and how its fits are compared."""

    target: NamedTarget
    quantities: Callable[[Samples], Tensor]  # samples -> what is compared, in R^k: shape (N, k)
    exact: Callable[[int, torch.Generator], Samples] | None = None  # (N, generator) -> exact draws, where known


def normal(x: Tensor, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    """Returns log N(x; mean, sd^2) + constant in x, mean and sd, of the shape of x."""
    return -0.5 * ((x - mean) / sd).square() - torch.as_tensor(sd).log()


def half_cauchy(x: Tensor, scale: float) -> Tensor:
    """Returns the log-density of a half-Cauchy law, plus a constant."""
    return -(x / scale).square().log1p()


def eight_schools(centred: bool) -> Model:
    """Effects of coaching in eight schools, d = 10; not centred they are mu + tau eta, eta ~ N(0, I)."""
    effect = "theta" if centred else "eta"

    def effects(of: Samples) -> Tensor:
        return of["theta"] if "theta" in of else of["mu"][:, None] + of["tau"][:, None] * of["eta"]

    def log_prob(of: Samples) -> Tensor:
        mean, scale = (of["mu"][:, None], of["tau"][:, None]) if centred else (0.0, 1.0)
        likelihood = normal(effects(of), EFFECTS.to(of["mu"]), ERRORS.to(of["mu"])).sum(1)
        prior = normal(of["mu"], 0.0, 5.0) + half_cauchy(of["tau"], 5.0)
        return likelihood + prior + normal(of[effect], mean, scale).sum(1)

    def quantities(of: Samples) -> Tensor:
        return torch.cat([of["mu"][:, None], of["tau"].log()[:, None], effects(of)], 1)

    def exact(size: int, generator: torch.Generator) -> Samples:
        of = exact_schools(size, generator)
        return {"mu": of["mu"], "tau": of["tau"], effect: effects(of)} if centred else of

    target = NamedTarget(
        log_prob, {"mu": constraints.real, "tau": constraints.positive, effect: (constraints.real, (8,))}
    )
    return Model(target, quantities, exact)


def exact_schools(size: int, generator: torch.Generator) -> Samples:
    """Draws tau on a fine grid of log tau, then mu and eta, which are Gaussian (Gelman et al., BDA3, sec. 5.4)."""
    log_tau = torch.linspace(-12, 6, 20_001).double()
    variance = ERRORS.double().square() + log_tau.exp()[:, None].square()  # of y_j given mu and tau
    precision = variance.reciprocal().sum(1) + 1 / 25
    center = (EFFECTS / variance).sum(1) / precision
    evidence = normal(EFFECTS.double(), center[:, None], variance.sqrt()).sum(1) + normal(center, 0.0, 5.0)
    log_mass = evidence - 0.5 * precision.log() + half_cauchy(log_tau.exp(), 5.0) + log_tau
    rows = torch.multinomial(log_mass.softmax(0), size, replacement=True, generator=generator)
    mu = center[rows] + torch.randn(size, generator=generator) / precision[rows].sqrt()
    tau = log_tau[rows].exp()
    ratio = tau[:, None] / ERRORS.square()
    shrinkage = 1 + tau[:, None] * ratio
    noise = torch.randn(size, 8, generator=generator)
    eta = ratio * (EFFECTS - mu[:, None]) / shrinkage + noise / shrinkage.sqrt()
    return {"mu": mu.float(), "tau": tau.float(), "eta": eta.float()}


def logistic_data() -> tuple[Tensor, Tensor]:
    """Five correlated features of 60 rows, of which two matter, and labels 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(5) + 0.6 * torch.randn(5, 5, generator=generator)
    features = torch.randn(60, 5, generator=generator) @ mixing
    chance = (0.5 + features @ torch.tensor([2.0, -1.5, 0.0, 0.0, 0.0])).sigmoid()
    return features, torch.bernoulli(chance, generator=generator)


def logistic_regression() -> Model:
    """A regression of few labels, d = 6: a skewed posterior."""
    features, labels = logistic_data()
    sign = 2 * labels - 1

    def log_prob(of: Samples) -> Tensor:
        logits = of["a"][:, None] + of["b"] @ features.to(of["b"]).T
        prior = normal(of["a"], 0.0, 5.0) + normal(of["b"], 0.0, 2.5).sum(1)
        return logsigmoid(sign.to(logits) * logits).sum(1) + prior

    target = NamedTarget(log_prob, {"a": constraints.real, "b": (constraints.real, (5,))})
    return Model(target, target.unconstrain)


def poisson_data() -> tuple[Tensor, Tensor, Tensor]:
    """Two features, the group, and the count of 40 rows in ten groups."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 2, generator=generator)
    group = torch.arange(40) % 10
    effects = 0.6 * torch.randn(10, generator=generator)[group]
    rates = (0.5 + features @ torch.tensor([0.8, -0.4]) + effects).exp()
    return features, group, torch.poisson(rates, generator=generator)


def poisson_groups() -> Model:
    """A regression of counts, with an effect of each group: d = 14."""
    features, group, counts = poisson_data()

    def log_prob(of: Samples) -> Tensor:
        effects = of["sigma"][:, None] * of["z"][:, group]
        log_rate = of["a"][:, None] + of["b"] @ features.to(of["b"]).T + effects
        likelihood = (counts.to(log_rate) * log_rate - log_rate.exp()).sum(1)
        prior = normal(of["a"], 0.0, 2.0) + normal(of["b"], 0.0, 2.0).sum(1) + normal(of["sigma"], 0.0, 1.0)
        return likelihood + prior + normal(of["z"], 0.0, 1.0).sum(1)

    def quantities(of: Samples) -> Tensor:
        logs = of["sigma"].log()[:, None]
        return torch.cat([of["a"][:, None], of["b"], logs, of["sigma"][:, None] * of["z"]], 1)

    target = NamedTarget(
        log_prob,
        {
            "a": constraints.real,
            "b": (constraints.real, (2,)),
            "sigma": constraints.positive,
            "z": (constraints.real, (10,)),
        },
    )
    return Model(target, quantities)


def funnel() -> Model:
    """Neal's funnel, d = 10: where v is low the other nine coordinates are narrow."""

    def log_prob(of: Samples) -> Tensor:
        return normal(of["v"], 0.0, 3.0) + normal(of["z"], 0.0, (of["v"] / 2).exp()[:, None]).sum(1)

    def exact(size: int, generator: torch.Generator) -> Samples:
        v = 3 * torch.randn(size, generator=generator)
        return {"v": v, "z": (v / 2).exp()[:, None] * torch.randn(size, 9, generator=generator)}

    def quantities(of: Samples) -> Tensor:
        """v, and asinh of the others, whose tails are too heavy for moments."""
        return torch.cat([of["v"][:, None], of["z"].asinh()], 1)

    target = NamedTarget(log_prob, {"v": constraints.real, "z": (constraints.real, (9,))})
    return Model(target, quantities, exact)


MODELS: dict[str, Callable[[], Model]] = {
    "eight_schools_centred": lambda: eight_schools(centred=True),
    "eight_schools_noncentred": lambda: eight_schools(centred=False),
    "logistic_regression": logistic_regression,
    "poisson_groups": poisson_groups,
    "funnel": funnel,
}
