"""How far the critic is behind the student, without data: its excess loss over one that is fitted further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from ..vi import CriticObjective, LayerDraw, cosine, step_generator
from ..vi.fitting import draw_rows
from ..vi.objectives import row_sum
from .guidance import guided
from .state import TrainingState, trained
from .state_dicts import copy_state_dict, random_state, set_random_state
from .student import UNetCritic
from .updates import make_objective, scoring_of

ROWS = 128  # of all processes, that the losses are the means of
FITS = 16  # updates of the fit


def critic_lag(state: TrainingState, step: int) -> float:
    """Returns the share of what the critic should have learned of the student that it has not.

    With s the critic's score, s' that after FITS further updates while the student waits, at its first rate falling to
    0, s_p the unguided teacher's, from which the critic started, and L the critic's loss with weights w,

        lag = max(L(s) - L(s'), 0) / E[w/2 |s' - s_p|^2].

    If s' is the score of the student's marginals, L(s) - L(s') is E[w/2 |s - s'|^2]. So the lag is 0 if the critic has
    caught up, and there is nothing left to gain, and 1 if it tells no more of the student than the teacher does.

    All processes call it, after so many updates. Run and critic are then as they were before.
    """
    objective = make_objective(state.config, state.bridge)
    with _restoring(state):
        draws = _draw(state, step)
        held = list(islice(draws, max(1, ROWS // state.rows) * len(state.chains)))
        before, _ = _judge(state, objective, held)
        _fit_further(state, objective, draws)
        after, learned = _judge(state, objective, held)
    excess, learned = state.accelerator.reduce(torch.stack([before - after, learned]), "mean")
    return float(excess.clamp_min(0) / learned)


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
def _judge(state: TrainingState, objective: CriticObjective, held: Sequence[LayerDraw]) -> tuple[Tensor, Tensor]:
    """The critic's loss, and how far it is from the unguided teacher, both in the mean over the draws."""
    bridge, losses, distances = state.bridge, list[Tensor](), list[Tensor]()
    teacher = UNetCritic(guided(bridge.unet, [1.0] * len(bridge.scales)), bridge.scheduler)
    for draw in held:
        answer = draw.answer(state.critic)
        losses.append(objective.critic_loss(lambda *_, answer=answer: answer, draw))
        gap = answer - draw.answer(teacher)
        distances.append(0.5 * objective.level_weight(draw.level) * row_sum(gap.square()))
    return torch.cat(losses).mean(), torch.cat(distances).mean()


def _fit_further(state: TrainingState, objective: CriticObjective, draws: Iterator[LayerDraw]) -> None:
    config, optimizer, number = state.config, state.critic_optimizer, len(state.chains)
    for update in range(FITS):
        for group in optimizer.param_groups:
            group["lr"] = config.critic_learning_rate * cosine(update / FITS)
        for draw in islice(draws, number):
            state.accelerator.backward(objective.critic_loss(state.critic, draw).mean() / number)
        if config.max_grad_norm is not None:
            state.accelerator.clip_grad_norm_(trained(state.critic), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def _restoring(state: TrainingState) -> Iterator[None]:
    """Gives the critic what it had before, which is kept on the CPU, and the run its counts and generators."""
    parts = [state.parts["critic"], state.parts["critic_optimizer"]]
    if state.accelerator.scaler is not None:
        parts.append(state.accelerator.scaler)
    kept = [copy_state_dict(part.state_dict()) for part in parts]
    rows, random = dict(state.called), random_state(state.accelerator.device)
    try:
        yield
    finally:
        for part, before in zip(parts, kept, strict=True):
            part.load_state_dict(before)
        state.called.update(rows)
        set_random_state(random, state.accelerator.device)
