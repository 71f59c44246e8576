"""The updates of a run: `vi.fit` with its objective, after the fit to pairs, if there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..runs.bars import bar
from ..teachers.guidance import calls_of_step
from ..vi import (
    Chain,
    CriticObjective,
    DivergenceError,
    KullbackLeibler,
    Objective,
    PairChain,
    Regression,
    ScoreMatching,
    Stage,
    Step,
    WithPairs,
    cosine,
    fit,
    joint,
)
from ..vi.objectives import Scoring
from .bridge import TeacherBridge
from .config import HSIVIConfig
from .pairs import PAIR_CALLS, image_loss
from .state import TrainingState, trained

MAX_OVERFLOWS = 50
PAIR_LEARNING_RATE = 5e-4  # of the fit to pairs; it falls to 0
LATENT_PAIR_RATE = 2.5  # that of preset "latent", whose networks are of all sizes, in learning rates of the run
COARSE_WEIGHT = 20.0  # of the means over 4 x 4 fields in the loss of the pairs


class InterruptedRunError(Exception):
    """SIGTERM or Ctrl-C ended a run; what was done is in a checkpoint, and the message says how to continue."""


def make_objective(config: HSIVIConfig, bridge: TeacherBridge) -> CriticObjective:
    """Returns the objective with its weights in score units: sigma^2 times those in noise units."""
    weight = bridge.weight({"unit": 2.0, "sigma2": 4.0}[config.loss_weight])
    kind = KullbackLeibler if config.objective == "KL" else ScoreMatching
    objective: CriticObjective = kind(weight)
    loss = image_loss(bridge.scheduler, COARSE_WEIGHT)
    return WithPairs(objective, config.pair_weight, loss) if config.is_guided else objective


def scoring_of(config: HSIVIConfig) -> Scoring:
    """The way of the core; "between" differs in what the bridge makes of a draw."""
    return "own" if config.scoring == "own" else "random"


def run_updates(state: TrainingState, start_step: int) -> Iterator[Step]:
    """Trains from a step on; learning rates and the average of the weights have moved when a step is yielded.

    Raises:
        DivergenceError: A loss is not finite, or under fp16 the gradients overflowed 50 times in a row.
        InterruptedRunError: SIGTERM or Ctrl-C came before the first update.
    """
    config = state.config
    if start_step == 0 and config.num_pairs:
        _regress(state)
    objective = make_objective(config, state.bridge)
    steps = _fit(
        state,
        objective,
        state.chains,
        joint(state.student.num_layers, config.max_train_steps, critic_first=config.critic_first),
        critic=state.critic,
        critic_optimizer=state.critic_optimizer,
        critic_updates=config.critic_updates,
        scoring=scoring_of(config),
        start_step=start_step,
    )
    optimizers, overflows = (state.layer_optimizer, state.critic_optimizer), 0
    _relax(state, objective)
    for step in steps:
        skipped = [optimizer.step_was_skipped for optimizer in optimizers]  # by the loss scaling of fp16
        overflows = overflows + 1 if any(skipped) else 0
        if overflows == MAX_OVERFLOWS:
            raise DivergenceError("the gradient", step.step, sorted(set(step.layers.t.tolist())))
        still = step.step < config.critic_first
        for lr_scheduler, skip in zip(state.lr_schedulers, (skipped[0] or still, skipped[1]), strict=True):
            if not skip:
                lr_scheduler.step()
        state.ema.step(trained(state.student))
        _relax(state, objective)
        yield step


def _relax(state: TrainingState, objective: Objective) -> None:
    """Lets the weight of the pairs fall as the layers' rate does, so that the solver's faults do not stay."""
    if isinstance(objective, WithPairs):
        (rate, *_), first = state.lr_schedulers[0].get_last_lr(), state.config.learning_rate
        objective.weight = state.config.pair_weight * rate / first


def _fit(
    state: TrainingState,
    objective: Objective,
    chains: list[Chain],
    curriculum: list[Stage],
    critic: nn.Module | None = None,
    **settings: Any,
) -> Iterator[Step]:
    """`vi.fit` of the layers, with the settings that are the same whatever they are fitted by."""
    accelerator, config = state.accelerator, state.config
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm

    def clip_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
        return accelerator.clip_grad_norm_(list(parameters), limit)

    return fit(
        state.layers,
        critic,
        state.bridge,
        objective,
        chains,
        curriculum,
        layer_optimizer=state.layer_optimizer,
        seed=config.seed,
        rank=accelerator.process_index,
        backward=accelerator.backward,
        no_sync=accelerator.no_sync,
        clip_grad_norm=clip_grad_norm,
        skips_overflows=accelerator.scaler is not None,
        **settings,
    )


def fit_calls(state: TrainingState) -> tuple[int, int]:
    """Network calls, in all processes, that make the pairs, and that fit the layers to them before the updates."""
    pairs = state.pairs_per_micro_batch * state.micro_batches
    calls = PAIR_CALLS * calls_of_step(state.bridge.network.unet)
    return (pairs * calls, state.config.pair_steps * state.rows) if pairs else (0, 0)


def _regress(state: TrainingState) -> None:
    """Fits the layers to the pairs by their optimizer, at a rate that falls to 0.

    The optimizer then starts over.
    """
    config, group = state.config, state.layer_optimizer.param_groups[0]
    depths, size = state.student.depths, config.train_batch_size
    chains: list[Chain] = [
        PairChain(partial(state.sample_pairs, place), depths, size) for place in range(len(state.chains))
    ]
    latent = config.preset == "latent"
    highest = LATENT_PAIR_RATE * config.learning_rate if latent else PAIR_LEARNING_RATE
    rate, objective = group["lr"], Regression(image_loss(state.student.scheduler))
    steps = _fit(state, objective, chains, joint(sum(depths), config.pair_steps))
    for step in bar(range(config.pair_steps), "regress", disable=not state.accelerator.is_main_process):
        group["lr"] = highest * cosine(step / config.pair_steps)
        try:
            next(steps)
        except DivergenceError as error:
            raise DivergenceError("the loss of the fit to the pairs", error.step, error.layers) from error
        if state.accelerator.check_trigger():
            raise InterruptedRunError(
                "stopped before the first update, nothing was saved: start again with resume_from_checkpoint latest, "
                "from Python in a new HSIVITrainer"
            )
    if not config.is_guided:
        state.pairs.cache_clear()
    group["lr"] = rate
    state.layer_optimizer.state.clear()
    for average, parameter in zip(state.ema.shadow_params, trained(state.student), strict=True):
        average.copy_(parameter.detach())
