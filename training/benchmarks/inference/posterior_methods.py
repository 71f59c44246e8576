"""Samplers of a posterior that are compared: two Gaussian fits, HSIVI, and NUTS.

    mean_field, full_rank    max over m, L of E log p(m + L z) + log det L,  L diagonal or triangular    (ADVI)
    hsivi                    a hierarchy in the coordinates z of x = m + L z of the full-rank fit
    nuts                     one chain of Pyro's NUTS, in double precision

ADVI is that of Kucukelbir et al. 2017 (arXiv 1603.00788), NUTS that of Hoffman & Gelman 2014 (arXiv 1111.4246).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import MultivariateNormal

from hsivi_diffusers.vi import GeometricBridge, Inference, IsotropicNormal, Target, cosine, pareto_k

from .targets.whitened import FullNormal, Whitened


@dataclass(frozen=True)
class Settings:
    """What the rows are made with; objective and base of HSIVI were chosen on seed 9 of the schools and the funnel."""

    draws: int = 2000  # of each method
    warmup: int = 500  # of each chain of NUTS
    reference_chains: int = 4
    reference_draws: int = 2500  # of each chain
    gaussian_steps: int = 3000
    gaussian_rate: float = 0.02  # falls to 0 by a cosine
    gaussian_batch: int = 32
    objective: str = "LB"
    num_layers: int = 3
    num_steps: int = 4000
    batch_size: int = 256
    base_std: float = 2.0  # the full-rank fit is often too narrow


QUICK = Settings(
    draws=100, warmup=20, reference_chains=2, reference_draws=50, gaussian_steps=20, num_steps=20, batch_size=32
)


class Fitted(NamedTuple):
    """Draws in R^d, shape (N, d), and what else a fit says of itself."""

    x: Tensor
    notes: dict[str, float]


def fit_gaussian(target: Target, full_rank: bool, seed: int, settings: Settings) -> FullNormal:
    """Maximises the evidence lower bound by Adam over Gaussians, with draws that are new at each step.

    Raises:
        ValueError: The fit diverged.
    """
    generator = torch.Generator().manual_seed(seed)
    dimension = target.dimension
    mean = torch.zeros(dimension, requires_grad=True)
    log_sd = torch.full((dimension,), -1.0, requires_grad=True)
    below = torch.zeros(dimension, dimension, requires_grad=full_rank)
    optimizer = torch.optim.Adam([mean, log_sd, *([below] if full_rank else [])], lr=settings.gaussian_rate)

    def scale() -> Tensor:
        return below.tril(-1) + log_sd.exp().diag()

    for step in range(settings.gaussian_steps):
        optimizer.param_groups[0]["lr"] = settings.gaussian_rate * cosine(step / settings.gaussian_steps)
        z = torch.randn(settings.gaussian_batch, dimension, generator=generator)
        bound = target.log_prob(mean + z @ scale().T).mean() + log_sd.sum()
        optimizer.zero_grad()
        (-bound).backward()
        torch.nn.utils.clip_grad_norm_([mean, log_sd, below], 100.0)
        optimizer.step()
    fit = FullNormal(mean.detach(), scale().detach())
    if not (fit.mean.isfinite().all() and fit.scale.isfinite().all()):
        raise ValueError("the Gaussian fit diverged")
    return fit


def gaussian(target: Target, full_rank: bool, seed: int, settings: Settings) -> Fitted:
    fit = fit_gaussian(target, full_rank, seed, settings)
    x = fit.sample(settings.draws, torch.Generator().manual_seed(1000 + seed))
    log_q = MultivariateNormal(fit.mean, scale_tril=fit.scale).log_prob(x)
    return Fitted(x, {"pareto_k": pareto_k(target.log_prob(x) - log_q)})


def hsivi(target: Target, seed: int, settings: Settings) -> Fitted:
    normal = fit_gaussian(target, True, seed, settings)
    whitened = Whitened(target, normal)
    inference = Inference(
        GeometricBridge(whitened, settings.num_layers, IsotropicNormal(target.dimension, settings.base_std)),
        settings.objective,
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        seed=seed,
    )
    inference.run(progress=False)
    z = inference.sample(settings.draws, 1000 + seed)
    log_weights = whitened.log_prob(z) - inference.log_prob(z, seed=seed)
    return Fitted(normal.unwhiten(z), {"pareto_k": pareto_k(log_weights)})


def nuts(target: Target, seed: int, settings: Settings) -> Fitted:
    return run_chain(target, seed, settings.warmup, settings.draws)


def run_chain(target: Target, seed: int, warmup: int, draws: int) -> Fitted:
    """One chain of NUTS, from a start of its own, and how often it diverged."""
    divergences: list[Any] = []

    def potential(parameters: dict[str, Tensor]) -> Tensor:
        return -target.log_prob(parameters["x"][None])[0]

    def watch(kernel: NUTS, position: Any, stage: str, number: int) -> None:
        if stage.startswith("Sample") and number == draws - 1:
            divergences.extend(kernel.diagnostics()["divergences"])

    pyro.set_rng_seed(seed)
    start = {"x": torch.randn(target.dimension, dtype=torch.float64)}
    kernel = NUTS(potential_fn=potential)
    chain = MCMC(kernel, draws, warmup, start, hook_fn=watch, disable_progbar=True)
    chain.run()
    return Fitted(chain.get_samples()["x"], {"divergences": len(divergences)})


METHODS: dict[str, Callable[[Target, int, Settings], Fitted]] = {
    "nuts": nuts,
    "mean_field": lambda target, seed, settings: gaussian(target, False, seed, settings),
    "full_rank": lambda target, seed, settings: gaussian(target, True, seed, settings),
    "hsivi": hsivi,
}
