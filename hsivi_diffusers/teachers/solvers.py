"""Sampling by what a report compares: students, and the baselines (solvers of the teacher)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    IPNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from ..pipeline_hsivi import HSIVIPipeline
from ..scheduling_hsivi import HSIVIScheduler
from .denoisers import Network, sample_shape
from .guidance import GuidedNetwork
from .ode import run_solver, use_grid
from .teacher import decode, network_of


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
        x0, noise = self.schedule.predict(model_output, timestep, sample)
        alpha, sigma = self.schedule.alpha_sigma(torch.as_tensor(timestep), sample)
        return super().step(alpha * noise - sigma * x0, timestep, sample)


def _end(levels: torch.Tensor, last: float) -> torch.Tensor:
    return torch.cat([levels, torch.tensor([last])])


# Class and settings of each baseline; what is not set is of the teacher's config, or the default of diffusers.
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler, {}),
    # diffusers' DDIMScheduler has no quadratic grid, which is the best for few steps; the formulas are the same.
    "DDIM": (HSIVIScheduler, {"timestep_spacing": "quadratic", "noise_eta": 0.0}),
    "DDIM, eta 1": (DDIMScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
    "SA-Solver": (SASolverScheduler, {}),
    "iPNDM": (TeacherIPNDM, {}),
}


class Sampler(Protocol):
    """Returns images in [0, 1], shape (B, C, H, W); labels, shape (B,), are for a class-conditional network."""

    def __call__(  # noqa: D102
        self, batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Solver:
    """A Sampler by the steps of a scheduler of diffusers, whose `step` is given the settings."""

    scheduler: Any
    num_steps: int
    unet: Network | GuidedNetwork
    settings: dict[str, Any] = field(default_factory=dict)
    host: DiffusionPipeline | None = None  # whose VAE decodes, if it denoises latents

    @torch.no_grad()
    def __call__(self, batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Returns images; the noise is drawn on the CPU."""
        device = self.unet.device
        labels = None if labels is None else labels.to(device)
        given = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        noise = torch.randn(batch_size, *sample_shape(self.unet), generator=generator).to(device)
        x = run_solver(self.unet, self.scheduler, noise, self.num_steps, labels, **self.settings, **given)
        return decode(self.host, x)

    @property
    def grid(self) -> str:
        """The timesteps of the network calls, such as "800, 600, 400, 200, 0"."""
        self.scheduler.set_timesteps(self.num_steps)
        return shorten(self.scheduler.timesteps.tolist())


def shorten(timesteps: list[float]) -> str:
    """Timesteps as text, of more than ten the first three and the last."""
    shown = timesteps if len(timesteps) <= 10 else [*timesteps[:3], "...", timesteps[-1]]
    return ", ".join(each if isinstance(each, str) else f"{each:.4g}" for each in shown)


def make_solver(
    method: str,
    num_steps: int,
    unet: Network | GuidedNetwork,
    config: Any,
    timesteps: Sequence[int] | None = None,
    host: DiffusionPipeline | None = None,
    **settings: Any,
) -> Solver:
    """Returns a solver of the teacher.

    Args:
        method: Key of SOLVERS, such as "DDIM", eta 0 on the quadratic grid, or "DPM-Solver++", 2M.
        num_steps: Network calls.
        unet: The teacher.
        config: Config of the teacher's scheduler.
        timesteps: Levels of the network calls; by default the solver's own grid.
        host: The teacher's pipeline, if it has a VAE.
        **settings: Of the solver's scheduler, such as `timestep_spacing`, instead of those of SOLVERS and config.

    Raises:
        ValueError: The method is unknown, or not for rectified flows.
    """
    if method not in SOLVERS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(map(repr, SOLVERS))}")
    kind, chosen = SOLVERS[method]
    schedule, chosen = HSIVIScheduler.from_config(config), {**chosen, **settings}
    if schedule.is_flow and kind is not HSIVIScheduler:
        chosen |= _flow_options(method, kind, schedule)
        known = signature(kind).parameters
        config = {
            name: value for name, value in config.items() if name[0] == "_" or (name in known and name != "shift")
        }
    if timesteps is not None and kind is HSIVIScheduler:
        chosen["layer_timesteps"] = [*timesteps, -1]
    scheduler = kind.from_config(config, **chosen)
    if timesteps is not None and kind is not HSIVIScheduler:
        use_grid(scheduler, schedule.levels.time(torch.tensor(timesteps)).tolist())
    return Solver(scheduler, num_steps, unet, {"eta": 1.0} if method == "DDIM, eta 1" else {}, host)


def _flow_options(method: str, kind: Any, schedule: HSIVIScheduler) -> dict[str, Any]:
    """What a scheduler of diffusers must be told to solve a rectified flow."""
    if "use_flow_sigmas" not in signature(kind).parameters:
        able = [name for name, (each, _) in SOLVERS.items() if "use_flow_sigmas" in signature(each).parameters]
        raise ValueError(
            f"method {method!r} is not for rectified flows: choose one of {', '.join(map(repr, ['DDIM', *able]))}"
        )
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": schedule.config.shift}


def make_student(
    pipeline: DiffusionPipeline, num_steps: int | None = None, guidance_scale: float | None = None
) -> Sampler:
    """Returns the distilled pipeline as a sampler, with one of its trained counts of calls, or the largest."""
    if not isinstance(pipeline, HSIVIPipeline):  # a stock one, which gives the steps no generator
        scheduler = pipeline.scheduler
        return Solver(scheduler, num_steps or max(scheduler.depths), network_of(pipeline), host=pipeline)
    pipeline.set_progress_bar_config(disable=True)

    def sampler(batch_size: int, generator: torch.Generator, labels: torch.Tensor | None = None) -> torch.Tensor:
        given: dict[str, Any] = {"class_labels": labels, "guidance_scale": guidance_scale}
        images: torch.Tensor = pipeline(batch_size, generator, num_steps, **given, output_type="pt", return_dict=False)[
            0
        ]
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
