"""One fit of a benchmark's target: how it is set up from plain numbers, run, and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.vi import (
    Bridge,
    DiagonalGaussian,
    DiffusibleTarget,
    DiffusionBridge,
    GeometricBridge,
    Inference,
    IsotropicNormal,
    LowerBound,
    Objective,
    ResidualMLP,
    SampledTarget,
    ScoreMLP,
    Target,
)
from hsivi_diffusers.vi.inference import OBJECTIVES

from .agreement import compare, compare_moments
from .benchmark_targets import TARGETS, load_reference, make_target
from .targets.whitened import Whitened, laplace, moment_match

JS_DRAWS, DRAWS = 50_000, 20_000


@dataclass(frozen=True)
class Fit:
    """What a fit is made of."""

    _group = "fit"
    target: str = option("checkerboard", f"one of {', '.join(TARGETS)}")
    num_layers: int = option(5, "T; 1 is semi-implicit inference without a hierarchy")
    objective: Literal["LB", "SM", "KL"] = option("LB", "of each layer")
    bridge: Literal["diffusion", "geometric"] = option("diffusion", "from the base to the target")
    training: Literal["sequential", "joint"] = option("sequential", "layer by layer, or all together")
    seed: int = option(0, "of parameters and draws")
    num_steps: int = option(8000, "layer updates in all")
    batch_size: int = option(256, "B")
    parameters: int = option(30_000, "of all layers together, about; the width follows from it")
    depth: int = option(3, "hidden layers of each network")
    base_std: float = option(2.5, "of the base of a geometric bridge; 1 for a whitened target")
    learning_rate: float = option(4e-3, "of the layers")
    critic_learning_rate: float = option(4e-3, "of the critic")
    critic_updates: int = option(1, "for each layer update")
    whitening: Literal["none", "laplace", "moments"] = option("none", "moments: of rounds of KL at T = 1 before")
    whitening_steps: int = option(1000, "layer updates of each round")
    whitening_rounds: int = option(2, "rounds")


@dataclass(frozen=True)
class Fitted:
    """An inference, the way back to the target's own coordinates, and the CPU seconds of its whitening."""

    inference: Inference
    unwhiten: Callable[[Tensor], Tensor]
    target: Target
    seconds: float = 0.0

    def sample(self, size: int, seed: int) -> Tensor:
        """Draws in the target's coordinates, shape (size, d)."""
        return self.unwhiten(self.inference.sample(size, seed))


def prepare(fit: Fit) -> Fitted:
    """Sets a fit up, rounds of whitening included; nothing of the fit itself is trained."""
    if fit.whitening != "none" and fit.bridge == "diffusion":
        raise ValueError("--whitening changes the target, so that its diffused form is unknown: use --bridge geometric")
    target = make_target(fit.target)
    if fit.whitening == "none":
        return Fitted(_inference(target, fit), lambda x: x, target)
    whitened, seconds = _whiten(target, fit)
    return Fitted(_inference(whitened, fit), whitened.unwhiten, target, seconds)


def run(fit: Fit, progress: bool = False) -> tuple[Fitted, float]:
    """Does a whole fit, with a progress bar or without; returns it and the CPU seconds it took."""
    fitted = prepare(fit)
    begin = time.process_time()
    for _ in bar(fitted.inference.steps(), total=fit.num_steps, unit="step", disable=not progress):
        pass
    return fitted, fitted.seconds + time.process_time() - begin


def measure(draw: Callable[[int, int], Tensor], name: str) -> dict[str, float]:
    """Measures a sampler, (size, seed) -> (size, d), against exact draws of a target or a posterior's reference."""
    target = make_target(name)
    if isinstance(target, SampledTarget):
        exact = target.sample(JS_DRAWS, torch.Generator().manual_seed(10_000))
        return compare(draw(JS_DRAWS, 1), exact, target)
    reference = load_reference(name)
    return compare_moments(draw(DRAWS, 1), reference.mean, reference.covariance, reference.draws, target)


def width_of(fit: Fit, dimension: int, networks: int, takes_level: bool = False) -> int:
    """Width at which so many networks of `GaussianMLP` have about the parameters of a fit together, at least 8.

    One has 2 d w + (depth - 1) w (w + 1) + w + 2 d + d^2 of them, and 16 w more if it takes a level.
    """
    each = fit.parameters / networks - dimension**2 - 2 * dimension
    linear = 2 * dimension + fit.depth + (ResidualMLP.NUM_COSINES if takes_level else 0)
    if fit.depth == 1:
        return max(8, round(each / linear))
    root = math.sqrt(max(0.0, linear**2 + 4 * (fit.depth - 1) * each))
    return max(8, round((root - linear) / (2 * (fit.depth - 1))))


def _whiten(target: Target, fit: Fit) -> tuple[Whitened, float]:
    if fit.whitening == "laplace":
        begin = time.process_time()
        return Whitened(target, laplace(target)), time.process_time() - begin
    width = width_of(fit, target.dimension, 1)
    return rough_fits(fit.target, fit.seed, fit.whitening_rounds, fit.whitening_steps, width, fit.depth)


@cache
def rough_fits(name: str, seed: int, rounds: int, num_steps: int, width: int, depth: int) -> tuple[Whitened, float]:
    """A target whitened by fits of KL with one layer, each in the coordinates of the one before; CPU seconds."""
    begin = time.process_time()
    target = make_target(name)
    here: Whitened | None = None
    for number in range(rounds):
        rough = Inference(
            GeometricBridge(here or target, 1),
            "KL",
            "sequential",
            num_steps=num_steps,
            width=width,
            depth=depth,
            learning_rate=2e-3,
            seed=1000 * (number + 1) + seed,
        )
        rough.run()
        draws = rough.sample(DRAWS, seed=seed)
        here = Whitened(target, moment_match(here.unwhiten(draws) if here else draws))
    if here is None:
        raise ValueError("--whitening_rounds 0: give 1 or more, or --whitening none")
    return here, time.process_time() - begin


def _inference(target: Target, fit: Fit) -> Inference:
    bridge, joint = _make_bridge(target, fit), fit.training == "joint"
    return Inference(
        bridge,
        _make_objective(bridge, fit),
        fit.training,
        num_steps=fit.num_steps,
        batch_size=fit.batch_size,
        width=width_of(fit, target.dimension, 1 if joint else fit.num_layers, takes_level=joint),
        depth=fit.depth,
        learning_rate=fit.learning_rate,
        critic=None if fit.objective == "LB" else _make_critic(target, fit),
        critic_learning_rate=fit.critic_learning_rate,
        critic_updates=fit.critic_updates,
        seed=fit.seed,
    )


def _make_critic(target: Target, fit: Fit) -> ScoreMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        return ScoreMLP(target.dimension, width_of(fit, target.dimension, 1), fit.depth)


def _make_bridge(target: Target, fit: Fit) -> Bridge:
    if fit.bridge == "geometric":
        std = fit.base_std if fit.whitening == "none" else 1.0
        return GeometricBridge(target, fit.num_layers, base=IsotropicNormal(target.dimension, std))
    if isinstance(target, DiffusibleTarget) or not isinstance(target, SampledTarget):
        return DiffusionBridge(target, fit.num_layers)
    return DiffusionBridge(target, fit.num_layers, score_network=score_network(fit.target))


def _make_objective(bridge: Bridge, fit: Fit) -> Objective:
    if fit.objective == "LB" and isinstance(bridge, DiffusionBridge) and bridge.network is not None:
        return LowerBound(surrogate=True)
    return OBJECTIVES[fit.objective]()


@cache
def score_network(name: str, num_steps: int = 4000) -> ScoreMLP:
    """The score of a diffused target, learnt from exact draws by denoising score matching, weighted by sigma^2."""
    target = make_target(name)
    assert isinstance(target, SampledTarget)
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ScoreMLP(target.dimension, 128, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        x = target.sample(512, random)
        sigma = 0.05 + 0.94 * torch.rand(len(x), generator=random).square()
        q = DiagonalGaussian((1 - sigma.square()).sqrt()[:, None] * x, sigma[:, None].expand_as(x))
        noised = q.rsample(torch.randn(x.shape, generator=random))
        error = network(noised, sigma) - q.score(noised)
        (0.5 * sigma.square() * error.square().sum(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return network.eval()
