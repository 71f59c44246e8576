"""The one training loop, a generator: it updates and yields; logging, saving and averaging belong to the caller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .bridges import Bridge
from .chains import Chain
from .curricula import Stage
from .layers import ConditionalLayers
from .objectives import CriticObjective, LayerDraw, Scoring, draw_layer


class DivergenceError(FloatingPointError):
    """A loss is NaN or infinite; no parameter has been touched by it.

    Attributes:
        step: Index of the layer update at which it happened.
    """

    def __init__(self, player: str, step: int, layers: Sequence[int]) -> None:
        super().__init__(
            f"the loss of the {player} is not finite at step {step} (layers t = {', '.join(map(str, layers))}): "
            "start a new run with a lower learning rate, or with more critic updates"
        )
        self.step = step


@dataclass(frozen=True)
class Step:
    """What one layer update did.

    Attributes:
        step: Its index, from 0.
        t: Layers that were trained, shape (B,).
        layer_loss: Shape (B,), detached, before beta(t).
        critic_loss: Shape (B,), detached, of the last critic update.
    """

    step: int
    t: Tensor
    layer_loss: Tensor
    critic_loss: Tensor


def fit(
    layers: ConditionalLayers,
    critic: nn.Module,
    bridge: Bridge,
    objective: CriticObjective,
    chain: Chain,
    curriculum: Sequence[Stage],
    *,
    layer_optimizer: Optimizer,
    critic_optimizer: Optimizer,
    critic_updates: int = 1,
    scoring: Scoring = "own",
    seed: int = 0,
    rank: int = 0,
    start_step: int = 0,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Iterator[Step]:
    """Fits layers to a bridge: one update of the layers, then `critic_updates` of the critic, and again.

    Every batch costs one call of the layers, and every answer is given back to the chain. The layer update and the
    first critic update share a batch, in this order: a critic that has just been fitted to these very draws leans
    towards their noise, and would pull the layers together.

    Randomness comes from a generator per (seed, rank, step), so a run that is resumed at `start_step`, with
    parameters, optimizers and chain restored, repeats one that was never stopped.

    Args:
        layers: The sampler; called as layers(x_next, t, condition).
        critic: Estimate of the marginal score; called as critic(x, level, condition).
        bridge: What the layers are fitted to.
        objective: The two losses.
        chain: Where layer inputs come from.
        curriculum: Stages, one after the other.
        layer_optimizer: Of the layers' parameters.
        critic_optimizer: Of the critic's parameters.
        critic_updates: Critic updates for each layer update, >= 1 (the paper: 20).
        scoring: Level at which layers are scored, "own" (the paper) or "random", see `draw_layer`.
        seed: Seed of the run.
        rank: Index of this process.
        start_step: First step to do; those before it are taken as done.
        backward: Called with each mean loss, such as `accelerator.backward`.

    Yields:
        A `Step` after each layer update.

    Raises:
        ValueError: `critic_updates` < 1.
        DivergenceError: A loss is not finite.
    """
    if critic_updates < 1:
        raise ValueError(f"critic_updates={critic_updates}: the critic needs at least 1 update for each of the layers")

    def answer(generator: torch.Generator) -> tuple[Tensor, LayerDraw]:
        batch = chain.draw(layers, generator)
        q = layers(batch.x_next, batch.t, batch.condition)
        chain.advance(batch, q, generator)
        draw = draw_layer(q, batch.t, bridge, scoring=scoring, condition=batch.condition, generator=generator)
        return batch.t, draw

    def update(player: str, optimizer: Optimizer, loss: Tensor, t: Tensor, step: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise DivergenceError(player, step, sorted(set(t.tolist())))
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    for step, stage in _steps(curriculum, start_step):
        generator = step_generator(seed, rank, step)
        t, draw = answer(generator)
        with _frozen(critic) as frozen:
            layer_loss = objective.layer_loss(frozen, bridge, draw)
            update("layers", layer_optimizer, (stage.beta.to(t.device)[t] * layer_loss).mean(), t, step)
        trained = t
        for k in range(critic_updates):
            if k > 0:
                with torch.no_grad():
                    t, draw = answer(generator)
            critic_loss = objective.critic_loss(critic, draw.detach())
            update("critic", critic_optimizer, critic_loss.mean(), t, step)
        yield Step(step=step, t=trained, layer_loss=layer_loss.detach(), critic_loss=critic_loss.detach())


def step_generator(seed: int, rank: int, step: int) -> torch.Generator:
    """Returns a generator that depends on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def _frozen(critic: nn.Module) -> Iterator[nn.Module]:
    """The critic as a function of its input alone, outside of any gradient reduction between processes."""
    critic.requires_grad_(False)
    try:
        yield critic.module if isinstance(critic, DistributedDataParallel) else critic
    finally:
        critic.requires_grad_(True)


def _steps(curriculum: Sequence[Stage], start_step: int) -> Iterator[tuple[int, Stage]]:
    step = 0
    for stage in curriculum:
        for _ in range(stage.num_steps):
            if step >= start_step:
                yield step, stage
            step += 1
