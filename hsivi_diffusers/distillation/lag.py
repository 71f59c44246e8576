"""How far the critic is behind the student, without data: its excess loss over one that is fitted further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..runs.state_dicts import random_state, set_random_state
from ..teachers.guidance import guided
from ..vi import CriticObjective, LayerDraw, cosine, step_generator
from ..vi.fitting import draw_rows
from ..vi.regression import half_square
from .config import usual_settings
from .state import TrainingState, trained
from .student import UNetCritic
from .updates import make_objective, scoring_of

ROWS = 128  # of all processes, that the losses are the means of; a batch, if that is more
FITS = 16  # updates of the fit


def critic_lag(state: TrainingState, step: int) -> float:
    """Returns the share of what the critic could know of the student that it does not know, from 0 to 1.

    With s the critic's score, s' that after FITS further updates while the student waits, s_p the unguided teacher's,
    and L the critic's loss with weights w,

        lag = (L(s) - L(s')) / E[w/2 |s' - s_p|^2].

    If s' is the score of the student's marginals, L(s) - L(s') is E[w/2 |s - s'|^2]: the lag is 0 if the critic has
    caught up, and 1 if it tells no more of the student than the teacher does. A low lag does not prove that the critic
    is good: 16 updates get but a part of the way, and their noise may hide what they gain. Their rate falls to 0 from
    the first one of the run. If that is below its preset's, another fit has the preset's, and the larger lag counts: of
    a low rate the former gains little, and the latter is noisy.

    All processes call it, after so many updates. Run and critic are then as they were before. It is NaN if a loss is.
    """
    config = state.config
    rates = {config.critic_learning_rate, max(config.critic_learning_rate, usual_settings(config).critic_learning_rate)}
    return max(_lag_at(state, step, rate) for rate in sorted(rates))


def _lag_at(state: TrainingState, step: int, rate: float) -> float:
    """The lag by a fit of this rate."""
    if state.config.is_guided:
        for place in range(len(state.chains)):
            state.pairs(place)  # whose calls are the run's
    objective = make_objective(state.config, state.bridge)
    with _restoring(state):
        draws = _draw(state, step)
        held = list(islice(draws, max(1, ROWS // state.rows) * len(state.chains)))
        before, _ = _judge(state, objective, held)
        _fit_further(state, objective, draws, rate)
        after, answers = _judge(state, objective, held)
        learned = _distance(state, objective, held, answers)
    excess, learned = state.accelerator.reduce(torch.stack([before - after, learned]), "mean")
    return float((excess / learned).clamp(0, 1))


@torch.no_grad()
def _draw(state: TrainingState, step: int) -> Iterator[LayerDraw]:
    """Draws from the layers as they are, in micro-batches of the run, by chains that start as those of the run."""
    chains = [state.make_chain(place) for place in range(len(state.chains))]
    for chain, running in zip(chains, state.chains, strict=True):
        chain.load_state_dict(running.state_dict())
    generators = [step_generator(state.config.seed, state.first_micro_batch + i, -2 - step) for i in range(len(chains))]
    while True:
        for chain, generator in zip(chains, generators, strict=True):
            yield draw_rows(state.layers, state.bridge, chain, scoring_of(state.config), generator)


@torch.no_grad()
def _judge(
    state: TrainingState, objective: CriticObjective, held: Sequence[LayerDraw]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The critic's loss without dropout, in the mean over the draws, and its answers."""
    state.critic.eval()
    answers = [draw.answer(state.critic) for draw in held]
    state.critic.train()
    pairs = zip(held, answers, strict=True)
    losses = [objective.critic_loss(lambda *_, answer=answer: answer, draw) for draw, answer in pairs]
    return torch.cat(losses).mean(), answers


@torch.no_grad()
def _distance(
    state: TrainingState, objective: CriticObjective, held: Sequence[LayerDraw], answers: Sequence[Tensor]
) -> Tensor:
    """E[w/2 |s - s_p|^2] of answers s and the unguided teacher."""
    bridge, distances = state.bridge, list[Tensor]()
    teacher = UNetCritic(guided(bridge.unet, [1.0] * len(bridge.scales)), bridge.scheduler)
    for draw, answer in zip(held, answers, strict=True):
        distances.append(objective.level_weight(draw.level) * half_square(answer - draw.answer(teacher)))
    return torch.cat(distances).mean()


def _fit_further(state: TrainingState, objective: CriticObjective, draws: Iterator[LayerDraw], rate: float) -> None:
    config, optimizer, number = state.config, state.critic_optimizer, len(state.chains)
    for update in range(FITS):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(update / FITS)
        for draw in islice(draws, number):
            state.accelerator.backward(objective.critic_loss(state.critic, draw).mean() / number)
        if config.max_grad_norm is not None:
            state.accelerator.clip_grad_norm_(trained(state.critic), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def _restoring(state: TrainingState) -> Iterator[None]:
    """Gives the critic what it had before, which is kept on the CPU, and the run its counts and generators."""
    optimizer, scaler, device = state.critic_optimizer, state.accelerator.scaler, state.accelerator.device
    weights = {weight: weight.detach().to("cpu", copy=True) for weight in trained(state.critic)}
    moments = {weight: _copies(optimizer.state[weight]) for weight in weights if weight in optimizer.state}
    rates = [group["lr"] for group in optimizer.param_groups]
    scale = None if scaler is None else scaler.state_dict()
    rows, random = dict(state.called), random_state(device)
    try:
        yield
    finally:
        optimizer.zero_grad()
        for weight, kept in weights.items():
            weight.data.copy_(kept)
            _restore(optimizer.state[weight], moments.get(weight, {}))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if scaler is not None:
            scaler.load_state_dict(scale)
        state.called.update(rows)
        set_random_state(random, device)


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    return {name: each.to("cpu", copy=True) if isinstance(each, Tensor) else each for name, each in values.items()}


def _restore(values: dict[str, Any], kept: dict[str, Any]) -> None:
    """In place, for on a GPU there may be no room for more."""
    for name in [*values]:
        if name not in kept:
            del values[name]
        elif isinstance(kept[name], Tensor):
            values[name].copy_(kept[name])
        else:
            values[name] = kept[name]
