"""Pairs of noise and what a solver of the teacher's ODE makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..runs.bars import bar
from ..runs.state_dicts import save_tensors
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.guidance import Guided
from ..teachers.levels import clock_of
from ..teachers.solvers import batches, call_for_solver, make_scheduler, run_solver
from ..vi.distributions import randn_like
from ..vi.layers import hierarchy_ends
from ..vi.regression import half_square

PAIR_CALLS = 15  # steps of the teacher for a pair


class InterruptedRunError(Exception):
    """SIGTERM or Ctrl-C ended a run; its progress is saved, and the message says how to continue."""


def read_images(path: Path, about: str) -> Tensor | None:
    """Returns the images of pairs that `write_images` wrote; None if there are none of such a run, or damaged ones."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("about") == _digest(about):
            return file.get_tensor("images")
    return None


def write_images(path: Path, images: Tensor, about: str) -> None:
    """Writes the images of pairs, with a hash of all that decides them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_tensors({"images": images}, partial, {"about": _digest(about)})
    partial.replace(path)


def _digest(about: str) -> str:
    return hashlib.sha256(about.encode()).hexdigest()


class TeacherPairs:
    """Pairs (x_T, x_0) of noise and what a solver of the teacher's ODE makes of it, drawn with replacement.

    The layer that takes noise is to lead from x_T to x_0, those below it from x_0, diffused to their input, back to
    it. The solver is UniPC of diffusers, on the grid of `Clock.pair_levels`. The pairs are kept in main memory; what is
    drawn goes to the device of the teacher.

    Args:
        teacher: Guided or not. Its scheduler's clipping is honoured.
        scheduler: Gives the grid of the layers.
        noise: x_T ~ N(0, I), shape (N, C, H, W); `end` has the images or latents x_0.
        condition: Condition of each pair, shape (N,), or None.
        num_steps: Solver steps for a pair.
        batch_size: Pairs that the network is called with at once.
        show: Show a progress bar.
        made: Images x_0 that were made before, (M, C, H, W) with M <= N.
        stop: Asked between batches; if it returns true, `InterruptedRunError` is raised, with the images made so far.

    Attributes:
        made: Images x_0 before pixels are clipped.
        outside: Share of the numbers of x_0 that are beyond 1.05 in absolute value, before.

    Raises:
        ValueError: An image is not finite, or there are more steps than timesteps for them.
        InterruptedRunError: See `stop`.
    """

    def __init__(
        self,
        teacher: Guided,
        scheduler: HSIVIScheduler,
        noise: Tensor,
        condition: Tensor | None = None,
        num_steps: int = PAIR_CALLS,
        batch_size: int = 64,
        show: bool = False,
        made: Tensor | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._device, self.scheduler = teacher.teacher.device, scheduler
        self.noise, self.condition = noise.cpu(), None if condition is None else condition.cpu()
        schedule, clips = teacher.teacher.schedule, teacher.teacher.clips
        solver, _ = make_scheduler("UniPC", schedule, clock_of(schedule).pair_levels(num_steps))
        parts = [torch.empty_like(self.noise[:0]) if made is None else made]
        done = len(parts[0])
        rest = None if self.condition is None else self.condition[done:]
        todo = batches(self.noise[done:], rest, batch_size) if done < len(noise) else []
        call = call_for_solver(teacher)
        for x, rows in bar(todo, "pairs", leave=False, disable=not show):
            if stop():
                raise InterruptedRunError(torch.cat(parts))
            rows = None if rows is None else rows.to(self._device)
            parts.append(run_solver(call, solver, x.to(self._device), num_steps, rows).cpu())
        self.made = images = torch.cat(parts)
        self.outside = (images.abs() > 1.05).float().mean().item()
        self.end = images.clamp(-1, 1) if clips else images
        if lost := int((~self.end.isfinite()).flatten(1).any(1).sum()):
            raise ValueError(
                f"{lost} of {len(noise)} pairs contain NaN or inf: check the teacher's samples, and if it runs in "
                "fp16, take bf16 or single precision"
            )

    def sample(self, t: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws (x_{t+1}, the mean of layer t whose clean image is x_0, condition) of layers t (B,) for `PairChain`."""
        index = torch.randint(len(self.noise), (len(t),), generator=generator)
        x_next, x0 = self.noise[index].to(self._device), self.end[index].to(self._device)
        timestep, below = self.scheduler.input_level(t), ~torch.isin(t, hierarchy_ends(self.scheduler.depths)[0])
        if bool(below.any()):
            diffused = self.scheduler.diffuse(x0, randn_like(x0, generator), timestep)
            x_next = torch.where(below.to(x0.device)[:, None, None, None], diffused, x_next)
        layer = self.scheduler.layers.coefficients(timestep, x_next, self.scheduler.output_level(t))
        end = layer.mean(x0, layer.noise_in(x_next, x0))
        return x_next, end, None if self.condition is None else self.condition[index].to(self._device)


def image_loss(scheduler: HSIVIScheduler, coarse: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the loss 1/2 (|m|^2 + kappa |P m|^2) in image units, for `Regression` and `WithPairs`.

    m is the residual of the clean image, that of the layer's mean divided by its `image_share`, so that one
    weight serves any number of steps. P m are the means of m over 4 x 4 fields of equal size: brightness, colour and
    layout, in which the solver is good; the details come from the objective with the critic. kappa >= 0 is `coarse`.
    """

    def loss(residual: Tensor, t: Tensor) -> Tensor:
        """Residuals of means, shape (B, C, H, W), of layers t -> (B,)."""
        ends = scheduler.input_level(t), residual, scheduler.output_level(t)
        image = residual / scheduler.layers.coefficients(*ends).image_share
        if not coarse:
            return half_square(image)
        means = adaptive_avg_pool2d(image, 4)
        return half_square(image) + coarse * half_square(means) * (image[0].numel() / means[0].numel())

    return loss
