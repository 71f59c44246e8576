"""The training loop, a generator that yields after each step; logging, saving and averaging belong to the caller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .bridges import Bridge
from .chains import Chain
from .curricula import Stage
from .layers import ConditionalLayers
from .objectives import Critic, CriticObjective, LayerDraw, Objective, Scoring, draw_layer


class DivergenceError(FloatingPointError):
    """Raised when a loss or gradient is not finite. No parameter was updated."""

    def __init__(self, subject: str, step: int, layers: Sequence[int]) -> None:
        super().__init__(
            f"{subject} is not finite at step {step} (layers t = {', '.join(map(str, layers))}): "
            "start a new run with more critic updates or a lower learning rate; if this is the first step, check "
            "that the target is finite on all of R^d"
        )
        self.step, self.layers = step, list(layers)


@dataclass(frozen=True)
class Update:
    """One update of the layers or the critic, with the rows of all micro-batches of this process."""

    t: Tensor  # layer of each row, shape (B,)
    loss: Tensor  # of each row, detached, before the factor beta(t), shape (B,)
    grad_norm: Tensor | None = None  # as returned by `clip_grad_norm`


@dataclass(frozen=True)
class Step:
    """One step of the loop: an update of the layers, then of the critic."""

    step: int  # from 0
    layers: Update
    critic: Update  # the last one; empty for an objective without a critic
    next_step: int  # the first of the next stage if this stage was stopped


def fit(
    layers: ConditionalLayers,
    critic: nn.Module | None,
    bridge: Bridge,
    objective: Objective,
    chain: Chain | Sequence[Chain],
    curriculum: Sequence[Stage],
    *,
    layer_optimizer: Optimizer,
    critic_optimizer: Optimizer | None = None,
    critic_updates: int = 1,
    scoring: Scoring = "own",
    seed: int = 0,
    rank: int = 0,
    start_step: int = 0,
    backward: Callable[[Tensor], None] = Tensor.backward,
    no_sync: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext(),
    clip_grad_norm: Callable[[Iterable[Tensor]], Tensor] | None = None,
    skips_overflows: bool = False,
    stop_stage: Callable[[Step], bool] = lambda _: False,
) -> Iterator[Step]:
    """Fits layers to a bridge, by turns: one update of the layers, then `critic_updates` of the critic.

    Every batch costs one call of the layers, whose output also moves the chain on. The layer update and the first
    critic update share a batch, in this order (docs/method.md). With one micro-batch and an objective that takes no
    gradient through the critic, they share the critic's output too.

    An update is the mean over micro-batches: one for each chain (gradient accumulation) in each process (data
    parallelism). N micro-batches in one process give the same update as one in each of N processes. Random numbers
    come from a generator per (seed, micro-batch, step), so a run resumed at `start_step`, with parameters, optimizers
    and chains restored, repeats an uninterrupted one.

    Args:
        layers: The sampler.
        critic: (x, level, condition, t) -> marginal score; None for `LowerBound` and `Regression`.
        bridge: What the layers are fitted to.
        objective: The losses.
        chain: Source of the layers' inputs; a list for gradient accumulation, one chain for each micro-batch.
        curriculum: The stages, in order.
        layer_optimizer: Optimizer of the layers.
        critic_optimizer: Optimizer of the critic.
        critic_updates: Critic updates per layer update, >= 1 (20 in the paper).
        scoring: Level at which layers are scored, "own" (the paper) or "random", see `draw_layer`.
        seed: Seed of the run.
        rank: Index of this process.
        start_step: Number of the first step.
        backward: Called with the loss of each micro-batch, such as `accelerator.backward`.
        no_sync: Context of all micro-batches but the last, in which gradients are not reduced between processes.
        clip_grad_norm: Called with the parameters before an optimizer step; returns the norm before clipping.
        skips_overflows: Whether the optimizers skip gradients that are not finite, as fp16 loss scaling does.
        stop_stage: Called with each step before it is yielded; true ends the stage. Later ones keep their step numbers.

    Raises:
        ValueError: `critic_updates` < 1, or there is no critic or optimizer for an objective that needs them.
        DivergenceError: A loss or the norm of a gradient is not finite.
    """
    chains = [chain] if isinstance(chain, Chain) else list(chain)
    if critic_updates < 1:
        raise ValueError(f"critic_updates={critic_updates}: the critic needs at least 1 update for each of the layers")
    if isinstance(objective, CriticObjective) and (critic is None or critic_optimizer is None):
        raise ValueError(
            f"{type(objective).__name__} needs a critic and a critic_optimizer; LowerBound and Regression need none"
        )

    def update(
        player: str, module: nn.Module, optimizer: Optimizer, make: Callable[[int], _Rows], step: int, move: bool = True
    ) -> Update:
        made, finite = list[_Rows](), list[Tensor]()
        for micro_batch in range(len(chains)):
            with nullcontext() if micro_batch == len(chains) - 1 else no_sync(module):
                rows = make(micro_batch)
                mean = (rows.share * rows.loss).mean()
                backward(mean / len(chains))
            made.append(rows)
            finite.append(mean.detach().isfinite())
        norm = None
        if move:  # else Adam would average zeros into its moments
            norm = clip_grad_norm(module.parameters()) if clip_grad_norm else None
            if not skips_overflows:
                finite.append((_grad_norm(module) if norm is None else norm).isfinite().to(finite[0].device))
        good = torch.stack(finite).tolist()  # the one wait for a GPU; of the losses, then of the gradient
        if bad := [rows for rows, each in zip(made, good, strict=False) if not each]:
            raise DivergenceError(f"the loss of the {player}", step, _layers_of(bad))
        if not good[-1]:
            raise DivergenceError(f"the gradient of the {player}", step, _layers_of(made))
        if move:
            optimizer.step()
        optimizer.zero_grad()
        return Update(torch.cat([rows.t for rows in made]), torch.cat([rows.loss.detach() for rows in made]), norm)

    losses = _Losses(layers, nn.Identity() if critic is None else critic, bridge, objective, chains, scoring)
    next_step = start_step
    for step, end, stage in _steps(curriculum):
        if step < next_step:
            continue
        losses.begin(stage.beta, [step_generator(seed, rank * len(chains) + i, step) for i in range(len(chains))])
        with _frozen(losses.critic) if objective.critic_gradient else nullcontext():
            move = bool(stage.beta.any())
            layer_update = update("layers", layers, layer_optimizer, losses.layer_rows, step, move)
        critic_update = Update(t=layer_update.t[:0], loss=layer_update.loss[:0])
        if critic is not None and critic_optimizer is not None and losses.has_critic:
            for _ in range(critic_updates):
                critic_update = update("critic", critic, critic_optimizer, losses.critic_rows, step)
        done = Step(step=step, layers=layer_update, critic=critic_update, next_step=step + 1)
        if stop_stage(done):
            done = replace(done, next_step=end)
        next_step = done.next_step
        yield done


class _Rows(NamedTuple):
    """Layer, loss and weight of each row of a micro-batch, all of shape (B,)."""

    t: Tensor
    loss: Tensor
    share: Tensor


def _layers_of(made: Sequence[_Rows]) -> list[int]:
    return sorted({t for rows in made for t in rows.t.tolist()})


def _grad_norm(module: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([each.grad for each in module.parameters() if each.grad is not None])


@dataclass
class _Losses:
    """The losses of layers and critic by micro-batch; within a step the critic reuses the draws of the layers."""

    layers: ConditionalLayers
    critic: nn.Module
    bridge: Bridge
    objective: Objective
    chains: Sequence[Chain]
    scoring: Scoring

    def __post_init__(self) -> None:
        self.critic_seen = _local(self.critic)
        self.has_critic = isinstance(self.objective, CriticObjective)
        # Memory: the graph of the answer lives until the critic's loss, so this is for one micro-batch only.
        self.shares_answer = self.has_critic and len(self.chains) == 1 and not self.objective.critic_gradient

    def begin(self, beta: Tensor, generators: Sequence[torch.Generator]) -> None:
        """Starts a step."""
        self.beta, self.generators = beta, generators
        self.left: dict[int, tuple[LayerDraw, Critic]] = {}

    def layer_rows(self, micro_batch: int) -> _Rows:
        draw = self._draw(micro_batch)
        cut = self.objective.scored(draw.detach())
        critic_seen: Critic = self.critic_seen
        critic: Critic = self.critic
        if self.shares_answer:
            answer = cut.answer(self.critic)
            critic_seen, critic = (lambda *_: answer.detach()), (lambda *_: answer)
        if self.has_critic:
            self.left[micro_batch] = (cut, critic)
        loss = self.objective.layer_loss(critic_seen, self.bridge, draw)
        return _Rows(draw.t, loss, self.beta.to(draw.t.device)[draw.t])

    def critic_rows(self, micro_batch: int) -> _Rows:
        if micro_batch in self.left:
            draw, critic = self.left.pop(micro_batch)
        else:
            with torch.no_grad():
                draw = self.objective.scored(self._draw(micro_batch))
            critic = self.critic
        assert isinstance(self.objective, CriticObjective)
        loss = self.objective.critic_loss(critic, draw)
        return _Rows(draw.t, loss, torch.ones_like(loss))

    def _draw(self, micro_batch: int) -> LayerDraw:
        chain, generator = self.chains[micro_batch], self.generators[micro_batch]
        return draw_rows(self.layers, self.bridge, chain, self.scoring, generator, self.beta)


def draw_rows(
    layers: ConditionalLayers,
    bridge: Bridge,
    chain: Chain,
    scoring: Scoring,
    generator: torch.Generator | None = None,
    beta: Tensor | None = None,
) -> LayerDraw:
    """Draws a batch from the layers with one call, and moves the chain on; see `Chain.draw` and `draw_layer`."""
    batch = chain.draw(layers, generator, beta)
    q = layers(batch.x_next, batch.t, batch.condition)
    chain.advance(batch, q, generator)
    return draw_layer(
        q,
        batch.t,
        bridge,
        x_next=batch.x_next,
        scoring=scoring,
        condition=batch.condition,
        generator=generator,
        end=batch.end,
    )


def step_generator(seed: int, micro_batch: int, step: int) -> torch.Generator:
    """Returns a generator seeded by these three numbers."""
    digest = hashlib.blake2b(f"{seed} {micro_batch} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _local(critic: nn.Module) -> nn.Module:
    """The critic without its wrapper for data parallelism."""
    inner = getattr(critic, "_orig_mod", critic)  # of torch.compile
    return inner.module if isinstance(inner, DistributedDataParallel) else critic


@contextmanager
def _frozen(critic: nn.Module) -> Iterator[None]:
    """Switches off gradients of the parameters. Use it only if needed: torch then rounds products differently."""
    trained = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _steps(curriculum: Sequence[Stage]) -> Iterator[tuple[int, int, Stage]]:
    """Yields the number of each step, the end of its stage, and the stage."""
    end = 0
    for stage in curriculum:
        begin, end = end, end + stage.num_steps
        for step in range(begin, end):
            yield step, end, stage
