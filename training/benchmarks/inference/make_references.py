"""Computes what the posteriors of the benchmarks look like, by long runs of NUTS (Pyro), in double precision.

    python -m training.benchmarks.inference.make_references --output_dir runs/references

NUTS walks in the coordinates z of x = mode + L z, where L L^T is the inverse Hessian at the mode: the posterior is
nearly N(0, I) there. The first half of the chains and the second are kept apart as well: how far they differ is the
floor below which no error against the reference means anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.runs.folders import claim_output_dir
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.vi import Target

from .benchmark_targets import Reference, make_target, save_reference
from .targets.whitened import Whitened

POSTERIORS = ["logistic_regression", "conditioned_diffusion", "rare_events"]
NUM_CHAINS = 4  # one after the other
NUM_DRAWS, NUM_WARMUP = 10_000, 1000  # of each chain, after the steps in which NUTS adapts
NUM_KEPT = 2000  # draws of all chains together that the file keeps


@dataclass
class Options:
    _group = "reference"
    targets: list[str] = option(POSTERIORS, "names of the posteriors")
    output_dir: str | None = option(None, "folder of the files <name>.safetensors")
    overwrite_output_dir: bool = option(False, "write to a folder that is not empty")


def run_chain(potential: Callable[[dict[str, Tensor]], Tensor], start: Tensor) -> tuple[Tensor, int]:
    """The draws of one chain, and how often it diverged."""
    divergences = []

    def watch(kernel: NUTS, position: Any, stage: str, number: int) -> None:
        if stage.startswith("Sample") and number == NUM_DRAWS - 1:
            divergences.extend(kernel.diagnostics()["divergences"])

    chain = MCMC(
        NUTS(potential_fn=potential),
        num_samples=NUM_DRAWS,
        warmup_steps=NUM_WARMUP,
        initial_params={"z": start},
        hook_fn=watch,
        disable_progbar=True,
    )
    chain.run()
    return chain.get_samples()["z"], len(divergences)


def run_chains(target: Target) -> tuple[Tensor, int]:
    """Draws of the posterior, shape (chains, draws, d), and the number of divergences."""
    whitened = Whitened(target)

    def potential(parameters: dict[str, Tensor]) -> Tensor:
        z = parameters["z"][None]
        at = z.detach()
        # the log-density, with the score as its gradient: faster than autograd
        return -whitened.log_prob(at)[0] - (whitened.score(at) * (z - at)).sum()

    chains, divergences = [], 0
    for number in range(NUM_CHAINS):
        pyro.set_rng_seed(number)
        start = torch.randn(target.dimension, dtype=torch.float64)
        draws, diverged = run_chain(potential, start)
        chains.append(whitened.unwhiten(draws))
        divergences += diverged
    return torch.stack(chains), divergences


def summarise(chains: Tensor) -> Reference:
    """Moments of all draws and of the halves, the draws that are kept, and how far all of it can be trusted."""
    halves = [half.flatten(0, 1) for half in chains.tensor_split(2)]
    (mean_1, covariance_1), (mean_2, covariance_2) = [(half.mean(0), half.T.cov()) for half in halves]
    draws = chains.flatten(0, 1)
    covariance = draws.T.cov()
    std = covariance.diagonal().sqrt()
    skewness = ((draws - draws.mean(0)) / std).pow(3).mean(0)
    # of the draws and of their squares, which the covariance is made of
    moments = torch.cat([chains, (chains - draws.mean(0)).square()], 2)
    quality = {
        "max_rhat": split_gelman_rubin(moments).max(),
        # one by one: its memory is that of (draws / 2)^2 numbers for each
        "min_ess": torch.stack([effective_sample_size(moment) for moment in moments.unbind(2)]).min(),
        "max_abs_skewness": skewness.abs().max(),
        "mean_floor": ((mean_1 - mean_2) / std).square().mean().sqrt(),
        "variance_floor": (covariance_1.diagonal() / covariance_2.diagonal() - 1).abs().max(),
        "covariance_floor": (covariance_1 - covariance_2).norm() / covariance_2.norm(),
    }
    kept = torch.linspace(0, len(draws) - 1, min(NUM_KEPT, len(draws)), dtype=torch.float64).round().long()
    metadata = {name: f"{float(value):.5g}" for name, value in quality.items()}
    moments_of_halves = mean_1, covariance_1, mean_2, covariance_2
    return Reference(draws.mean(0), covariance, *moments_of_halves, draws[kept], metadata)


def make_reference(name: str) -> Reference:
    began = time.perf_counter()
    chains, divergences = run_chains(make_target(name))
    reference = summarise(chains)
    origin = {
        "target": name,
        **{"num_chains": NUM_CHAINS, "num_draws": NUM_DRAWS, "num_warmup": NUM_WARMUP, "seed": 0},
        "divergences": divergences,
        "seconds": round(time.perf_counter() - began),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "date": date.today().isoformat(),
    }
    return reference._replace(metadata=reference.metadata | {key: str(value) for key, value in origin.items()})


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    folder = claim_output_dir(options.output_dir, options.overwrite_output_dir)
    for name in options.targets:
        reference = make_reference(name)
        path = save_reference(name, reference, folder)
        print(f"{path}: " + ", ".join(f"{key} {value}" for key, value in reference.metadata.items()), flush=True)


if __name__ == "__main__":
    run_command(main)
