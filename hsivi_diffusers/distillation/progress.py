"""Progress of a run: a bar, numbers for the trackers, and sample grids of the averaged student."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from ..runs.artifacts import GRID_COLUMNS as COLUMNS
from ..runs.artifacts import GRID_ROWS as ROWS
from ..runs.bars import bar
from ..runs.folders import write_text
from ..runs.measures import BOUND, RATIOS, counted, format_ratios
from ..runs.page import LOG, REFRESH, read_log, write_page
from ..teachers.solvers import batches, run_solver
from ..vi import Step
from .config import HSIVIConfig, usual_options
from .pairs import follow_ode
from .state import TrainingState

EVERY = 20  # updates between two lines of the trackers
TEACHER_STEPS = 20  # solver steps of the teacher's row
OUTSIDE = 0.25  # share of their pixels out of range above which a run says so; of good teachers at most 0.14
WIDTH = 512  # pixels that a sample grid has at least
# Of the RATIOS, where two grids in a row stop a run: digits at a hundred times the student's rate ended at a diversity
# of 0.15.
LIMIT = 3.0
RATES = ("learning_rate", "critic_learning_rate")


class CollapsedRunError(Exception):
    """The images of a run are nothing like those of its teacher."""


def beside_teacher(grid: Tensor) -> dict[str, float]:
    """Compares the rows of a student with the first one, the teacher's, without data.

    The contrast is the standard deviation of all values, the diversity the mean distance between two images of a row,
    the root of the mean square of their difference. Both are ratios, student / teacher, near 1 in a healthy run.

    Args:
        grid: Shape (ROWS * COLUMNS, C, H, W), row by row, each of the same classes or prompts.
    """
    rows = grid.float().unflatten(0, (ROWS, COLUMNS)).flatten(2)
    distances = torch.stack([torch.pdist(row).mean() for row in rows])
    tiny = torch.finfo(torch.float).tiny
    contrast = float(rows[1:].std() / rows[0].std().clamp_min(tiny))
    diversity = float(distances[1:].mean() / distances[0].clamp_min(tiny))
    return dict(zip(RATIOS, (contrast, diversity), strict=True))


def grid_interval(config: HSIVIConfig) -> int:
    """Updates between two sample grids, 0 for no grids."""
    every = config.validation_steps
    return max(1, config.max_train_steps // 10) if every is None else every


class Progress:
    """Shows the steps of a run in the main process, and stops a run whose images have collapsed.

    Grids go to OUTPUT_DIR/samples.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state, self.config, self.accelerator = state, state.config, state.accelerator
        self.running: dict[str, float] = {}
        self.unread: list[Tensor] = []  # mean losses of updates, still on the device: to read them is to wait for it
        self.warned = False
        self.far = 0  # grids in a row, up to the last one, that are far from the teacher's
        self.folder = Path(str(self.config.output_dir))
        channels = state.teacher.image_shape[0]
        if grid_interval(self.config) and channels not in (1, 3):
            raise ValueError(
                f"the teacher's images have {channels} channels, and sample grids show 1 or 3: set validation_steps=0"
            )
        self.page_written = 0.0  # when, by the clock of `time.perf_counter`

    def watch(self, steps: Iterator[Step], start: int, metrics: Callable[[Step], dict[str, float]]) -> Iterator[Step]:
        """Yields the steps after `start`, with a bar of running losses, of the metrics of a step, and the time left.

        Raises:
            CollapsedRunError: In two grids in a row, after a tenth of the run, contrast or diversity is LIMIT times
                that of the teacher, or a LIMIT-th of it. The step was yielded.
        """
        total, every = self.config.max_train_steps, grid_interval(self.config)
        draws = bool(every) and start < total
        self._rewind(start, draws)
        if draws:
            self._judge(start, self.draw(start))
        first = list(islice(steps, 1))  # the fit to pairs, which comes before it, has a bar of its own
        self._restart_clock(start + len(first))
        with bar(total=total, initial=start, desc="distil", disable=not self.accelerator.is_main_process) as shown:
            for step in chain(first, steps):
                self._show(shown, step, metrics(step))
                done = step.step + 1
                ratios: list[float] = []
                if every and (done % every == 0 or done == total):
                    ratios = self.draw(done)
                    self._restart_clock(done)
                yield step
                self._judge(done, ratios)

    def _show(self, shown: tqdm[Any], step: Step, measured: dict[str, float]) -> None:
        """Moves the bar, and logs every EVERY updates."""
        done = step.step + 1
        self.unread.append(torch.stack([step.layers.loss.mean(), step.critic.loss.mean()]))
        shown.update()
        if done % EVERY == 0 or done == self.config.max_train_steps or measured:
            for losses in torch.stack(self.unread).tolist():
                for name, loss in zip(("student", "critic"), losses, strict=True):
                    self.running[name] = 0.95 * self.running.get(name, loss) + 0.05 * loss
            self.unread.clear()
            numbers, in_bar = self._numbers(step), dict(self.running)
            if done > self.clock_step:  # not of the first update alone
                speed = (done - self.clock_step) * self.state.rows / (time.perf_counter() - self.clock)
                numbers["images_per_second"] = in_bar["img/s"] = speed
            self._restart_clock(done)
            self._log(done, {**numbers, **measured})
            in_bar |= measured
            shown.set_postfix({name: f"{value:.4g}" for name, value in in_bar.items()}, refresh=False)

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """Logs to the trackers and to the file of the run."""
        self.accelerator.log(numbers, step=step)
        if self.accelerator.is_main_process:
            self._add_line({**{name: float(number) for name, number in numbers.items()}, "step": step})
            if time.perf_counter() - self.page_written > REFRESH:
                self._write_page()

    def _write_page(self) -> None:
        write_page(self.folder, usual_options(self.config.record()))
        self.page_written = time.perf_counter()

    def _add_line(self, line: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _rewind(self, start: int, draws: bool) -> None:
        """Takes out of the log what a resumed run does again, with the grid of its start if it draws, and its ends."""
        if self.accelerator.is_main_process:
            again = {"stopped", *RATIOS} if draws else {"stopped"}
            kept = [line for line in read_log(self.folder) if line["step"] <= start]
            kept = [line for line in kept if len(line) > 1 and (line["step"] < start or again.isdisjoint(line))]
            write_text(self.folder / LOG, "".join(f"{json.dumps(line)}\n" for line in kept))

    def _restart_clock(self, step: int) -> None:
        self.clock_step, self.clock = step, time.perf_counter()

    def _numbers(self, step: Step) -> dict[str, float]:
        """Losses, gradient norms, learning rates, the critic's loss layer by layer, and the noise scale."""
        numbers: dict[str, float] = {}
        for name, update in (("student", step.layers), ("critic", step.critic)):
            numbers[f"loss/{name}"] = update.loss.mean().item()
            if update.grad_norm is not None:
                numbers[f"grad_norm/{name}"] = float(update.grad_norm)
        for name, scheduler in zip(("student", "critic"), self.state.lr_schedulers, strict=True):
            numbers[f"learning_rate/{name}"] = scheduler.get_last_lr()[0]
        loss, layers = step.critic.loss, step.critic.t
        numbers |= {f"critic_loss/layer_{t}": loss[layers == t].mean().item() for t in layers.unique().tolist()}
        if self.state.student.noise_scale is not None:
            scale = self.state.student.noise_scale.log_scale.detach().exp()
            numbers |= {f"noise_scale/{name}": float(getattr(scale, name)()) for name in ("min", "mean", "max")}
        return numbers

    def draw(self, step: int) -> list[float]:
        """Writes a grid: the teacher's images in many steps, then the student's in most, always from the same noise.

        Returns the ratios of `beside_teacher`, in every process.
        """
        ratios = torch.ones(len(RATIOS), device=self.accelerator.device)
        main = self.accelerator.is_main_process
        if main or self.config.shard_base:  # whose weights the processes gather together
            images = torch.cat([self._teacher_row, self._draw_student((ROWS - 1) * COLUMNS)])
        if main:
            shown = images.permute(0, 2, 3, 1).numpy()
            folder = self.folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            cells = pad(images, (0, 1, 0, 1), value=0.5).permute(0, 2, 3, 1).numpy()  # a grey line between images
            grid = make_image_grid(DiffusionPipeline.numpy_to_pil(cells), ROWS, COLUMNS)
            factor = -(-WIDTH // grid.width)
            size = (factor * grid.width, factor * grid.height)
            path = folder / f"step-{step}.png"
            grid.resize(size, Image.Resampling.NEAREST).save(path)
            compared = beside_teacher(images)
            tqdm.write(f"after {counted(step, 'update')}: {format_ratios(compared)}, {path}")
            self._log(step, compared)
            ratios.copy_(torch.tensor([*compared.values()]))
            self._write_page()
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({"samples": shown}, step=step, dataformats="NHWC")
                elif tracker.name in ("wandb", "comet_ml"):
                    tracker.log_images({"samples": list(shown)}, step=step)
        shared: list[float] = broadcast(ratios).tolist()
        return shared

    def _judge(self, step: int, ratios: list[float]) -> None:
        """Warns once when contrast or diversity leaves the usual range; stops the run after two bad grids."""
        total = self.config.max_train_steps
        if not ratios or 10 * step < total:
            return
        where = f"look at {self.folder / 'samples'}, and at 'Training' in docs/troubleshooting.md"

        values = {name.removeprefix("images/"): ratio for name, ratio in zip(RATIOS, ratios, strict=True)}

        def outside(bound: float) -> dict[str, float]:
            return {name: ratio for name, ratio in values.items() if not 1 / bound < ratio < bound}

        def describe(found: dict[str, float]) -> str:
            text = " and ".join(f"{ratio:.2f} times the {name}" for name, ratio in found.items())
            return f"after {counted(step, 'update')} the images have {text} of the teacher's"

        if (unusual := outside(BOUND)) and not self.warned and self.accelerator.is_main_process:
            self.warned = True
            tqdm.write(f"{describe(unusual)}, and {1 / BOUND:.2f} to {BOUND} is usual: {where}")
        self.far = self.far + 1 if outside(LIMIT) else 0
        if self.far > 1 and step < total:
            self._stop(step, f"{describe(values)}, as at the grid before, and the run was stopped: {where}")

    def _stop(self, step: int, text: str) -> NoReturn:
        """Stops the run, with the reason on its page until it is resumed."""
        config = self.config
        usual = config.usual()
        rates = [f"{name} {getattr(config, name)} (preset {usual.preset}: {getattr(usual, name)})" for name in RATES]
        text += f"; start anew with other rates than {' and '.join(rates)}, or, to go on all the same, "
        text += "continue with validation_steps 0 and resume_from_checkpoint latest"
        self.leave(step, stopped=text)
        raise CollapsedRunError(text)

    def leave(self, step: int, **told: str) -> None:
        """Lets the page of a run that does not go on here say how many updates it has, and what it is told."""
        if self.accelerator.is_main_process:
            self._add_line({"step": step, **told})
            self._write_page()

    @property
    def _conditions(self) -> Tensor | None:
        """Conditions of a row: class labels in turn, without those that are not trained; None without classes."""
        shares = self.config.class_shares or [1.0] * self.state.bridge.num_classes
        classes = torch.tensor([label for label, share in enumerate(shares) if share])
        return classes[torch.arange(COLUMNS) % len(classes)] * len(self.state.bridge.scales) if len(classes) else None

    @cached_property
    def _teacher_row(self) -> Tensor:
        """Images in [0, 1] of a solver of the teacher, with the guidance of the training, on the CPU."""
        bridge, teacher = self.state.bridge, self.state.teacher
        num_steps = min(TEACHER_STEPS, len(bridge.scheduler) // 2)  # a schedule may have few timesteps
        with self.state.counting_paused():
            images = follow_ode(
                bridge.guided,
                torch.randn(COLUMNS, *bridge.shape, generator=torch.Generator().manual_seed(0)),
                self._conditions,
                num_steps=num_steps,
                batch_size=self.config.train_batch_size,
            ).squeeze(1)
        outside = (images.abs() > 1.05).float().mean().item()
        if teacher.clips and outside > OUTSIDE:
            tqdm.write(
                f"{100 * outside:.0f} % of the pixels of the teacher's images, in {num_steps} steps, are outside "
                "[-1, 1], so they are poor: if its DDPMPipeline draws better, set clip_sample=True in its scheduler; "
                "else train the teacher for longer"
            )
        return teacher.decode(images.clamp(-1, 1) if teacher.clips else images).cpu()

    def _draw_student(self, size: int) -> Tensor:
        """Images of the averaged student in [0, 1], shape (size, C, H, W), of the same classes in each row."""
        row, bridge = self._conditions, self.state.bridge
        condition = None if row is None else row.repeat(size // COLUMNS).to(self.state.teacher.device)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(size, *bridge.shape, generator=generator).to(self.state.teacher.device)
        with self.state.averaging() as student:
            scale = None if student.noise_scale is None else student.noise_scale()
            given = {"generator": generator, "noise_scale": scale}
            call, steps = partial(self.state.teacher.call, student.network), max(student.depths)
            drawn = [
                run_solver(call, student.scheduler, x, steps, row, **given)
                for x, row in batches(noise, condition, self.config.train_batch_size)  # which there is memory for
            ]
        return self.state.teacher.decode(torch.cat(drawn)).cpu()
