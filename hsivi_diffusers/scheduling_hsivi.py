"""The layers of a sampler, as a diffusers scheduler.

A noise schedule has levels 0..N-1, with x = alpha x0 + sigma eps for a clean image x0 and noise eps. On a grid of
levels tau_T > ... > tau_0, with alpha_t and sigma_t those of tau_t, layer t is

    x0, eps  from the network output at x_{t+1} and the time of tau_{t+1}, see `predict`
    r     = alpha_{t+1} / alpha_t
    c     = noise_eta sqrt(sigma_{t+1}^2 - r^2 sigma_t^2) sigma_t / sigma_{t+1}        kernel "ddim"
          = sigma_t                                                                    kernel "renoise"
    mean  = alpha_t x0 + sqrt(sigma_t^2 - c^2) eps
    std   = noise_scale_t c
    x_t   = mean + std noise                                 (the last layer, t = 0, returns the mean)

From betas, alpha = sqrt(abar) and sigma = sqrt(1 - abar), and with noise_scale = 1 and kernel "ddim" this is DDIM(eta)
(Song et al. 2021, eq. 12); the paper's app. B fits eps and noise_scale. A rectified flow has alpha = 1 - sigma (Liu et
al. 2023, arXiv 2209.03003), and with noise_eta = 0 this is an Euler step. Kernel "renoise" is the re-noising of
consistency sampling.

A sampler of one step may have a `noise_cutoff`: then x_T is noise without the spatial frequencies above it.

EDM (Karras et al. 2022, arXiv 2206.00364) has samples y = x0 + s eps, of which x = y / sqrt(1 + s^2) here: alpha =
1 / sqrt(1 + s^2), sigma = s alpha. Its network is told log(s) / 4, and it takes z = x / sqrt(sigma^2 + d^2 alpha^2), d
the standard deviation of the data: a sample of x0 / d, of which it predicts v.
"""

import hashlib
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
FLOWS = tuple(f"FlowMatch{kind}Scheduler" for kind in ("EulerDiscrete", "HeunDiscrete", "LCM"))
EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
LEVEL_SETTINGS = (*BETAS, "prediction_type", "shift")
OUR_SPACINGS = ("quadratic", "uniform")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
TIMESTEP_SPACINGS = (*OUR_SPACINGS, "trailing", "leading", "linspace")
STOCK = "stock"  # of a flow without a trained grid: that of FlowMatchEulerDiscreteScheduler
# Settings of schedulers of diffusers that change noise levels or network times; of betas with the value that does not.
UNREAD = {"snr_shift_scale": 1.0, "timestep_type": "discrete"}
SIGMAS = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
UNREAD_OF_FLOWS = (*SIGMAS, "stages", "n_grid")


@dataclass
class HSIVISchedulerOutput(BaseOutput):
    """Output of `HSIVIScheduler.step`: x_t and the predicted clean image x0, in the dtype of the sample."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class LayerCoefficients(NamedTuple):
    """Coefficients of a layer: floats of one layer, or tensors (B, 1, ...) with one layer per row."""

    alpha_next: Any
    sigma_next: Any
    alpha: Any
    direction: Any  # sqrt(sigma_t^2 - c^2)
    c: Any
    noise_scale: Any
    last: Any

    def mean(self, x0: Any, eps: Any) -> Any:
        """Returns the mean of the layer if its input is made of x0 and eps."""
        return self.alpha * x0 + self.direction * eps

    @property
    def image_share(self) -> Any:
        """Derivative of the mean with respect to x0 at a fixed input."""
        return self.alpha - self.direction / self.sigma_next * self.alpha_next

    def noise_in(self, sample: Any, x0: Any) -> Any:
        """Returns the noise eps of the input if its clean image is x0."""
        return (sample - self.alpha_next * x0) / self.sigma_next

    def invert(self, mean: Any, sample: Any) -> tuple[Any, Any]:
        """Returns the (x0, eps) that give this mean at this input."""
        x0 = (mean - self.direction / self.sigma_next * sample) / self.image_share
        return x0, self.noise_in(sample, x0)


class Table:
    """A vector that is copied only once to each accelerator, because a copy waits for the device."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._copies: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "_copies": {}}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the vector on a device, by default in its own dtype."""
        key = device, dtype or self.values.dtype
        if device.type == "cpu":
            return self.values.to(*key)
        if key not in self._copies:
            self._copies[key] = self.values.to(*key)
        return self._copies[key]


class Levels(ABC):
    """The clock of a teacher: levels 0..N-1, and -1, where sigma is 0."""

    accepted: str  # what error messages ask for

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def _alpha_sigma(self, level: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns alpha and sigma, shaped like the levels, on the device and in the dtype of the sample."""

    @abstractmethod
    def time(self, level: torch.Tensor) -> torch.Tensor:
        """Returns the network's times of levels."""

    @abstractmethod
    def level(self, time: torch.Tensor) -> torch.Tensor:
        """Returns the levels of network times; without betas the nearest ones."""

    def position(self, time: torch.Tensor) -> torch.Tensor:
        """Returns how far network times are from the image, in proportion to which guidance decays."""
        return time

    def alpha_sigma(self, level: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns alpha and sigma of levels (B,) or (1,), shaped (B, 1, ...) to broadcast with the sample."""
        alpha, sigma = self._alpha_sigma(level.to(sample.device), sample)
        shape = [-1, *[1] * (sample.ndim - 1)]
        return alpha.reshape(shape), sigma.reshape(shape)

    def read_levels(self, given: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Returns levels as a vector; on the CPU it raises ValueError for levels that do not exist."""
        rows = _rows("level", given, sample)
        level = rows.long()
        if rows.device.type == "cpu":  # a check would wait for an accelerator
            self._check("level", rows, level, level)
        return level

    def read_times(self, given: float | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Returns the levels of network times, likewise."""
        rows = _rows("timestep", given, sample)
        level = self.level(rows)
        if rows.device.type == "cpu":
            self._check("timestep", rows, level, self.time(level.clamp(0, len(self) - 1)))
        return level

    def _check(self, name: str, given: torch.Tensor, level: torch.Tensor, exact: torch.Tensor) -> None:
        """Raises ValueError if a level is out of range or not exact."""
        inside = (level >= 0) & (level < len(self))
        if not bool(inside.all()) or not torch.allclose(exact.double(), given.double(), rtol=1e-6, atol=1e-6):
            raise ValueError(f"{name} {given.tolist()} is off the clock: give {self.accepted}")


class BetaLevels(Levels):
    """Levels from betas: alpha = sqrt(abar), sigma = sqrt(1 - abar); the network's time is the level."""

    def __init__(self, alphas_cumprod: torch.Tensor, final: torch.Tensor) -> None:
        self._abar = Table(torch.cat([alphas_cumprod, final[None]]))
        self.accepted = f"integers from 0 to {len(self) - 1}"

    def __len__(self) -> int:
        return len(self._abar.values) - 1

    def _alpha_sigma(self, level: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = self._abar.on(sample.device, sample.dtype)[level]
        return abar.sqrt(), (1 - abar).sqrt()

    def time(self, level: torch.Tensor) -> torch.Tensor:
        return level

    def level(self, time: torch.Tensor) -> torch.Tensor:
        return time.long()


class TimedLevels(Levels):
    """Levels whose network times are not their numbers.

    Args:
        times: Of levels 0..N-1, ascending, then that of -1, shape (N+1,), float32.
        highest: The highest time that is accepted.
    """

    accepted = "some of scheduler.timesteps"

    def __init__(self, times: torch.Tensor, highest: float) -> None:
        rising = times.roll(1)
        self._times, self._between = Table(times), Table((rising[1:] + rising[:-1]) / 2)
        self._highest = highest

    def __len__(self) -> int:
        return len(self._times.values) - 1

    def time(self, level: torch.Tensor) -> torch.Tensor:
        return self._times.on(level.device)[level]

    def level(self, time: torch.Tensor) -> torch.Tensor:
        nearest: torch.Tensor = torch.searchsorted(self._between.on(time.device), time.float().contiguous())
        return nearest - 1

    def levels_of(self, times: Sequence[float]) -> list[int]:
        """Returns the levels nearest to times.

        Raises:
            ValueError: They are not numbers, or out of range.
        """
        lowest = float(self._times.values[0])
        remedy = f"give numbers from {self._highest:g} down to {lowest:g}"
        if not all(isinstance(time, int | float) for time in times):
            raise ValueError(f"timesteps={times}: {remedy}")
        levels = self.level(torch.tensor(times))
        # Of EDM any low time would be that of the lowest level.
        is_low = [time < lowest for time in times] if math.isinf(self._times.values[-1]) else (levels < 0).tolist()
        if any(is_low) or any(not time <= self._highest for time in times):
            raise ValueError(f"timesteps={times} leave the teacher's clock: {remedy}")
        found: list[int] = levels.tolist()
        return found


class FlowLevels(TimedLevels):
    """Levels of a rectified flow: alpha = 1 - sigma, sigma = shift u / (1 + (shift - 1) u), u = (level + 1) / N.

    The network's time is N sigma, as in FlowMatchEulerDiscreteScheduler of diffusers.

    Args:
        size: N.
        shift: Above 0.
        exact: Some sigma, descending, each of which replaces that of the nearest level, so that a grid of a pipeline is
            followed exactly.
    """

    def __init__(self, size: int, shift: float, exact: torch.Tensor | None = None) -> None:
        sigma = shifted(torch.arange(1, size + 1, dtype=torch.float64) / size, shift)
        if exact is not None:
            sigma[torch.searchsorted((sigma[1:] + sigma[:-1]) / 2, exact)] = exact
        sigma = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
        super().__init__((size * sigma).float(), size)
        self._sigma = Table(sigma)

    def _alpha_sigma(self, level: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = self._sigma.on(sample.device, sample.dtype)[level]
        return 1 - sigma, sigma


class EDMLevels(TimedLevels):
    """Levels of EDM: s = sigma / alpha rises from `sigma_min` to `sigma_max`; the network's time is log(s) / 4.

    The network was trained for all s between, and laws of its samplers crowd levels where there is little noise. Here
    log(1 + (s / sigma_data)^2) is linear in the square of the level, nearly as it is with linear betas.

    Args:
        size: N.
        sigma_data: Standard deviation of the data.
        sigma_min: s of level 0, above 0.
        sigma_max: s of level N-1.
    """

    def __init__(self, size: int, sigma_data: float, sigma_min: float, sigma_max: float) -> None:
        low, high = (math.log1p((s / sigma_data) ** 2) for s in (sigma_min, sigma_max))
        u = torch.linspace(0, 1, size, dtype=torch.float64)
        s = sigma_data * torch.expm1(low + (high - low) * u.square()).sqrt()
        s = torch.cat([s, torch.zeros(1, dtype=torch.float64)])
        times = (s.log() / 4).float()
        super().__init__(times, float(times[-2]))
        self._ratio = Table(s)

    def _alpha_sigma(self, level: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = self._ratio.on(sample.device, sample.dtype)[level]
        alpha = (1 + ratio.square()).rsqrt()
        return alpha, ratio * alpha

    def position(self, time: torch.Tensor) -> torch.Tensor:
        """The levels: times of low noise are negative."""
        return self.level(time)


def shifted(u: Any, shift: float) -> Any:
    """Returns shift u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


class Layers:
    """The layers of a grid, by the formulas at the head of this file.

    Args:
        levels: The teacher's clock.
        grid: tau_T .. tau_0.
        settings: The config of a `HSIVIScheduler`. With a trained grid, only its levels are accepted.
    """

    def __init__(self, levels: Levels, grid: list[int], settings: Mapping[str, Any]) -> None:
        self.levels, self.settings = levels, settings
        self.grid, self._end = torch.tensor(grid), grid[-1]
        self._inputs, self._below = Table(self.grid[:-1]), Table(self.grid[1:])
        # Layers of all trained grids, else of the grid that is set: grid after grid, each from the data side.
        rising = [torch.tensor(each).flip(0) for each in _grids(settings["layer_timesteps"])] or [self.grid.flip(0)]
        self.inputs = Table(torch.cat([each[1:] for each in rising]))
        self.outputs = Table(torch.cat([each[:-1] for each in rising]))
        scales: Any = settings["noise_scale"]  # by position in the grid
        self._noise_scales = Table(torch.tensor(scales, dtype=torch.float64).reshape(-1).flip(0))
        columns = self.coefficients(self.grid[:-1], self.grid[:-1, None].float())
        rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
        # Coefficients of each layer of the grid, as floats, by the time of its input.
        self.by_time = {time: LayerCoefficients(*row) for time, row in zip(self.times, rows, strict=True)}

    def are_of(self, levels: Levels, grid: list[int], settings: Mapping[str, Any]) -> bool:
        """Whether they were made from these; diffusers replaces the config object when a setting changes."""
        return self.levels is levels and self.settings is settings and self.grid.tolist() == grid

    @property
    def times(self) -> list[float]:
        """The network's times at the inputs of the layers."""
        times: list[float] = self.levels.time(self.grid[:-1]).tolist()
        return times

    def at(self, timestep: int | float | torch.Tensor, sample: torch.Tensor) -> LayerCoefficients:
        """Returns the coefficients of the layers that start at these times; a number on the grid is looked up."""
        number: Any = timestep
        if isinstance(timestep, torch.Tensor):
            number = timestep.item() if timestep.numel() == 1 and timestep.device.type == "cpu" else None
        if sample.dtype == torch.float32 and (known := self.by_time.get(number)) is not None:
            return known
        return self.coefficients(self.levels.read_times(timestep, sample), sample)

    def coefficients(
        self, level: torch.Tensor, sample: torch.Tensor, prev_level: torch.Tensor | None = None
    ) -> LayerCoefficients:
        """Returns the coefficients of the layers at levels (B,), as tensors (B, 1, ...); see `transition`."""
        position, below = (None, prev_level) if prev_level is not None else self._find(level)
        alpha_next, sigma_next = self.levels.alpha_sigma(level, sample)
        alpha, sigma = self.levels.alpha_sigma(below, sample)
        c = sigma
        if self.settings["kernel"] == "ddim":
            variance = sigma_next.square() - (alpha_next / alpha * sigma).square()
            c = self.settings["noise_eta"] * variance.clamp_min(0).sqrt() * sigma / sigma_next
        direction = (sigma.square() - c.square()).clamp_min(0).sqrt()
        noise_scale = self._noise_scales.on(alpha.device, alpha.dtype)
        if len(noise_scale) > 1:
            position = self._find(level)[0] if position is None else position
            noise_scale = noise_scale[position.to(alpha.device)].reshape(alpha_next.shape)
        last = (below <= self._end).to(alpha.device).reshape(alpha.shape)
        return LayerCoefficients(alpha_next, sigma_next, alpha, direction, c, noise_scale.expand(alpha.shape), last)

    def _find(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the position of each level in the grid and the next lower level, both of shape (B,)."""
        matches = level[:, None] == self._inputs.on(level.device)[None]
        position, on_grid = matches.int().argmax(1), matches.any(1)
        trained = _grids(self.settings["layer_timesteps"])
        if trained and level.device.type == "cpu" and not bool(on_grid.all()):
            raise ValueError(self._refusal(self.levels.time(level[~on_grid]).tolist(), trained))
        stride = self.settings["num_train_timesteps"] // len(self._inputs.values)
        below = torch.where(on_grid, self._below.on(level.device)[position], (level - stride).clamp_min(-1))
        return position, below

    def _refusal(self, times: list[float], trained: list[list[int]]) -> str:
        which, remedy = "this sampler", f"give one of these {len(self.times)}"
        if len(trained) > 1:
            which = f"the grid that is set, of {len(self.times)} steps,"
            remedy = f"there are grids of {_counts(trained)} steps, call set_timesteps(T) with the T you mean first"
        return f"timestep {times} is not an input of a layer: {which} was trained at {self.times}: {remedy}"


def make_layer_timesteps(
    num_layers: int,
    timestep_spacing: str = "quadratic",
    num_train_timesteps: int = 1000,
    start: int | None = None,
    steps_offset: int = 0,
) -> list[int]:
    """Makes a grid tau_T .. tau_0 of T+1 descending integers.

    Args:
        num_layers: T, 1..N.
        timestep_spacing: "quadratic": (i/T)^2 start, as in the paper. "uniform": (i/T) start. "trailing",
            "leading" and "linspace": as in diffusers (table 2 of arXiv 2305.08891), ending at -1, the final
            alpha. Equal timesteps are moved apart; T = N always takes every timestep down to -1.
        num_train_timesteps: N.
        start: tau_T for "quadratic" (default 0.8 N) and "uniform" (default N-1).
        steps_offset: Added to the timesteps of "leading".

    Raises:
        ValueError: T or `start` is out of range, or the spacing unknown.
    """
    size = num_train_timesteps
    _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
    if not _is_whole(num_layers) or not 1 <= num_layers <= size:
        raise ValueError(f"{num_layers!r} steps: give a whole number from 1 to num_train_timesteps={size}")
    num_layers = int(num_layers)
    if timestep_spacing in OUR_SPACINGS and num_layers < size:
        power, default = (2, round(0.8 * size)) if timestep_spacing == "quadratic" else (1, size - 1)
        start = max(default, num_layers) if start is None else start
        if not _is_whole(start) or not num_layers <= start < size:
            raise ValueError(f"start={start!r}: give a timestep from {num_layers} (the steps) to {size - 1}")
        return [max(round((i / num_layers) ** power * start), i) for i in range(num_layers, -1, -1)]
    if start is not None:
        raise ValueError(f"start={start} goes with timestep_spacing 'quadratic' or 'uniform' only")
    if timestep_spacing == "trailing":
        timesteps = [round(i * size / num_layers) - 1 for i in range(num_layers, 0, -1)]
    elif timestep_spacing == "leading":
        timesteps = [i * (size // num_layers) + steps_offset for i in range(num_layers - 1, -1, -1)]
    else:
        timesteps = [round(i * (size - 1) / max(num_layers - 1, 1)) for i in range(num_layers - 1, -1, -1)]
    return [min(timestep, size - 1 - place) for place, timestep in enumerate(timesteps)] + [-1]


class HSIVIScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of a hierarchical semi-implicit sampler of T layers, with one network call per layer.

    Args:
        num_train_timesteps: Number N of levels of the teacher.
        beta_start: First beta, in [0, 1].
        beta_end: Last beta, in [0, 1].
        beta_schedule: Any name that `DDPMScheduler` accepts.
        trained_betas: The betas, in [0, 1], instead of the three above.
        prediction_type: What the network predicts: "epsilon", "v_prediction", "sample", or "flow_prediction", which is
            noise - x0 of a rectified flow and needs no betas. Of EDM: "v_prediction", or "epsilon", which is -v there.
        layer_timesteps: The trained grid: T+1 strictly descending levels tau_T .. tau_0 in 0..N-1; the last one may
            be -1, where sigma is 0. Only T steps are accepted then. Or a list of such grids with different T.
        timestep_spacing: How grids are made when `layer_timesteps` is None, see `make_layer_timesteps`. That of a
            rectified flow is "stock" by default: the grid of FlowMatchEulerDiscreteScheduler of diffusers.
        kernel: "ddim" or "renoise", see the formulas above.
        noise_eta: eta of the ddim kernel, in [0, 1]; 0.2 in the paper.
        noise_scale: Factor > 0 on the standard deviation: one for all layers, or with a single grid a list of T, where
            noise_scale[t] is for layer t (the last one for the first step).
        noise_scale_type: "config": `noise_scale` above. "per_pixel": a tensor must be passed to `step`.
        clip_sample: Clamp the predicted x0 to [-clip_sample_range, clip_sample_range].
        clip_sample_range: Bound of the clamp, > 0.
        thresholding: Clamp x0 to a quantile of its absolute values and divide by it, instead of `clip_sample` (Imagen).
        dynamic_thresholding_ratio: That quantile, in [0, 1].
        sample_max_value: Upper bound of the threshold, > 0.
        set_alpha_to_one: Whether alpha at level -1 is 1; otherwise it is that of timestep 0.
        steps_offset: Added to the timesteps of spacing "leading", 0..N-1.
        rescale_betas_zero_snr: Rescale the betas so that abar is 0 at the last timestep (alg. 1 of arXiv 2305.08891);
            not with "epsilon".
        shift: For rectified flows, > 0: above 1, more levels have high noise, see `FlowLevels`.
        use_dynamic_shifting: For rectified flows: take the shift from `set_timesteps(mu=...)`, which pipelines compute
            from the image size; `shift` holds until then.
        time_shift_type: The shift is exp(mu) ("exponential") or mu ("linear").
        shift_terminal: For rectified flows, in (0, 1): grids that are not trained are stretched to have this sigma at
            the input of the last layer, as in diffusers.
        resolution: Height and width of the images it was trained on, where they are not those of the pipeline; for the
            reader, and for programs that draw.
        max_sequence_length: Tokens that its prompts were cut to, where they are not those of the pipeline; likewise.
        guidance_scale: Scale of classifier-free guidance distilled into the network (1: none), or several scales, of
            which each call picks one; the last class label is then "no class". None: distilled without guidance.
        edm: For EDM, instead of betas, settings of EDMEulerScheduler of diffusers, with its defaults: `sigma_data`, the
            standard deviation d of the data; `sigma_min` and `sigma_max`, s of the first and the last level, see
            `EDMLevels`.
        noise_cutoff: Of a sampler of one step: it takes noise without spatial frequencies above this many cycles per
            image height and width, see `low_pass`. None leaves nothing out.

    Raises:
        ValueError: A value is out of range.
    """

    # Saved pipelines refer to the class by this module, also when this file is saved beside the weights.
    __module__ = "hsivi_diffusers"

    _source = Path(__file__).read_text(encoding="utf-8")
    _compatibles = [
        *(scheduler.name for scheduler in KarrasDiffusionSchedulers),
        *FLOWS,
        "EDMDPMSolverMultistepScheduler",
    ]
    order = 1

    get_velocity = DDPMScheduler.get_velocity
    _threshold_sample = DDPMScheduler._threshold_sample
    make_layer_timesteps = staticmethod(make_layer_timesteps)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        layer_timesteps: list[int] | list[list[int]] | None = None,
        timestep_spacing: str = "quadratic",
        kernel: str = "ddim",
        noise_eta: float = 0.2,
        noise_scale: float | list[float] = 1.0,
        noise_scale_type: str = "config",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        resolution: list[int] | None = None,
        max_sequence_length: int | None = None,
        guidance_scale: float | list[float] | None = None,
        edm: dict[str, Any] | None = None,
        noise_cutoff: float | None = None,
    ):
        if edm is not None:
            if not isinstance(edm, Mapping):
                raise ValueError(f"edm={edm!r}: give a dict of {', '.join(EDM)}, or of some of them")
            self.register_to_config(edm={**EDM, **edm})
        _check_settings(self.config)
        if layer_timesteps is not None:
            layer_timesteps = _check_grids(layer_timesteps, num_train_timesteps)
            # A trained grid needs no spacing, and some diffusers classes accept only their own.
            spacing = "leading" if timestep_spacing in (*OUR_SPACINGS, STOCK) else timestep_spacing
            self.register_to_config(layer_timesteps=layer_timesteps, timestep_spacing=spacing)
        elif self.is_flow and "timestep_spacing" in self.config.get("_use_default_values", ()):
            self.register_to_config(timestep_spacing=STOCK)
        noise_scale, guidance_scale = _check_noise_scale(noise_scale, layer_timesteps), _check_guidance(guidance_scale)
        self.register_to_config(noise_scale=noise_scale, guidance_scale=guidance_scale)
        self.levels = self._make_levels(shift)
        self.init_noise_sigma = 1.0
        self._warned = False
        if noise_cutoff is not None and [len(grid) for grid in self.trained_grids] != [2]:
            raise ValueError(f"noise_cutoff={noise_cutoff} is of a trained grid of one step: set it to None")
        self.num_inference_steps: int | None = None
        self.timesteps = self.levels.time(torch.arange(len(self.levels)).flip(0))
        self._layers: Layers | None = None
        for depth in self.depths if layer_timesteps is not None else []:  # checks each; the largest stays
            self.set_timesteps(depth)

    def _make_levels(self, shift: float) -> BetaLevels | FlowLevels | EDMLevels:
        self._shift = shift
        if self.is_flow:
            return FlowLevels(len(self), shift)
        if self.is_edm:
            return EDMLevels(len(self), **self.config.edm)
        schedule = _make_schedule({name: self.config[name] for name in BETAS})
        self.betas, self.alphas, self.alphas_cumprod = schedule.betas, schedule.alphas, schedule.alphas_cumprod
        self.final_alpha_cumprod = torch.tensor(1.0) if self.config.set_alpha_to_one else self.alphas_cumprod[0]
        return BetaLevels(self.alphas_cumprod, self.final_alpha_cumprod)

    def register_to_config(self, **kwargs: Any) -> None:
        """Adds to the config. In that of a trained sampler no setting is marked as a default.

        Settings so marked would give way to the defaults of another class in its `from_config`.
        """
        settings = {**getattr(self, "_internal_dict", {}), **kwargs}
        if settings.get("layer_timesteps") is not None and "_use_default_values" in settings:
            kwargs["_use_default_values"] = []
        super().register_to_config(**kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler from the config of any scheduler that has betas, or is of a rectified flow or of EDM.

        Raises:
            ValueError: The noise levels are of another kind.
        """
        if isinstance(config, dict):
            kwargs = _read_settings(config, kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config, and this source file so that the folder loads without the package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "hsivi_diffusers.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __len__(self) -> int:
        """N, the number of the teacher's levels."""
        return int(self.config.num_train_timesteps)

    @property
    def is_flow(self) -> bool:
        """Whether the noise levels are those of a rectified flow."""
        return bool(self.config.prediction_type == "flow_prediction")

    @property
    def is_edm(self) -> bool:
        """Whether the noise levels, and what the network takes and returns, are those of EDM."""
        return self.config.edm is not None

    @property
    def sigma_data(self) -> float | None:
        """Of EDM: the standard deviation of the data."""
        edm = self.config.edm
        return None if edm is None else edm["sigma_data"]

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Returns what the network takes: the sample itself, of EDM scaled.

        If the student's weights hold guidance, it warns once of a pipeline that guides a second time, which gives every
        sample twice. Pipelines of rectified flows do not call this.

        Args:
            sample: Shape (B, C, H, W).
            timestep: The network's time, a scalar or shape (B,).
        """
        if self.guidance_scales and not self._warned and _is_doubled(sample):
            self._warned = True
            logger.warning(
                f"this student has guidance of scale {' or '.join(map(str, self.guidance_scales))} in its weights, and "
                "is given every sample twice, as by a pipeline that guides again: if it does, pass guidance_scale=1"
            )
        if self.sigma_data is None:
            return sample
        if timestep is None:
            raise ValueError(
                "timestep is missing: the input of EDM is scaled by its noise level, give the network's time"
            )
        whole = sample.to(torch.promote_types(sample.dtype, torch.float32))
        alpha, sigma = self.alpha_sigma(self.levels.read_times(timestep, sample), whole)
        return (whole * _input_scale(self.sigma_data, alpha, sigma)).to(sample.dtype)

    def low_pass(self, noise: torch.Tensor) -> torch.Tensor:
        """Returns noise x_T as the sampler takes it: without frequencies above `noise_cutoff`; as given without one.

        Of the Fourier coefficient of u cycles per height and v per width nothing is left if u^2 + v^2 is above the
        square of the cutoff, and all of it otherwise. One step turns the fine noise that it is given into grain.

        Args:
            noise: Shape (B, C, H, W).
        """
        cutoff = self.config.noise_cutoff
        return noise if cutoff is None else _low_pass(noise, cutoff)

    # ----- the grid -----

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | list[float] | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Sets the grid: a trained one, one made for this number of steps, or a given one.

        Args:
            num_inference_steps: T. With trained grids it must be one of theirs; None means the largest.
            device: Device of `self.timesteps`.
            timesteps: Instead of T, the network's times at tau_T .. tau_1; the last layer ends at -1. With trained
                grids they must be those of one.
            sigmas: For rectified flows: u of tau_T .. tau_1 before the shift, from 1 down to above 0. With trained
                grids only their number counts.
            mu: See `use_dynamic_shifting`; a trained grid keeps the shift it was trained with.

        Raises:
            ValueError: Not exactly one of the three is given, or it does not fit.
        """
        levels = self.levels
        if self.is_flow and not self.trained_grids:
            shift = self._shift_of(mu)
            sigma = self._stock_sigmas(num_inference_steps, shift, sigmas) if timesteps is None else None
            levels = FlowLevels(len(self), shift, sigma)
            if sigma is not None:
                num_inference_steps, timesteps, sigmas = None, (len(self) * sigma).tolist(), None
        grid = _choose_grid(self.config, levels, num_inference_steps, timesteps, sigmas)
        if grid[0] >= len(self.levels):
            raise ValueError(f"the grid {grid} starts beyond the {len(self.levels)} betas: give trained_betas for all")
        if isinstance(levels, BetaLevels) and self.alphas_cumprod[grid[-2]] == 1:
            raise ValueError(
                f"abar is 1 at {grid[-2]}, where a layer would have no noise to remove: raise the first beta"
            )
        predicts_noise = self.config.prediction_type == "epsilon"
        if isinstance(levels, BetaLevels) and predicts_noise and self.alphas_cumprod[grid[0]] == 0:
            raise ValueError(f"abar is 0 at {grid[0]}, where a noise prediction does not determine x0: start lower")
        self.levels = levels
        if self._layers is None or not self._layers.are_of(levels, grid, self.config):
            self._layers = Layers(levels, grid, self.config)
        self.num_inference_steps = len(grid) - 1
        self.timesteps = self.levels.time(self._layers.grid[:-1]).to(device)

    def _shift_of(self, mu: float | None) -> float:
        """The shift of a flow without a trained grid; where mu is to give it and is missing, that of before."""
        if self.config.use_dynamic_shifting and mu is not None:
            shift = math.exp(min(mu, 700)) if self.config.time_shift_type == "exponential" else mu
            _check_number("the shift that follows from mu", shift, sys.float_info.min)
            self._shift = shift
        return self._shift

    def _stock_sigmas(self, num_inference_steps: int | None, shift: float, sigmas: Any) -> torch.Tensor | None:
        """The sigmas of FlowMatchEulerDiscreteScheduler, after the shift; None for another spacing."""
        size = len(self)
        if sigmas is None:
            if num_inference_steps is None or self.config.timestep_spacing != STOCK:
                return None
            make_layer_timesteps(num_inference_steps, "linspace", size)  # checks the number
            last = 1 / size if self.config.use_dynamic_shifting else shifted(1 / size, shift)
            u = torch.linspace(1, last, num_inference_steps, dtype=torch.float64)
        else:
            sigmas = _listed(sigmas)
            if num_inference_steps not in (None, len(sigmas)):
                raise ValueError(f"num_inference_steps={num_inference_steps}, and {len(sigmas)} sigmas: pass one")
            u = torch.tensor([float(each) for each in sigmas], dtype=torch.float64)
            if not len(u) or not bool(((u > 0) & (u <= 1)).all() & (u.diff() < 0).all()):
                raise ValueError(f"sigmas={u.tolist()}: give descending numbers, from 1 down to above 0")
        sigma = shifted(u, shift).clamp_max(1)  # which rounding may exceed
        if self.config.shift_terminal is not None and sigma[-1] < 1:
            sigma = 1 - (1 - sigma) * (1 - self.config.shift_terminal) / (1 - sigma[-1])
        if len(FlowLevels(size, shift).level(size * sigma).unique()) < len(sigma):
            raise ValueError(f"{len(sigma)} steps are too many: two of their sigmas have the same level of {size}")
        return sigma

    @property
    def sigmas(self) -> torch.Tensor:
        """Of a rectified flow: sigma of the inputs of the layers of the grid that is set, then of its end, (T+1,).

        Raises:
            AttributeError: It is no flow, or no grid is set yet.
        """
        if not self.is_flow or self._layers is None:
            raise AttributeError("sigmas are of a rectified flow, after set_timesteps")
        return self.alpha_sigma(self.layers.grid, torch.zeros(1))[1].flatten()

    @property
    def unshifted_sigmas(self) -> list[float]:
        """The `sigmas` of the grid that is set, as flow pipelines take them, before the shift; T numbers."""
        sigma = self.sigmas[:-1].double()
        return [float(u) for u in sigma / (self._shift - (self._shift - 1) * sigma)]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Checks that a pipeline can start at this layer; `step` finds its layer by the timestep.

        Raises:
            ValueError: There is no such layer, for example in image-to-image with a low strength.
        """
        if self.num_inference_steps is not None and begin_index >= self.num_inference_steps:
            raise ValueError(
                f"begin_index={begin_index}, but there are {self.num_inference_steps} layers, so no layer is left to "
                f"run: with an image-to-image pipeline raise `strength` to 1/{self.num_inference_steps} or more"
            )

    @property
    def trained_grids(self) -> list[list[int]]:
        """The grids of `layer_timesteps`, by increasing T; empty without a trained grid."""
        return _grids(self.config.layer_timesteps)

    @property
    def guidance_scales(self) -> list[float]:
        """The guidance scales distilled into the network, ascending; empty without guidance."""
        scales = self.config.guidance_scale
        return [] if scales is None else list(scales) if isinstance(scales, list | tuple) else [scales]

    def guidance_index(self, scale: float | None) -> int:
        """Returns the index of a scale in `guidance_scales`; 0 for None, and for 1 without guidance.

        Raises:
            ValueError: The network was not trained with this scale.
        """
        scales = self.guidance_scales
        if scale is None or scale in (scales or [1]):
            return scales.index(scale) if scale in scales else 0
        taken = f"guidance of scale {' or '.join(map(str, scales))}: give one of these"
        taken = taken if scales else "no guidance: leave it out, or give 1"
        raise ValueError(f"guidance_scale={scale}: this sampler was trained with {taken}")

    @property
    def depths(self) -> list[int]:
        """T of each trained grid, or of the grid that is set."""
        return [len(grid) - 1 for grid in self.trained_grids] or [len(self.layers.grid) - 1]

    def input_level(self, t: torch.Tensor) -> torch.Tensor:
        """Returns tau_{t+1}, the levels of the inputs of layers t, in the shape of t.

        With several grids, t counts the layers of all of them, one grid after the other in the order of `depths`.
        """
        return self.layers.inputs.on(t.device)[t]

    def output_level(self, t: torch.Tensor) -> torch.Tensor:
        """Returns tau_t, see `input_level`."""
        return self.layers.outputs.on(t.device)[t]

    @property
    def layers(self) -> Layers:
        """The layers of the grid that is set.

        Raises:
            ValueError: No grid is set yet.
        """
        if self._layers is None:
            raise ValueError("the scheduler has no grid yet: call set_timesteps(num_inference_steps) first")
        return self._layers

    # ----- the layer -----

    def alpha_sigma(self, level: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns alpha and sigma of levels (B,) or (1,), shaped (B, 1, ...) to broadcast with the sample.

        At level -1 sigma is 0. The sample gives the device, the dtype and the number of dimensions.
        """
        return self.levels.alpha_sigma(level, sample)

    def diffuse(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Returns alpha x0 + sigma noise, in the shape and dtype of x0; levels as in `alpha_sigma`."""
        alpha, sigma = self.alpha_sigma(level, x0)
        noisy: torch.Tensor = alpha * x0 + sigma * noise
        return noisy

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Does the same as `diffuse`, for the network's times."""
        return self.diffuse(original_samples, noise, self.levels.level(timesteps))

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Does the same as `add_noise`, with the name and argument order of the flow-matching schedulers.

        Raises:
            ValueError: The noise is missing.
        """
        if noise is None:
            raise ValueError("noise is missing: give noise of the shape of the sample")
        return self.add_noise(sample, noise, timestep.reshape(-1))

    def predict(
        self, model_output: torch.Tensor, level: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Converts a network output to (x0, eps) with sample = alpha x0 + sigma eps, in float32 or float64.

        Afterwards x0 is clamped as `clip_sample` or `thresholding` say.

        Args:
            model_output: Shape (B, C, H, W), or (B, 2C, H, W) with a learned variance, which is dropped.
            level: Level of the sample, a scalar or shape (B,).
            sample: Shape (B, C, H, W).

        Raises:
            ValueError: The output does not fit the sample.
        """
        model_output, sample = _match(model_output, sample)
        return self._predict(model_output, sample, *self.alpha_sigma(self.levels.read_levels(level, sample), sample))

    def clip(self, x0: torch.Tensor) -> torch.Tensor:
        """Returns a clean image as `clip_sample` or `thresholding` leaves it."""
        if self.config.thresholding:
            return self._threshold_sample(x0)
        if self.config.clip_sample:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def _predict(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: Any, sigma: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x0, eps = _split(self.config.prediction_type, model_output, sample, alpha, sigma, self.sigma_data)
        return self.clip(x0), eps

    def transition(
        self,
        model_output: torch.Tensor,
        level: int | torch.Tensor,
        sample: torch.Tensor,
        noise_scale: torch.Tensor | None = None,
        prev_level: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean and standard deviation of q_t(x_t | x_{t+1}) by the formulas at the top of this file.

        The std broadcasts with the sample. The last layer has one too, though `step` adds no noise there.

        Args:
            model_output: Network output at the sample, see `predict`.
            level: tau_{t+1}, a scalar or shape (B,).
            sample: x_{t+1}, shape (B, C, H, W).
            noise_scale: Replaces that of the config; any shape that broadcasts with the sample.
            prev_level: tau_t, shape (B,); by default the next level of the grid that is set.

        Raises:
            ValueError: No layer starts at the level, shapes do not fit, or a per-pixel noise scale is missing.
        """
        model_output, sample = _match(model_output, sample)
        layer = self.layers.coefficients(self.levels.read_levels(level, sample), sample, prev_level)
        mean, std, _ = self._transition(model_output, sample, layer, noise_scale)
        return mean, std if isinstance(std, torch.Tensor) else mean.new_full([1] * mean.ndim, std)

    def _transition(
        self, model_output: torch.Tensor, sample: torch.Tensor, layer: LayerCoefficients, noise_scale: Any
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Returns the mean and std of the layer, and x0."""
        x0, eps = self._predict(model_output, sample, layer.alpha_next, layer.sigma_next)
        mean = layer.mean(x0, eps)
        if noise_scale is not None:
            sizes = zip(reversed(noise_scale.shape), reversed(sample.shape), strict=False)
            if noise_scale.ndim > sample.ndim or any(size not in (1, wanted) for size, wanted in sizes):
                raise ValueError(
                    f"noise_scale has shape {tuple(noise_scale.shape)}: give one that broadcasts to the sample, "
                    f"{tuple(sample.shape)}"
                )
            return mean, noise_scale.to(sample) * layer.c, x0
        if self.config.noise_scale_type == "per_pixel":
            raise ValueError(
                "noise_scale_type is 'per_pixel', but no noise_scale was given: sample with HSIVIPipeline, which holds "
                "it, or pass step(..., noise_scale=tensor)"
            )
        return mean, layer.noise_scale * layer.c, x0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        noise_scale: torch.Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> HSIVISchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draws x_t ~ q_t(. | x_{t+1}); the last layer returns the mean. No state is kept between calls.

        Args:
            model_output: Network output at the sample, see `transition`.
            timestep: The network's time at tau_{t+1}, one of `timesteps`, a scalar or shape (B,).
            sample: x_{t+1}.
            generator: Source of the noise: one, or a list of B. Pipelines of rectified flows pass none: the noise of a
                row then follows from the bits of its sample, so the same call on the same machine draws the same image.
            variance_noise: The noise itself, in the shape of the sample.
            noise_scale: The per-pixel scale, required if `noise_scale_type` is "per_pixel".
            return_dict: Return `HSIVISchedulerOutput` rather than a tuple.
            **kwargs: Arguments of other schedulers that pipelines pass, such as `eta`; ignored.

        Raises:
            ValueError: As `transition`; or generator and variance_noise are both given, or the sample has frequencies
                above the `noise_cutoff`.
        """
        dtype = sample.dtype
        model_output, sample = _match(model_output, sample)
        if (cutoff := self.config.noise_cutoff) is not None:
            _check_low(sample, cutoff)
        layer = self.layers.at(timestep, sample)
        mean, std, x0 = self._transition(model_output, sample, layer, noise_scale)
        if generator is not None and variance_noise is not None:
            raise ValueError("generator and variance_noise were both given: pass the source of the noise, or the noise")
        if layer.last is True:
            x = mean
        else:
            if variance_noise is None and generator is None and self.is_flow:
                variance_noise = _noise_of(sample)
            elif variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=mean.dtype)
            elif variance_noise.shape != sample.shape:
                raise ValueError(
                    f"variance_noise has shape {tuple(variance_noise.shape)}: give that of the sample, "
                    f"{tuple(sample.shape)}"
                )
            x = mean + std * variance_noise.to(mean.dtype)
            if layer.last is not False:
                x = torch.where(layer.last, mean, x)
        x, x0 = x.to(dtype), x0.to(dtype)
        return HSIVISchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


def _match(model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops a learned variance, checks shapes and dtypes, and casts half precision to float32."""
    if model_output.ndim == sample.ndim and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output.chunk(2, dim=1)[0]
    if model_output.shape != sample.shape:
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: they must be "
            "equal, or the output must have twice the channels"
        )
    if model_output.dtype == sample.dtype == torch.float32:
        return model_output, sample
    if not sample.is_floating_point() or not model_output.is_floating_point():
        raise ValueError(
            f"model_output is {model_output.dtype} and the sample {sample.dtype}: give floating-point tensors, "
            "such as sample.float()"
        )
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return model_output.to(dtype), sample.to(dtype)


def _rows(name: str, values: Any, sample: torch.Tensor) -> torch.Tensor:
    """Returns one number, or one per row of the sample, as a vector."""
    if isinstance(values, str):
        raise ValueError(f"{name}={values!r}: give a number or a tensor, such as one of scheduler.timesteps")
    values = torch.as_tensor(values).reshape(-1)
    if len(values) not in (1, len(sample)):
        raise ValueError(f"{len(values)} {name}s for {len(sample)} samples: give one, or one for each")
    return values


def _noise_of(sample: torch.Tensor) -> torch.Tensor:
    """Returns standard noise, of which each row is seeded by the bytes of that row of the sample."""
    rows = []
    for row in sample.detach().cpu():
        seed = hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=7).digest()
        rows.append(
            torch.randn(row.shape, generator=torch.Generator().manual_seed(int.from_bytes(seed)), dtype=row.dtype)
        )
    return torch.stack(rows).to(sample.device)


def _low_pass(x: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Returns x without the spatial frequencies above a number of cycles per image, in its dtype."""
    height, width = x.shape[-2:]
    rows = (height * torch.fft.fftfreq(height, device=x.device)).round()[:, None]
    columns = (width * torch.fft.rfftfreq(width, device=x.device)).round()
    coefficients = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)))
    kept = rows.square() + columns.square() <= cutoff**2
    return torch.fft.irfft2(coefficients * kept, s=(height, width)).to(x.dtype)


def _check_low(sample: torch.Tensor, cutoff: float) -> None:
    """Raises ValueError if more than a hundredth of a sample's variance is above a frequency."""
    if bool((sample - _low_pass(sample, cutoff)).square().mean() > 0.01 * sample.square().mean()):
        raise ValueError(
            f"the sample has noise above {cutoff:g} cycles per image, which this student was trained without: draw "
            "with HSIVIPipeline, or start from scheduler.low_pass(noise)"
        )


def _is_doubled(sample: torch.Tensor) -> bool:
    """Whether the second half of a batch is the first once more."""
    half, odd = divmod(len(sample), 2)
    return half > 0 and not odd and torch.equal(sample[:half], sample[half:])


def _input_scale(sigma_data: float, alpha: Any, sigma: Any) -> Any:
    """Returns the scale at which samples of data with this standard deviation have variance 1."""
    return (sigma**2 + (sigma_data * alpha) ** 2) ** -0.5


def _split(
    prediction_type: str,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    alpha: Any,
    sigma: Any,
    sigma_data: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts a prediction to (x0, eps) with sample = alpha x0 + sigma eps."""
    if sigma_data is not None:  # the scaled sample is one of x0 / sigma_data
        scale = _input_scale(sigma_data, alpha, sigma)
        v = -model_output if prediction_type == "epsilon" else model_output
        x0, eps = _split("v_prediction", v, scale * sample, scale * sigma_data * alpha, scale * sigma)
        return sigma_data * x0, eps
    if prediction_type == "epsilon":
        return (sample - sigma * model_output) / alpha, model_output
    if prediction_type == "sample":
        return model_output, (sample - alpha * model_output) / sigma
    if prediction_type == "flow_prediction":
        return sample - sigma * model_output, sample + alpha * model_output
    return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample


def _grids(layer_timesteps: Any) -> list[list[int]]:
    """Returns the grids of the setting, by increasing T; empty without a trained grid."""
    grids = layer_timesteps or []
    return [list(grids)] if grids and isinstance(grids[0], int) else sorted(map(list, grids), key=len)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def _check_number(
    name: str, value: Any, low: float, high: float = sys.float_info.max, kind: type = Real, remedy: str = ""
) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # type: ignore[operator]
        whole = "a whole number" if kind is Integral else "a number"
        bounds = f"from {low} to {high}" if high < sys.float_info.max else "> 0" if low < 1 else f"of at least {low}"
        raise ValueError(f"{name}={value!r}: give {whole} {bounds}{remedy}")


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a single setting is out of range."""
    choices = {
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": (*TIMESTEP_SPACINGS, STOCK),
        "kernel": ("ddim", "renoise"),
    }
    choices |= {"noise_scale_type": ("config", "per_pixel"), "time_shift_type": ("exponential", "linear")}
    for name, accepted in choices.items():
        _check_choice(name, settings[name], accepted)
    size = settings["num_train_timesteps"]
    _check_number("num_train_timesteps", size, 1, kind=Integral)
    _check_number("steps_offset", settings["steps_offset"], 0, size - 1, kind=Integral)
    _check_number("noise_eta", settings["noise_eta"], 0, 1, remedy="; 0 is DDIM, 1 is the noise of DDPM")
    _check_number("dynamic_thresholding_ratio", settings["dynamic_thresholding_ratio"], 0, 1)
    for name in ("clip_sample_range", "sample_max_value", "shift"):
        _check_number(name, settings[name], sys.float_info.min)
    if settings["timestep_spacing"] == STOCK and settings["prediction_type"] != "flow_prediction":
        raise ValueError(f"timestep_spacing={STOCK!r} is of a rectified flow: choose another")
    if settings["shift_terminal"] is not None:
        _check_number("shift_terminal", settings["shift_terminal"], 1e-6, 1 - 1e-6)
    size, known = settings["resolution"], settings["resolution"] is not None
    if known and (len(_listed(size)) != 2 or not all(isinstance(side, int) and side > 0 for side in _listed(size))):
        raise ValueError(f"resolution={size!r}: give height and width in pixels")
    if settings["max_sequence_length"] is not None:
        _check_number("max_sequence_length", settings["max_sequence_length"], 1, kind=Integral)
    if settings["noise_cutoff"] is not None:
        _check_number("noise_cutoff", settings["noise_cutoff"], sys.float_info.min)
    if (edm := settings["edm"]) is not None:
        for name in edm:
            _check_choice("key of edm", name, tuple(EDM))
            _check_number(name, edm[name], sys.float_info.min)
        if edm["sigma_max"] <= edm["sigma_min"]:
            raise ValueError(f"sigma_max={edm['sigma_max']!r}: give a number above sigma_min={edm['sigma_min']!r}")
        _check_choice("with edm, prediction_type", settings["prediction_type"], ("epsilon", "v_prediction"))
    if settings["rescale_betas_zero_snr"] and settings["prediction_type"] == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr goes with prediction_type 'v_prediction' or 'sample': at abar = 0 the sample "
            "is pure noise, and a prediction of it does not determine x0"
        )


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str) and float(value).is_integer()
    except (TypeError, ValueError):
        return False


def _listed(values: Any) -> list[Any]:
    """Returns the values as a list; a single number becomes a list of one, which the checks of grids refuse."""
    try:
        return list(values)
    except TypeError:
        return [values]


def _make_schedule(options: dict[str, Any]) -> DDPMScheduler:
    """Returns a diffusers scheduler with these betas."""
    remedy = "give betas from 0 to 1, such as beta_start=0.0001, beta_end=0.02, or a list of them as trained_betas"
    try:
        schedule = DDPMScheduler(**options)
        low, high = schedule.betas.aminmax()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"no betas follow from these settings ({str(error).splitlines()[0]}): {remedy}") from error
    if not 0 <= low <= high <= 1 or schedule.betas.ndim != 1:
        raise ValueError(f"betas from {float(low):g} to {float(high):g}, shape {tuple(schedule.betas.shape)}: {remedy}")
    if schedule.alphas_cumprod[-1] == 1:
        raise ValueError(f"betas of at most {float(high):g} add no noise: {remedy}")
    return schedule


def _read_settings(config: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns kwargs with the noise levels of a config added, or raises ValueError if they are of an unknown kind.

    They are also read where the config marks them as defaults, because other classes have other defaults.
    """
    name = config.get("_class_name") or "this scheduler"
    given = {**config, **kwargs}
    betas = "beta_start" in given or given.get("trained_betas") is not None
    whole = not {"_class_name", "_use_default_values", "num_train_timesteps"}.isdisjoint(config)
    flow, kind = config.get("use_flow_sigmas"), config.get("prediction_type")
    if None not in (flow, kind) and flow != (kind == "flow_prediction"):
        raise ValueError(
            f"the config of {name} has use_flow_sigmas={flow} and prediction_type={kind!r}: a rectified flow "
            "has True and 'flow_prediction', and any other model neither"
        )
    is_flow = flow or ("shift" in config and not betas and (not whole or "num_train_timesteps" in config))
    # CMStochasticIterativeScheduler has no prediction type, CosineDPMSolverMultistepScheduler no thresholding.
    is_edm = {*EDM, "prediction_type"} <= {*config} and not betas
    is_edm &= "thresholding" in config or "solver_order" not in config
    if whole and not is_flow and not betas and not is_edm:
        raise ValueError(
            f"the config of {name} has no betas, and is neither of a rectified flow nor of EDM; other noise levels are "
            "not supported: use a model whose scheduler is like DDPMScheduler, FlowMatchEulerDiscreteScheduler or "
            "EDMEulerScheduler"
        )
    unread: Mapping[str, Any] = dict.fromkeys(UNREAD_OF_FLOWS) if is_flow else UNREAD
    if odd := [f"{key}={config[key]!r}" for key in unread if config.get(key) not in (None, False, unread[key])]:
        raise ValueError(
            f"the config of {name} has {', '.join(odd)}: noise levels with this setting are not supported, "
            "use a model whose scheduler leaves it out"
        )
    levels = {key: config[key] for key in LEVEL_SETTINGS if key in config}
    if is_edm:
        levels["edm"] = {key: config[key] for key in EDM}
    if is_flow:
        shift = config.get("flow_shift", config.get("shift"))
        levels |= {"prediction_type": "flow_prediction", "shift": 1.0 if shift is None else shift}
    return {**levels, **kwargs}


def _check_timesteps(name: str, timesteps: Any, num_train_timesteps: int) -> list[int]:
    """Returns a valid grid as plain integers."""
    grid = _listed(timesteps)
    remedy = f"give T+1 strictly descending integers from {num_train_timesteps - 1} to 0; the last may be -1"
    if len(grid) < 2 or not all(map(_is_whole, grid)):
        raise ValueError(f"{name}={grid!r} is no grid of at least 1 layer: {remedy}")
    if any(above <= below for above, below in zip(grid[:-1], grid[1:], strict=True)):
        raise ValueError(f"{name}={grid} is not strictly descending: {remedy}")
    if grid[0] >= num_train_timesteps or grid[-1] < -1:
        raise ValueError(f"{name}={grid} leaves the teacher's clock: {remedy}")
    return [int(tau) for tau in grid]


def _check_grids(grids: Any, num_train_timesteps: int) -> list[int] | list[list[int]]:
    """Returns one valid grid, or several with different T, as plain integers."""
    grids = _listed(grids)
    if not grids or not hasattr(grids[0], "__len__") or isinstance(grids[0], str) or getattr(grids[0], "ndim", 1) == 0:
        return _check_timesteps("layer_timesteps", grids, num_train_timesteps)
    checked = [_check_timesteps(f"layer_timesteps[{i}]", grid, num_train_timesteps) for i, grid in enumerate(grids)]
    counts = [len(grid) - 1 for grid in checked]
    if len(set(counts)) < len(counts):
        raise ValueError(f"layer_timesteps holds grids of {counts} steps: give each number of steps one grid")
    return checked if len(checked) > 1 else checked[0]


def _choose_grid(
    settings: Mapping[str, Any],
    levels: Levels,
    num_inference_steps: int | None,
    timesteps: list[int] | list[float] | None,
    sigmas: list[float] | None,
) -> list[int]:
    """Returns the grid that the arguments of `set_timesteps` ask for."""
    size, spacing = settings["num_train_timesteps"], settings["timestep_spacing"]
    is_flow, trained = isinstance(levels, FlowLevels), _grids(settings["layer_timesteps"])
    if sigmas is not None:
        if not is_flow:
            raise ValueError("sigmas are of a rectified flow, and this scheduler is of none: pass timesteps")
        if timesteps is not None:
            raise ValueError("sigmas and timesteps were both given: pass one of them")
        if num_inference_steps not in (None, len(sigmas)):
            raise ValueError(f"num_inference_steps={num_inference_steps}, and {len(sigmas)} sigmas: pass one")
        return _choose_trained(trained, len(sigmas), None)
    if num_inference_steps is not None and timesteps is not None:
        raise ValueError("num_inference_steps and timesteps were both given: pass one of them")
    given = timesteps
    if timesteps is not None and isinstance(levels, TimedLevels):
        timesteps = levels.levels_of(_listed(timesteps))
    if trained:
        return _choose_trained(trained, num_inference_steps, timesteps, given)
    if timesteps is not None:
        return _check_timesteps("timesteps + [-1]", [*_listed(timesteps), -1], size)
    if num_inference_steps is None:
        raise ValueError("this scheduler has no trained grid (layer_timesteps): pass num_inference_steps")
    # A rectified flow is pure noise only at its last level; with betas, lower levels are nearly so.
    start = size - 1 if is_flow and spacing in OUR_SPACINGS and num_inference_steps < size else None
    return make_layer_timesteps(num_inference_steps, spacing, size, start, settings["steps_offset"])


def _counts(trained: list[list[int]]) -> str:
    *most, last = (str(len(grid) - 1) for grid in trained)
    return f"{', '.join(most)} or {last}" if most else last


def _choose_trained(
    trained: list[list[int]],
    num_inference_steps: int | None,
    timesteps: list[int] | list[float] | None,
    given: list[int] | list[float] | None = None,
) -> list[int]:
    """Returns the trained grid that was asked for, by default the one with most steps; messages name what was given."""
    for grid in reversed(trained):
        if num_inference_steps in (None, len(grid) - 1) and (timesteps is None or _listed(timesteps) == grid[:-1]):
            return grid
    counts = _counts(trained)
    asked = f"num_inference_steps={num_inference_steps!r}" if given is None else f"timesteps={given}"
    raise ValueError(
        f"{asked}, but this sampler was trained for {counts} steps, layer_timesteps="
        f"{trained[0] if len(trained) == 1 else trained}: pass num_inference_steps={counts}"
    )


def _check_guidance(scales: Any) -> float | list[float] | None:
    """Returns plain numbers for JSON, ascending."""
    given = [] if scales is None else _listed(scales)
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < math.inf for w in given)
    if not numbers or len(set(given)) < len(given) or scales == []:
        raise ValueError(f"guidance_scale={scales!r}: give a number of at least 0, 1 for none, or several that differ")
    ordered = sorted(map(float, given))
    return None if scales is None else ordered if len(ordered) > 1 else ordered[0]


def _check_noise_scale(noise_scale: Any, grid: Any) -> float | list[float]:
    """Returns plain numbers for JSON; a list must go with one grid of as many layers."""
    try:
        scale = torch.as_tensor(noise_scale, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        scale = torch.tensor(math.nan)
    if scale.ndim > 1 or not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"noise_scale={noise_scale!r}: give a number > 0 or a list; for no noise use noise_eta=0")
    numbers: float | list[float] = scale.tolist()
    if not isinstance(numbers, list):
        return numbers
    count = len(numbers)
    if grid is not None and isinstance(grid[0], list):
        raise ValueError(f"noise_scale has {count} numbers, for {len(grid)} grids: give one number for all layers")
    if grid is None or count != len(grid) - 1:
        wanted = "a grid, layer_timesteps" if grid is None else f"{len(grid) - 1} numbers, one for each layer"
        raise ValueError(f"noise_scale has {count} numbers: it needs {wanted}")
    return numbers
