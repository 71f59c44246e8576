"""Pairs of noise and where a solver of the teacher's ODE leads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
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
from ..teachers.solvers import batches, call_for_solver, make_scheduler, solver_states
from ..vi.layers import hierarchy_ends
from ..vi.regression import half_square
from .config import FIRST_BY_PAIRS

PAIR_CALLS = 15  # steps of the teacher from noise to an image
ROWS = 64  # pairs that are computed at once
PAIR_SHARE = 0.25  # of the rows of a first layer that has KL, too; the rest take fresh noise


class InterruptedRunError(Exception):
    """SIGTERM or Ctrl-C ended a run; its progress is saved, and the message says how to continue."""


def read_ends(path: Path, about: str) -> Tensor | None:
    """Returns the ends of pairs that `write_ends` wrote; None if there are none of such a run, or damaged ones."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("about") == _digest(about):
            return file.get_tensor("ends")
    return None


def write_ends(path: Path, ends: Tensor, about: str) -> None:
    """Writes the ends of pairs, with a hash of all that decides them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_tensors({"ends": ends}, partial, {"about": _digest(about)})
    partial.replace(path)


def _digest(about: str) -> str:
    return hashlib.sha256(about.encode()).hexdigest()


def layers_by_pairs(depths: Sequence[int]) -> list[int]:
    """The layers that learn from pairs alone: the first of each grid of `FIRST_BY_PAIRS` steps or more.

    Of two steps the first ends so near to images that regression blurs them: level 77 of 1,000 on the digits.
    """
    first, _ = hierarchy_ends(depths)
    return [t for t, depth in zip(first.tolist(), depths, strict=True) if depth >= FIRST_BY_PAIRS]


def end_levels(scheduler: HSIVIScheduler) -> list[int | None]:
    """Returns the level to which pairs of the first layer of each grid follow the ODE; None for the image.

    The mean of a layer is its output without noise, so its pairs are to have the law of alpha_t x_0 + d z, with
    d^2 = sigma_t^2 - c^2. The ODE leads noise to it at the level s where sigma_s / alpha_s = d / alpha_t, but for the
    factor alpha_t / alpha_s. Without noise, c = 0, s is tau_t. Pairs of one and two steps lead to images.
    """
    first, _ = hierarchy_ends(scheduler.depths)
    alpha, sigma = scheduler.alpha_sigma(torch.arange(len(scheduler)), torch.zeros(1))
    inputs, outputs = scheduler.input_level(first), scheduler.output_level(first)
    layer = scheduler.layers.coefficients(inputs, torch.zeros(1), outputs)
    distance = ((sigma / alpha).log()[:, None] - (layer.direction / layer.alpha).log()).abs()
    nearest = distance.argmin(0).flatten().tolist()
    alone = layers_by_pairs(scheduler.depths)
    return [level if t in alone else None for t, level in zip(first.tolist(), nearest, strict=True)]


def pair_levels(schedule: HSIVIScheduler, ends: Sequence[int | None], num_steps: int = PAIR_CALLS) -> list[int]:
    """Returns the levels of the network calls from noise to the lowest end, see `follow_ode`.

    Raises:
        ValueError: There are more steps than timesteps for them.
    """
    levels, calls = _grid(schedule, ends, num_steps)
    return levels[: max(calls)]


def _grid(schedule: HSIVIScheduler, ends: Sequence[int | None], num_steps: int) -> tuple[list[int], list[int]]:
    """Returns levels of a solver, the ends among them, and the network calls that lead to each end."""
    inner = {end for end in ends if end is not None}
    levels = sorted({*clock_of(schedule).pair_levels(num_steps), *inner}, reverse=True)
    return levels, [len(levels) if end is None else levels.index(end) for end in ends]


def follow_ode(
    teacher: Guided,
    noise: Tensor,
    condition: Tensor | None = None,
    ends: Sequence[int | None] = (None,),
    num_steps: int = PAIR_CALLS,
    batch_size: int = 64,
    show: bool = False,
    made: Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Returns where a solver of the teacher's ODE leads noise, shape (N, E, C, H, W), on the CPU.

    The solver is UniPC of diffusers, on the grid of `Clock.pair_levels` and the ends.

    Args:
        teacher: Guided or not. Its scheduler's clipping is honoured.
        noise: x_T ~ N(0, I), shape (N, C, H, W).
        condition: Condition of each row, shape (N,), or None.
        ends: E levels; None for the image or latents, not clipped.
        num_steps: Solver steps to the image.
        batch_size: Rows that the network is called with at once.
        show: Show a progress bar.
        made: What was made before, (M, E, C, H, W) with M <= N.
        stop: Asked between batches; if it returns true, `InterruptedRunError` is raised, with what was made so far.

    Raises:
        ValueError: A number is not finite, or there are more steps than timesteps for them.
        InterruptedRunError: See `stop`.
    """
    schedule, device = teacher.teacher.schedule, teacher.teacher.device
    levels, calls = _grid(schedule, ends, num_steps)
    solver, _ = make_scheduler("UniPC", schedule, levels)
    done = 0 if made is None else len(made)
    if made is not None and done == len(noise):
        ended = made
    else:
        ended = noise.new_empty(len(noise), len(ends), *noise.shape[1:])  # parts put together later take twice as much
        ended[:done] = 0 if made is None else made
    rest = None if condition is None else condition[done:]
    todo = batches(noise[done:], rest, batch_size) if done < len(noise) else []
    call = call_for_solver(teacher)
    for x, rows in bar(todo, "pairs", leave=False, disable=not show):
        if stop():
            raise InterruptedRunError(ended[:done].clone())
        rows = None if rows is None else rows.to(device)
        states = solver_states(call, solver, x.to(device), len(levels), rows)
        numbered = enumerate(islice(states, max(calls)), 1)
        reached = {0: x, **{number: state.cpu() for number, state in numbered if number in calls}}
        ended[done : done + len(x)] = torch.stack([reached[number] for number in calls], 1)
        done += len(x)
    if lost := int((~ended.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(
            f"{lost} of {len(noise)} pairs contain NaN or inf: check the teacher's samples, and if it runs in "
            "fp16, take bf16 or single precision"
        )
    return ended


class TeacherPairs:
    """Pairs of noise and the mean to which the teacher's ODE leads it, of layers that take noise.

    They are drawn with replacement, and kept in main memory; what is drawn goes to a device.

    Args:
        scheduler: Gives the grids of the layers.
        noise: x_T ~ N(0, I), shape (N, C, H, W).
        ended: By `follow_ode` at the `end_levels` of the scheduler, shape (N, G, C, H, W), of G grids. The means are
            written into it, since there may be memory for one of them only.
        condition: Condition of each pair, shape (N,), or None.
        clips: Clip images to [-1, 1].
        device: Of what is drawn.
    """

    def __init__(
        self,
        scheduler: HSIVIScheduler,
        noise: Tensor,
        ended: Tensor,
        condition: Tensor | None = None,
        clips: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        # The student's, in parts, for memory; the ODE started from all of it.
        noise = (
            torch.cat([scheduler.low_pass(x) for x in noise.split(ROWS)]) if scheduler.config.noise_cutoff else noise
        )
        self.noise, self.condition, self._device = noise, condition, device
        self._first, _ = hierarchy_ends(scheduler.depths)
        for t, end, means in zip(self._first.split(1), end_levels(scheduler), ended.unbind(1), strict=True):
            layer = scheduler.layers.coefficients(scheduler.input_level(t), noise, scheduler.output_level(t))
            for x_next, x in zip(noise.split(ROWS), means.split(ROWS), strict=True):
                if end is None:
                    x0 = x.clamp(-1, 1) if clips else x
                    x.copy_(layer.mean(x0, layer.noise_in(x_next, x0)))
                else:
                    x.mul_(layer.alpha / scheduler.alpha_sigma(torch.tensor([end]), noise)[0])
        self.mean = ended

    def sample(self, t: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws (x_T, the mean of layer t, condition) of layers t, shape (B,), that take noise, for `PairChain`."""
        index = torch.randint(len(self.noise), (len(t),), generator=generator)
        mean = self.mean[index, (self._first < t[:, None]).sum(1)]
        condition = None if self.condition is None else self.condition[index].to(self._device)
        return self.noise[index].to(self._device), mean.to(self._device), condition


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
