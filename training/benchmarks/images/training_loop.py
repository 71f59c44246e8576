"""The loop that trains a teacher or a baseline: updates, averaged weights and checkpoints, up to a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch import Tensor

from hsivi_diffusers.distillation.state import trained
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.checkpoints import Checkpoints
from hsivi_diffusers.runs.output import Output


class TrainingLoop:
    """Updates of a network in one process, that continue where they were stopped; the state of its `Checkpoints`.

    Args:
        run: Output folder and checkpoints.
        accelerator: Of the process.
        network: Whose weights are trained and averaged, with this decay.
        optimizer: Of these weights.
        ema_decay: From 0 up to, not including, 1.
        identity: What must be the same when it continues, see `Checkpoints`.
        parts: What else a checkpoint keeps.

    Attributes:
        steps: Updates that are done.
        seconds: Their wall-clock, including those before a resume.
    """

    micro_batches = 1

    def __init__(
        self,
        run: Output,
        accelerator: Accelerator,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer | AcceleratedOptimizer,
        ema_decay: float,
        identity: dict[str, Any],
        **parts: Any,
    ) -> None:
        self.run, self.accelerator, self.optimizer = run, accelerator, optimizer
        self.parameters = trained(network)
        self.average = EMAModel(self.parameters, decay=ema_decay, use_ema_warmup=False)
        self.parts = {"average": self.average, "optimizer": optimizer, **parts}
        self.checkpoints = Checkpoints(run, accelerator, self, identity)
        self.steps, self.seconds = 0, 0.0

    def check_finite(self, step: int) -> None:
        """Raises FloatingPointError if an averaged weight is not finite."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.average.shadow_params):
            raise FloatingPointError(f"a weight is not finite after {step} updates: lower --learning_rate")

    def save_state(self, folder: Path) -> None:
        """Writes nothing."""

    def load_state(self, folder: Path) -> None:
        """Moves the averages from the CPU."""
        self.average.to(self.accelerator.device)

    def updates(
        self,
        max_steps: int,
        max_seconds: float | None = None,
        least: float = 0,
        restore: Callable[[], None] = lambda: None,
    ) -> Iterator[float]:
        """Yields the share of the run that is done, below 1, for each update; leaves the network the averaged weights.

        The limit is the number of updates or, where it is given, their wall-clock, but then they are so many at least.
        `restore` makes what a run that continues had and no checkpoint keeps; it takes none of that time.
        """

        def share() -> float:
            if max_seconds is None:
                return self.steps / max_steps
            return min(self.seconds / max_seconds, self.steps / least if least else math.inf)

        self.steps, self.seconds = self.checkpoints.load()
        if self.steps and share() < 1:
            restore()
        clock = time.perf_counter() - self.seconds
        with bar(initial=self.steps, total=max_steps if max_seconds is None else None) as self.progress:
            while share() < 1:
                yield share()
                self.average.step(self.parameters)
                self.steps += 1
                self.seconds = time.perf_counter() - clock
                if self.steps % self.run.checkpointing_steps == 0 or share() >= 1:
                    self.checkpoints.save(self.steps, self.seconds)
                self.progress.update()
        self.average.copy_to(self.parameters)

    def descend(self, loss: Tensor, max_grad_norm: float | None = None) -> None:
        """Takes a step of the optimizer, with the gradient clipped to a norm; a loss must be finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.steps}: lower --learning_rate")
        self.accelerator.backward(loss)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
