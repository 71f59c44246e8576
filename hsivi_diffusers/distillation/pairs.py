"""Pairs of noise and what a solver of the teacher's ODE makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..runs.bars import bar
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.denoisers import Network
from ..teachers.guidance import GuidedNetwork
from ..teachers.ode import batches, move_apart, power_timesteps, run_solver, use_grid
from ..vi.distributions import randn_like
from ..vi.layers import hierarchy_ends
from ..vi.regression import half_square

PAIR_CALLS = 15  # of the teacher, for a pair
LEAST_RATIO = 0.006  # alpha / sigma at the end of the linear clock


class TeacherPairs:
    """Pairs (x_T, x_0) of noise and what a solver of the teacher's ODE makes of it, drawn with replacement.

    The layer that takes noise is to lead from x_T to x_0, those below it from x_0, diffused to their input, back to
    it. The solver is UniPC of diffusers, on the grid of `pair_levels`. The pairs wait in main memory; what is drawn
    goes to the device of the teacher.

    Args:
        unet: The teacher, guided or not.
        scheduler: Gives its noise schedule and what it predicts, and the grid of the layers.
        noise: x_T ~ N(0, I), shape (N, C, H, W); `end` has the images or latents x_0.
        condition: Class label of each pair, or, of a guided teacher, its condition, shape (N,), or None.
        num_calls: Network calls for a pair.
        batch_size: Pairs that the network is called with at once.
        clip: Clip x_0 to [-1, 1], the range of pixels; not for latents.
        show: Show a progress bar.

    Raises:
        ValueError: An image is not finite, or there are more calls than timesteps for them.
    """

    def __init__(
        self,
        unet: Network | GuidedNetwork,
        scheduler: HSIVIScheduler,
        noise: Tensor,
        condition: Tensor | None = None,
        num_calls: int = PAIR_CALLS,
        batch_size: int = 64,
        clip: bool = True,
        show: bool = False,
    ) -> None:
        self._device, self.scheduler = unet.device, scheduler
        self.noise, self.condition = noise.cpu(), None if condition is None else condition.cpu()
        labelled = batches(noise, None if condition is None else condition.to(unet.device), batch_size)
        solver = make_unipc(scheduler, pair_levels(scheduler, num_calls))
        shown = bar(labelled, "pairs", leave=False, disable=not show)
        ends = [run_solver(unet, solver, x.to(unet.device), num_calls, labels).cpu() for x, labels in shown]
        self.end = torch.cat(ends).clamp_(-1, 1) if clip else torch.cat(ends)
        if lost := int((~self.end.isfinite()).flatten(1).any(1).sum()):
            raise ValueError(
                f"{lost} of {len(noise)} pairs end in numbers that are not finite: look at what the teacher draws, and "
                "if it runs in fp16, take bf16 or single precision"
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


def make_unipc(schedule: HSIVIScheduler, levels: list[int]) -> UniPCMultistepScheduler:
    """Returns UniPC of diffusers with the noise schedule of a teacher, on a grid of levels."""
    common = ("num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
    config: dict[str, Any] = {name: schedule.config[name] for name in common}
    if schedule.is_flow:
        config["use_flow_sigmas"] = True
    else:  # the betas themselves, for the solver knows fewer names of schedules
        config["trained_betas"] = schedule.betas.tolist()
    solver: UniPCMultistepScheduler = use_grid(
        UniPCMultistepScheduler(**config), schedule.levels.time(torch.tensor(levels)).tolist()
    )
    return solver


def pair_levels(schedule: HSIVIScheduler, num_calls: int) -> list[int]:
    """Returns levels of a solver that follow the ODE well on linear, scaled-linear, cosine and flow clocks, descending.

    Their times of the network are e + (s - e) u^1.25 with u from 1 to 0 in equal steps, e = N / 100, and s the last
    one, or with betas the first where alpha / sigma is below LEAST_RATIO: a noise prediction is worth nothing there.
    Of a flow they are the levels nearest to these times, moved apart where one is nearest to several.

    Raises:
        ValueError: There are more calls than timesteps from e to s.
    """
    size = len(schedule)
    if schedule.is_flow:
        times = power_timesteps(num_calls, size, max(size // 100, 1), 1.25)
        levels = schedule.levels.level(torch.tensor(times)).clamp_min(0)  # at level -1 there is no noise
        return move_apart(reversed(levels.tolist()), size - 1)
    alpha, sigma = schedule.alpha_sigma(torch.arange(size), torch.zeros(1))
    start = min(int((alpha / sigma > LEAST_RATIO).sum()), size - 1)
    return power_timesteps(num_calls, start, size // 100, 1.25)


def image_loss(scheduler: HSIVIScheduler, coarse: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the loss 1/2 (|m|^2 + kappa |P m|^2) in image units, for `Regression` and `WithPairs`.

    m is the residual of the clean image, that of the layer's mean divided by its `image_share`, so that one
    weight serves any number of steps. P m are the means of m over 4 x 4 fields of equal size: brightness, colour and
    layout, which the solver tells well; the objective with the critic makes the details. kappa >= 0 is `coarse`.
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
