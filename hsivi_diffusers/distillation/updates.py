"""The updates of a run: `vi.fit` with its objective, after the fit to pairs, if there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..runs.bars import bar
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
from .config import HSIVIConfig
from .game import TeacherBridge
from .pairs import InterruptedRunError, end_levels, image_loss, layers_by_pairs, pair_levels
from .state import TrainingState, trained

MAX_OVERFLOWS = 50
PAIR_STEPS = 500  # updates of the fit to pairs
PAIR_WEIGHT = 0.02  # of the pairs in the loss of their rows after that fit; it falls as the student's rate does
PAIR_LEARNING_RATE = 5e-4  # of the fit to pairs; it falls to 0
LATENT_PAIR_RATE = 2.5  # that of preset "latent", whose networks are of all sizes, in learning rates of the run
COARSE_WEIGHT = 20.0  # of the means over 4 x 4 fields in the loss of the pairs


def make_objective(config: HSIVIConfig, bridge: TeacherBridge) -> CriticObjective:
    """Returns the objective with its weights in score units: sigma^2 times those in noise units.

    In noise units they are 1 with KL, and sigma^2 with SM, as in the paper.
    """
    matches = config.objective == "SM"
    return (ScoreMatching if matches else KullbackLeibler)(bridge.weight(4.0 if matches else 2.0))


def check_objective(objective: CriticObjective | None, config: HSIVIConfig) -> None:
    """Refuses, with ValueError, an objective of the user that cannot be used as the config scores layers."""
    if objective is not None and objective.critic_gradient and (config.scoring == "between" or config.noise_eta == 0):
        raise ValueError(
            f"objective={type(objective).__name__}(...) takes a gradient through the critic, which scoring='between' "
            "and noise_eta=0 exclude: set scoring to 'own' or 'random', and noise_eta above 0"
        )


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
    if config.num_pairs and start_step < config.max_train_steps:
        try:
            with state.counting_paused():  # `fit_calls` knows them
                for index in range(len(state.chains)):
                    state.pairs(index)
                if start_step == 0 and _fits(state):
                    _regress(state)
        except InterruptedRunError as error:
            raise InterruptedRunError(
                f"stopped before update {start_step + 1}; the pairs made so far were kept, a fit to them starts anew: "
                "continue with resume_from_checkpoint latest, from Python in a new HSIVITrainer"
            ) from error
    objective = state.objective or make_objective(config, state.bridge)
    if config.num_pairs:
        loss = image_loss(state.bridge.scheduler, COARSE_WEIGHT)
        objective = WithPairs(objective, PAIR_WEIGHT, loss, alone=layers_by_pairs(state.student.depths))
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
        objective.weight = PAIR_WEIGHT * rate / first


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
    pairs, scheduler = state.pairs_per_micro_batch * state.micro_batches, state.bridge.scheduler
    if not pairs:
        return 0, 0
    calls = len(pair_levels(scheduler, end_levels(scheduler))) * state.bridge.guided.calls
    return pairs * calls, PAIR_STEPS * state.rows if _fits(state) else 0


def _fits(state: TrainingState) -> bool:
    """Whether the layers are fitted to the pairs before the updates: where any of these lead to images.

    The others are easily learned beside the objective; before it their fit would spoil the layers below.
    """
    return None in end_levels(state.bridge.scheduler)


def _regress(state: TrainingState) -> None:
    """Fits the layers that take noise to the pairs by their optimizer, at a rate that falls to 0.

    The optimizer then starts over.
    """
    config, group = state.config, state.layer_optimizer.param_groups[0]
    depths, size = state.student.depths, config.train_batch_size
    chains: list[Chain] = [
        PairChain(partial(state.sample_pairs, index), depths, size) for index in range(len(state.chains))
    ]
    latent = config.preset == "latent"
    highest = LATENT_PAIR_RATE * config.learning_rate if latent else PAIR_LEARNING_RATE
    rate, objective = group["lr"], Regression(image_loss(state.student.scheduler))
    steps = _fit(state, objective, chains, joint(sum(depths), PAIR_STEPS))
    for step in bar(range(PAIR_STEPS), "regress", disable=not state.accelerator.is_main_process):
        group["lr"] = highest * cosine(step / PAIR_STEPS)
        try:
            next(steps)
        except DivergenceError as error:
            raise DivergenceError("the loss of the fit to the pairs", error.step, error.layers) from error
        if state.accelerator.check_trigger():
            raise InterruptedRunError
    group["lr"] = rate
    state.layer_optimizer.state.clear()
    for average, parameter in zip(state.ema.shadow_params, trained(state.student), strict=True):
        average.copy_(parameter.detach())
