"""What follows from a noise schedule: start and levels of a student, grids and settings of solvers.

A new kind of schedule is a class of levels in the scheduler, and one of `Clock` here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch

from ..scheduling_hsivi import HSIVIScheduler

# sqrt(C H W) alpha / sigma where an image just begins to show: timestep 800 of 8x8 grey pixels, 956 of 32x32.
LOWEST_SIGNAL = 0.312
LEAST_RATIO = 0.006  # alpha / sigma at the end of the linear schedule
PAIR_POWER, FEW_STEP_POWER = 1.25, 1.5  # of the grids of `power_timesteps`


def power_timesteps(num_steps: int, start: int, end: int, power: float) -> list[int]:
    """Returns timesteps end + (start - end) u^power, u from 1 to 0 in equal steps, descending; of one step, `start`.

    Timesteps that would be equal are moved apart.

    Raises:
        ValueError: There are more steps than timesteps from end to start.
    """
    if not 1 <= num_steps <= start - end + 1:
        raise ValueError(f"{num_steps} solver steps: give from 1 to {start - end + 1}, the number of timesteps")
    steps = end + (start - end) * torch.linspace(0, 1, num_steps, dtype=torch.float64) ** power
    return move_apart(map(round, steps.tolist()), start) if num_steps > 1 else [start]


def move_apart(steps: Iterable[int], start: int) -> list[int]:
    """Returns ascending timesteps, of which some may be equal, apart and descending, none above the start."""
    apart = accumulate(steps, lambda below, step: max(step, below + 1))
    return [min(step, start - above) for above, step in enumerate([*apart][::-1])]


class Clock(ABC):
    """The levels of a noise schedule as training and solvers use them; `clock_of` makes the right one."""

    # Solvers that cannot follow it, and the one with the best images in many steps.
    unsupported: frozenset[str] = frozenset()
    reference: str

    def __init__(self, schedule: HSIVIScheduler) -> None:
        self.schedule, self.size = schedule, len(schedule)
        self.spacing = self.size // 50

    def signal_level(self, shape: tuple[int, ...], signal: float) -> int:
        """Returns the first level where sqrt(C H W) alpha / sigma is at most a number, or the last where alpha > 0.

        A mean over n values has the noise of one by sqrt(n). So levels of images of other sizes and channels mean the
        same where this product is the same (Hoogeboom et al. 2023, arXiv 2301.11093). On the linear schedule of 1000,
        3.2 is at 440 of 8x8 grey pixels, 674 of 32x32, 750 of 32x32 in colour, 836 of 64x64 in colour.

        Args:
            shape: (C, H, W) of the images.
            signal: Above 0.
        """
        alpha, sigma = self._alpha_sigma()
        above = math.sqrt(math.prod(shape)) * alpha / sigma > signal
        return min(int(above.sum()), int((alpha > 0).sum()) - 1)

    @abstractmethod
    def start(self, start_timestep: int | None, rule: tuple[str, float] | None, shape: tuple[int, ...]) -> int | None:
        """Returns the level of a student's first step; None leaves it to the spacing of the grid.

        Args:
            start_timestep: What the user asked for.
            rule: Else ("signal", s): where sqrt(C H W) alpha / sigma falls to s; ("noise", n): where
                sigma / (sqrt(C) alpha) rises to n, at any size; None for no rule.
            shape: (C, H, W).

        Raises:
            ValueError: A student of this schedule cannot start there.
        """

    def starts(
        self, start_timestep: int | None, rule: tuple[str, float] | None, shape: tuple[int, ...], number: int
    ) -> list[int | None]:
        """Returns `start` for each of several grids that one network serves, N / 50 apart.

        So the network can tell their first layers apart by the time.
        """
        first = self.start(start_timestep, rule, shape)
        if first is None:
            return [None] * number
        first = max(min(first, self.size - 1 - (number - 1) * self.spacing), 0)
        return [first + place * self.spacing for place in range(number)]

    def end(self, noise_eta: float) -> int:
        """Returns tau_0, the level of a student's last output, for the eta of its layers."""
        return 0

    @abstractmethod
    def highest_level(self, shape: tuple[int, ...], outputs: torch.Tensor) -> int:
        """Returns the highest level where outputs of layers are scored; `outputs` are the lowest of each layer."""

    @abstractmethod
    def pair_levels(self, num_steps: int) -> list[int]:
        """Returns descending levels on which a solver follows the ODE well.

        Their times of the network are e + (s - e) u^1.25 with u from 1 to 0 in equal steps and e = N / 100.

        Raises:
            ValueError: There are more steps than levels.
        """

    @abstractmethod
    def few_step_levels(self, shape: tuple[int, ...], num_steps: int) -> list[int]:
        """Returns a grid for solvers of few steps that suits small images; it ends at N / 50, with a power of 1.5.

        On the digits UniPC at 5 steps then has a tenth of the Frechet distance that it has on the grid of diffusers
        (docs/benchmarks/solvers.md); on 32x32 images it has twice as much, and at 2 steps more on all sets.
        """

    @abstractmethod
    def solver_settings(self) -> dict[str, Any]:
        """Returns the settings that give a multistep solver of diffusers this schedule."""

    def _alpha_sigma(self) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(torch.arange(self.size), torch.zeros(1))
        return alpha.flatten(), sigma.flatten()


class BetaClock(Clock):
    """Of a diffusion with betas: it is nearly pure noise at its last levels."""

    unsupported = frozenset(["Euler"])
    reference = "DPM-Solver++ SDE"  # whose noise mends errors of the network

    def start(self, start_timestep: int | None, rule: tuple[str, float] | None, shape: tuple[int, ...]) -> int | None:
        if start_timestep is not None or rule is None:
            return start_timestep
        kind, number = rule
        if kind == "noise":
            return self.signal_level((shape[0], 1, 1), 1 / number)
        return self.signal_level(shape, number)

    def highest_level(self, shape: tuple[int, ...], outputs: torch.Tensor) -> int:
        return self.signal_level(shape, LOWEST_SIGNAL)

    def pair_levels(self, num_steps: int) -> list[int]:
        """See `Clock`; s is the first level where alpha / sigma < LEAST_RATIO: above, a noise prediction is useless."""
        alpha, sigma = self._alpha_sigma()
        start = min(int((alpha / sigma > LEAST_RATIO).sum()), self.size - 1)
        return power_timesteps(num_steps, start, self.size // 100, PAIR_POWER)

    def few_step_levels(self, shape: tuple[int, ...], num_steps: int) -> list[int]:
        start = self.signal_level(shape, LOWEST_SIGNAL)
        return power_timesteps(num_steps, start, self.size // 50, FEW_STEP_POWER)

    def solver_settings(self) -> dict[str, Any]:
        """The betas themselves, for solvers know fewer names of schedules."""
        return {"trained_betas": self.schedule.betas.tolist()}


class EDMClock(BetaClock):
    """Of EDM, as if the data were divided by their standard deviation, so that images show where they do elsewhere."""

    def _alpha_sigma(self) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = super()._alpha_sigma()
        return self.schedule.config.edm["sigma_data"] * alpha, sigma


class FlowClock(Clock):
    """Of a rectified flow: it is pure noise, the base, at its last level alone."""

    unsupported = frozenset(["DDPM", "DDIM, eta 1", "iPNDM"])
    reference = "DPM-Solver++"  # it has no SDE

    def __init__(self, schedule: HSIVIScheduler) -> None:
        super().__init__(schedule)
        self.spacing = 0  # every grid starts at the last level

    def start(self, start_timestep: int | None, rule: tuple[str, float] | None, shape: tuple[int, ...]) -> int:
        last = self.size - 1
        if start_timestep not in (None, last):
            raise ValueError(
                f"start_timestep={start_timestep}: a student of a rectified flow starts at {last}, pure noise: leave "
                "it out"
            )
        return last

    def end(self, noise_eta: float) -> int:
        """See `Clock`; without noise it is the image itself, so the layers are steps of FlowMatchEuler of diffusers."""
        return -1 if noise_eta == 0 else 0

    def highest_level(self, shape: tuple[int, ...], outputs: torch.Tensor) -> int:
        """At least one above the output of the first layer, which starts above all."""
        return max(self.signal_level(shape, LOWEST_SIGNAL), int(outputs.max()) + 1)

    def pair_levels(self, num_steps: int) -> list[int]:
        """See `Clock`; s is N. The levels are those nearest to the times, moved apart where one is nearest to two."""
        times = power_timesteps(num_steps, self.size, max(self.size // 100, 1), PAIR_POWER)
        levels = self.schedule.levels.level(torch.tensor(times)).clamp_min(0)  # at level -1 there is no noise
        return move_apart(reversed(levels.tolist()), self.size - 1)

    def few_step_levels(self, shape: tuple[int, ...], num_steps: int) -> list[int]:
        return power_timesteps(num_steps, self.size - 1, self.size // 50, FEW_STEP_POWER)

    def solver_settings(self) -> dict[str, Any]:
        return {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": self.schedule.config.shift,
        }


def clock_of(schedule: HSIVIScheduler) -> Clock:
    """Returns the clock of a schedule."""
    kind = FlowClock if schedule.is_flow else EDMClock if schedule.is_edm else BetaClock
    return kind(schedule)
