"""Training of a teacher or a baseline: options, output folder, and the loop with averaged weights and checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from hsivi_diffusers.distillation.state import trained
from hsivi_diffusers.runs.artifacts import OPTIONS
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.checkpoints import Checkpoints
from hsivi_diffusers.runs.folders import write_json
from hsivi_diffusers.runs.options import flatten, option
from hsivi_diffusers.runs.output import Output, check_output, claimed, start_run


@dataclass
class Training:
    _group = "training"
    seed: int = option(0, "seed of weights, batches and noise")
    max_train_steps: int = option(10_000, "number of updates")
    train_batch_size: int = option(128, "images in an update")
    learning_rate: float = option(1e-3, "AdamW's, warmed up, then cosine to 0")
    lr_warmup_steps: int = option(200, "updates of linear warm-up")
    ema_decay: float = option(0.999, "decay of the averaged weights, which are saved")


class TrainingLoop:
    """Updates of a network in one process; a run that was stopped continues. The state of its `Checkpoints`.

    Args:
        run: Output folder and checkpoints.
        accelerator: Of the process.
        network: Its trainable weights are trained and averaged.
        optimizer: Of these weights.
        ema_decay: Decay of the average, from 0 up to, not including, 1.
        identity: Must be the same when a run continues, see `Checkpoints`.
        parts: What else a checkpoint keeps.

    Attributes:
        steps: Number of updates so far.
        seconds: Their wall-clock time, including that before a resume.
    """

    micro_batches = 1

    def __init__(
        self,
        run: Output,
        accelerator: Accelerator,
        network: nn.Module,
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
        """Writes nothing: the parts are all."""

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
        """Yields for each update the fraction of the run that is done, below 1; then the network has the averages.

        The limit is the number of updates or, where it is given, their wall-clock time, but at least `least` updates.
        `restore` makes what a run that continues had and no checkpoint keeps; it takes none of that time.
        """

        def fraction() -> float:
            if max_seconds is None:
                return self.steps / max_steps
            return min(self.seconds / max_seconds, self.steps / least if least else math.inf)

        self.steps, self.seconds, _ = self.checkpoints.load()
        if self.steps and fraction() < 1:
            restore()
        clock = time.perf_counter() - self.seconds
        with bar(initial=self.steps, total=max_steps if max_seconds is None else None) as self.progress:
            while fraction() < 1:
                yield fraction()
                self.average.step(self.parameters)
                self.steps += 1
                self.seconds = time.perf_counter() - clock
                if self.steps % self.run.checkpointing_steps == 0 or fraction() >= 1:
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


@contextmanager
def claimed_alone(run: Output, seed: int) -> Iterator[Accelerator]:
    """Claims the output folder of a run of one process, and seeds it.

    Raises:
        ValueError: There are several processes, or errors of `check_output` and `claimed`.
    """
    check_output(run)
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"{processes} processes were launched: this program runs in one, start one")
    with claimed(run):
        accelerator = Accelerator()
        set_seed(seed)
        yield accelerator


def fit(
    run: Output,
    accelerator: Accelerator,
    training: Training,
    groups: Sequence[Any],
    written: Sequence[str],
    loss: Callable[[Any], Tensor],
    **named: nn.Module,
) -> Any:
    """Trains a network by AdamW with a cosine schedule, and returns it with the averaged weights.

    Args:
        run: Output folder and checkpoints.
        accelerator: Of the process.
        training: Options of the loop.
        groups: The other options that decide what is trained.
        written: See `start_run`.
        loss: Loss of a new batch, of the network.
        named: The network, under the name of its file in a checkpoint.
    """
    ((name, network),) = named.items()
    settings = flatten([*groups, training])
    start_run(run, settings, written)
    write_json(Path(str(run.output_dir)) / OPTIONS, settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, training.lr_warmup_steps, training.max_train_steps)
    network, optimizer = accelerator.prepare(network, optimizer)
    parts = {name: network, "schedule": schedule}
    loop = TrainingLoop(run, accelerator, network, optimizer, training.ema_decay, settings, **parts)
    for _ in loop.updates(training.max_train_steps):
        loop.descend(loss(network))
        schedule.step()
    return network
