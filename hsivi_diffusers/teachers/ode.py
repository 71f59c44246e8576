"""The teacher's ODE: solvers of diffusers, on grids of timesteps of our choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler
from .denoisers import LOWEST_SIGNAL, call_network, signal_timestep


def power_timesteps(num_calls: int, start: int, end: int, power: float) -> list[int]:
    """Returns timesteps end + (start - end) u^power, u from 1 to 0 in equal steps, descending; of one call, `start`.

    Timesteps that would be equal are moved apart.

    Raises:
        ValueError: There are more calls than timesteps from end to start.
    """
    if not 1 <= num_calls <= start - end + 1:
        raise ValueError(
            f"{num_calls} network calls: give from 1 to {start - end + 1}, for so many timesteps there are"
        )
    steps = end + (start - end) * torch.linspace(0, 1, num_calls, dtype=torch.float64) ** power
    return move_apart(map(round, steps.tolist()), start) if num_calls > 1 else [start]


def move_apart(steps: Iterable[int], start: int) -> list[int]:
    """Returns ascending timesteps, of which some may be equal, apart and descending, none above the start."""
    apart = accumulate(steps, lambda below, step: max(step, below + 1))
    return [min(step, start - above) for above, step in enumerate([*apart][::-1])]


def few_step_timesteps(schedule: HSIVIScheduler, shape: tuple[int, ...], num_calls: int) -> list[int]:
    """Returns a grid for solvers of few calls and images of shape (C, H, W), which suits small images.

    It starts where an image just begins to show, or a rectified flow at pure noise, and ends at N / 50, with a power of
    1.5. On the digits UniPC at 5 calls then has a tenth of the Frechet distance that it has on the grid of diffusers
    (docs/benchmarks/solvers.md); on 32x32 images it has twice as much, and at 2 calls more on all sets.
    """
    start = len(schedule) - 1 if schedule.is_flow else signal_timestep(schedule, shape, LOWEST_SIGNAL)
    return power_timesteps(num_calls, start, len(schedule) // 50, 1.5)


def use_grid(scheduler: Any, timesteps: Sequence[float]) -> Any:
    """Gives a solver of diffusers timesteps of your choice, and returns it; a pipeline can then be run with it.

    Its `set_timesteps` then accepts their number alone. The noise level after the last one stays as its config has it.

    Args:
        scheduler: A multistep solver with `alphas_cumprod` and `sigmas`, or with `set_levels`, as `TeacherIPNDM`.
        timesteps: Of the network calls, descending: from N-1 to 0, or, of a solver with `use_flow_sigmas`, N sigma.
    """
    own, steps = scheduler.set_timesteps, torch.tensor(timesteps)

    def set_timesteps(num_inference_steps: int, device: Any = None) -> None:
        if num_inference_steps != len(steps):
            raise ValueError(f"num_inference_steps={num_inference_steps}: this solver has a grid of {len(steps)} steps")
        own(num_inference_steps, device=device)
        if hasattr(scheduler, "set_levels"):
            scheduler.set_levels(steps)
            return
        if scheduler.config.get("use_flow_sigmas"):
            sigmas = (steps / scheduler.config.num_train_timesteps).clamp_max(1 - 1e-6)  # log alpha is asked for
        else:
            abar = scheduler.alphas_cumprod[steps]
            sigmas = ((1 - abar) / abar).sqrt()
        scheduler.timesteps, scheduler.sigmas = steps.to(device), torch.cat([sigmas, scheduler.sigmas[-1:]])

    scheduler.set_timesteps = set_timesteps
    return scheduler


def batches(x: Tensor, condition: Tensor | None, size: int) -> list[tuple[Tensor, Tensor | None]]:
    """Returns rows with their conditions, if there are any, so many at once."""
    rows = x.split(size)
    conditions = [None] * len(rows) if condition is None else condition.split(size)
    return list(zip(rows, conditions, strict=True))


@torch.no_grad()
def run_solver(
    unet: Any, solver: Any, x: Tensor, num_steps: int, condition: Tensor | None = None, **arguments: Any
) -> Tensor:
    """Follows `num_steps` of a diffusers scheduler from noise x to an image, both of shape (B, C, H, W).

    A variance that the teacher predicts is dropped, unless the solver takes one. The condition are class labels,
    shape (B,); the other arguments are those of `solver.step`.
    """
    solver.set_timesteps(num_steps, device=x.device)
    takes_variance = isinstance(solver, DDPMScheduler) and solver.config.variance_type.startswith("learned")
    for timestep in solver.timesteps:
        output = call_network(unet, x, timestep, condition)
        x = solver.step(output if takes_variance else output[:, : x.shape[1]], timestep, x, **arguments).prev_sample
    return x
