"""Solvers of the teacher's ODE and SDE: schedulers of diffusers, on grids of our choice, and students as samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ..pipeline_hsivi import HSIVIPipeline
from ..scheduling_hsivi import HSIVIScheduler, shifted
from .guidance import Guided
from .levels import clock_of
from .teacher import Teacher, network_of

Call = Callable[[Tensor, Any, Tensor | None], Tensor]  # (x, time of the network, condition) -> output of the network


class TeacherIPNDM(IPNDMScheduler):
    """IPNDMScheduler of diffusers at the noise levels of a teacher; by itself it has a clock of its own, and takes v.

    It is Adams-Bashforth of order up to 4 on the predicted noise, with DDIM's step (arXiv 2204.13902, iPNDM).
    """

    schedule = HSIVIScheduler()

    @classmethod
    def from_config(cls, config: Any, **settings: Any) -> TeacherIPNDM:
        """Takes betas and prediction type from the config of the teacher's scheduler."""
        solver = cls()
        solver.schedule = HSIVIScheduler.from_config(config, **settings)
        return solver

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Sets a grid of spacing "trailing"."""
        super().set_timesteps(num_inference_steps, device)
        size = len(self.schedule)
        self.set_levels(torch.linspace(size, 0, num_inference_steps + 1).round().long()[:-1] - 1)

    def set_levels(self, timesteps: torch.Tensor) -> None:
        """Sets timesteps, and with them alpha and sigma, which end in those of an image."""
        alpha, sigma = self.schedule.alpha_sigma(timesteps, torch.zeros(1))
        self.timesteps, self.alphas, self.betas = timesteps, _end(alpha.flatten(), 1.0), _end(sigma.flatten(), 0.0)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        """Turns what the teacher predicts into v, and steps."""
        # Where x0 was clipped, the noise that goes with it is worse: FD 9.3 instead of 1.8 on the digits in 5 steps.
        return super().step(_predict_v(self.schedule, model_output, timestep, sample), timestep, sample)


def _end(levels: torch.Tensor, last: float) -> torch.Tensor:
    return torch.cat([levels, torch.tensor([last])])


def _predict_v(schedule: HSIVIScheduler, model_output: Tensor, level: Any, sample: Tensor) -> Tensor:
    """Converts a network output to v."""
    x0, noise = schedule.predict(model_output, level, sample)
    alpha, sigma = schedule.alpha_sigma(torch.as_tensor(level).reshape(-1), sample)
    return alpha * noise - sigma * x0


def with_betas(schedule: HSIVIScheduler) -> HSIVIScheduler:
    """Returns the schedule that solvers of diffusers follow: itself, of EDM one of v and of betas at its levels."""
    if not schedule.is_edm:
        return schedule
    alpha, _ = schedule.alpha_sigma(torch.arange(len(schedule)), torch.zeros(1, dtype=torch.float64))
    betas = 1 - (alpha / torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])).square()
    settings = {"prediction_type": "v_prediction", "trained_betas": betas.tolist(), "edm": None}
    solved: HSIVIScheduler = HSIVIScheduler.from_config(schedule.config, **settings)
    return solved


def call_for_solver(teacher: Guided) -> Call:
    """Returns the calls of a teacher that go with its schedule `with_betas`."""
    schedule = teacher.teacher.schedule
    if not schedule.is_edm:
        return teacher
    schedule = HSIVIScheduler.from_config(schedule.config, clip_sample=False, thresholding=False)  # the solver clips

    def call(x: Tensor, level: Any, condition: Tensor | None) -> Tensor:
        output = teacher(x, schedule.levels.time(torch.as_tensor(level)), condition)
        return _predict_v(schedule, output, level, x)

    return call


# Class and settings of each baseline; what is not set is of the teacher's config, or the default of diffusers.
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler, {}),
    # diffusers' DDIMScheduler has no quadratic grid, which is the best for few steps; the formulas are the same.
    "DDIM": (HSIVIScheduler, {"timestep_spacing": "quadratic", "noise_eta": 0.0}),
    "DDIM, eta 1": (DDIMScheduler, {}),
    "Euler": (FlowMatchEulerDiscreteScheduler, {}),  # what pipelines of rectified flows have
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
    "SA-Solver": (SASolverScheduler, {}),
    "iPNDM": (TeacherIPNDM, {}),
}
# Settings of a teacher's scheduler that solvers take: what they solve, not how its pipeline does.
OF_TEACHER = {*signature(HSIVIScheduler).parameters, "variance_type", "_use_default_values"}


def use_grid(scheduler: Any, timesteps: Sequence[float], sigmas: Tensor | None = None) -> Any:
    """Gives a solver of diffusers timesteps of your choice, and returns it; a pipeline can then be run with it.

    Its `set_timesteps` then accepts their number alone. The noise level after the last one stays as its config has it.

    Args:
        scheduler: A solver with `alphas_cumprod` and `sigmas`, or with `set_levels`, as `TeacherIPNDM`.
        timesteps: Of the network calls, descending: from N-1 to 0, or, of a rectified flow, N sigma.
        sigmas: sigma / alpha of the steps of a solver with `alphas_cumprod`, shape (n,); by default those of the
            timesteps.
    """
    own, steps = scheduler.set_timesteps, torch.tensor(timesteps)

    def set_timesteps(num_inference_steps: int, device: Any = None) -> None:
        if num_inference_steps != len(steps):
            raise ValueError(f"num_inference_steps={num_inference_steps}: this solver has a grid of {len(steps)} steps")
        own(num_inference_steps, device=device)
        if hasattr(scheduler, "set_levels"):
            scheduler.set_levels(steps)
            return
        if sigmas is not None:
            levels = sigmas
        elif scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
            levels = (steps / scheduler.config.num_train_timesteps).clamp_max(1 - 1e-6)  # log alpha is asked for
        else:
            abar = scheduler.alphas_cumprod[steps]
            levels = ((1 - abar) / abar).sqrt()
        scheduler.timesteps, scheduler.sigmas = steps.to(device), torch.cat([levels, scheduler.sigmas[-1:].cpu()])

    scheduler.set_timesteps = set_timesteps
    return scheduler


def use_clipping(solver: Any, schedule: HSIVIScheduler) -> Any:
    """Makes a solver of diffusers clip or threshold clean images as the teacher's scheduler does, and returns it.

    A teacher may need it: where there is much noise an error of its prediction is multiplied by sigma / alpha, and
    DDPMScheduler clips by default, but most solvers have no `clip_sample`. They clip what they would threshold.

    Args:
        solver: A scheduler with the setting `thresholding`.
        schedule: Of the teacher.
    """
    clips = schedule.config.clip_sample or schedule.config.thresholding
    solver.register_to_config(clip_sample=False, thresholding=bool(clips))
    solver._threshold_sample = schedule.clip
    return solver


def batches(x: Tensor, condition: Tensor | None, size: int) -> list[tuple[Tensor, Tensor | None]]:
    """Returns rows with their conditions, if there are any, in batches of `size`."""
    rows = x.split(size)
    conditions = [None] * len(rows) if condition is None else condition.split(size)
    return list(zip(rows, conditions, strict=True))


@torch.no_grad()
def solver_states(
    call: Call, solver: Any, x: Tensor, num_steps: int, condition: Tensor | None = None, **arguments: Any
) -> Iterator[Tensor]:
    """Yields the state after each of `num_steps` of a diffusers scheduler from noise x, all of shape (B, C, H, W).

    A variance that the teacher predicts is dropped, unless the solver takes one. The condition has shape (B,); the
    other arguments are those of `solver.step`.
    """
    solver.set_timesteps(num_steps, device=x.device)
    if isinstance(solver, HSIVIScheduler):
        x = solver.low_pass(x)
    takes_variance = isinstance(solver, DDPMScheduler) and solver.config.variance_type.startswith("learned")
    for timestep in solver.timesteps:
        output = call(x, timestep, condition)
        x = solver.step(output if takes_variance else output[:, : x.shape[1]], timestep, x, **arguments).prev_sample
        yield x


def run_solver(
    call: Call, solver: Any, x: Tensor, num_steps: int, condition: Tensor | None = None, **arguments: Any
) -> Tensor:
    """Returns the image that these steps end in, see `solver_states`."""
    *_, image = solver_states(call, solver, x, num_steps, condition, **arguments)
    return image


class Sampler(Protocol):
    """Returns images in [0, 1], shape (B, C, H, W); labels, shape (B,), are for a class-conditional network."""

    def __call__(  # noqa: D102
        self, batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Solver:
    """A Sampler by the steps of a scheduler of diffusers, whose `step` gets the settings."""

    scheduler: Any
    num_steps: int
    teacher: Teacher  # gives shape and decoder
    call: Call  # the network: the teacher, guided or not, or a student
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, batch_size: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """Returns images; the noise is drawn on the CPU."""
        device = self.teacher.device
        labels = None if labels is None else labels.to(device)
        given = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        noise = torch.randn(batch_size, *self.teacher.shape, generator=generator).to(device)
        x = run_solver(self.call, self.scheduler, noise, self.num_steps, labels, **self.settings, **given)
        return self.teacher.decode(x)

    @property
    def times(self) -> list[float]:
        """The times of the network at the steps."""
        self.scheduler.set_timesteps(self.num_steps)
        times: list[float] = self.scheduler.timesteps.tolist()
        return times

    @property
    def grid(self) -> str:
        """The same as text, such as "800, 600, 400, 200, 0"."""
        return shorten(self.times)


def shorten(timesteps: list[float]) -> str:
    """Timesteps as text, of more than ten the first three and the last."""
    shown = timesteps if len(timesteps) <= 10 else [*timesteps[:3], "...", timesteps[-1]]
    return ", ".join(each if isinstance(each, str) else f"{each:.4g}" for each in shown)


def make_scheduler(
    method: str, schedule: HSIVIScheduler, levels: Sequence[int] | None = None, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns a scheduler of diffusers that solves the ODE or SDE of a noise schedule, and arguments of its `step`.

    It clips and thresholds as the schedule does. Its calls are those of `call_for_solver`.

    Args:
        method: Key of SOLVERS, such as "DDIM", eta 0 on the quadratic grid, or "DPM-Solver++", 2M.
        schedule: Of the teacher.
        levels: Levels of the network calls; by default the solver's own grid.
        **settings: Of the solver, such as `timestep_spacing`, instead of those of SOLVERS and schedule.

    Raises:
        ValueError: The method is unknown, or cannot follow this schedule.
    """
    schedule = with_betas(schedule)
    clock = clock_of(schedule)
    able = [name for name in SOLVERS if name not in clock.unsupported]
    if method not in able:
        flows = "not for rectified flows" if schedule.is_flow else "for rectified flows alone"
        why = f"is {flows if method in SOLVERS else 'unknown'}"
        raise ValueError(f"method {method!r} {why}: choose one of {', '.join(map(repr, able))}")
    kind, chosen = SOLVERS[method]
    chosen, known = {**chosen, **settings}, signature(kind).parameters
    if kind is HSIVIScheduler:
        grid = {} if levels is None else {"layer_timesteps": [*levels, -1]}
        return kind.from_config(schedule.config, **chosen, **grid), {}
    own = OF_TEACHER & {*known, "_use_default_values"}
    config = {name: value for name, value in schedule.config.items() if name in own}
    scheduler = kind.from_config(
        schedule.config if kind is TeacherIPNDM else config, **clock.solver_settings(), **chosen
    )
    if "thresholding" in known:
        use_clipping(scheduler, schedule)
    if levels is not None:
        use_grid(scheduler, schedule.levels.time(torch.tensor(levels)).tolist())
    return scheduler, {"eta": 1.0} if method == "DDIM, eta 1" else {}


def make_solver(
    method: str, num_steps: int, teacher: Guided, levels: Sequence[int] | None = None, **settings: Any
) -> Solver:
    """Returns a solver of the teacher, see `make_scheduler`.

    Args:
        method: Key of SOLVERS.
        num_steps: Steps; of a guided teacher each is two network calls.
        teacher: Guided or not.
        levels: Of the steps.
        **settings: Of the solver.
    """
    schedule, stock = teacher.teacher.schedule, teacher.teacher.stock_sigmas(num_steps)
    if method == "Euler" and levels is None and stock is not None:
        levels = schedule.levels.level(len(schedule) * shifted(stock, schedule.config.shift)).tolist()
    scheduler, arguments = make_scheduler(method, schedule, levels, **settings)
    return Solver(scheduler, num_steps, teacher.teacher, call_for_solver(teacher), arguments)


def make_student(
    pipeline: DiffusionPipeline, teacher: Teacher, num_steps: int | None = None, guidance_scale: float | None = None
) -> Sampler:
    """Returns the distilled pipeline as a sampler, with one of its trained step counts, or the largest."""
    if not isinstance(pipeline, HSIVIPipeline):  # a stock one, which gives the steps no generator
        call = partial(teacher.call, network_of(pipeline))
        return Solver(pipeline.scheduler, num_steps or max(pipeline.scheduler.depths), teacher, call)
    pipeline.set_progress_bar_config(disable=True)

    def sampler(batch_size: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"class_labels": labels, "guidance_scale": guidance_scale}
        images: Tensor
        (images,) = pipeline(batch_size, generator, num_steps, **given, output_type="pt", return_dict=False)
        return images

    return sampler


@torch.no_grad()
def sample(
    sampler: Sampler, num_samples: int, batch_size: int, seed: int, num_classes: int | None = None
) -> Iterator[torch.Tensor]:
    """Yields batches of images on the CPU, `num_samples` in all.

    Each batch has a generator of its own, so that every method starts each batch from the same noise. With classes,
    image i is of the class i mod `num_classes`, for every method: so the classes are balanced.
    """
    for first in range(0, num_samples, batch_size):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        rows = torch.arange(first, min(first + batch_size, num_samples))
        labels = () if num_classes is None else (rows % num_classes,)
        yield sampler(len(rows), generator, *labels).cpu()
