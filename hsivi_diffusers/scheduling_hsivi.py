"""The layer of a diffusion UNet, as a diffusers scheduler.

On a grid tau_T > ... > tau_0 of the teacher's clock, with alpha = sqrt(abar) and sigma = sqrt(1 - abar), layer t is

    x0    = (x_{t+1} - sigma_{t+1} eps) / alpha_{t+1},       eps = UNet(x_{t+1}, tau_{t+1})
    c     = noise_eta sqrt((1 - abar_{t+1} / abar_t) sigma_t^2 / sigma_{t+1}^2)        kernel "ddim"
          = sigma_t                                                                    kernel "renoise"
    mean  = alpha_t x0 + sqrt(sigma_t^2 - c^2) eps
    std   = noise_scale_t c
    x_t   = mean + std noise                                 (the last layer, t = 0, returns the mean)

With noise_scale = 1 and kernel "ddim" this is DDIM(eta) (Song et al. 2021, eq. 12); the paper's app. B fits eps and
noise_scale. With kernel "renoise" it is the re-noising of consistency sampling.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

KERNELS = ("ddim", "renoise")
NOISE_SCALE_TYPES = ("config", "per_pixel")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("quadratic", "uniform", "trailing", "leading", "linspace")


@dataclass
class HSIVISchedulerOutput(BaseOutput):
    """Output of `HSIVIScheduler.step`.

    Args:
        prev_sample: x_t, shape (B, C, H, W), of the dtype of the sample given.
        pred_original_sample: The clean picture x0 that the network predicts, of the same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class HSIVIScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of a T-layer hierarchical semi-implicit sampler; one network call per layer.

    Args:
        num_train_timesteps: Length N of the teacher's clock.
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: Any name that `DDPMScheduler` knows.
        trained_betas: Betas themselves, instead of the three above.
        prediction_type: What the network predicts: "epsilon", "v_prediction" or "sample".
        layer_timesteps: The trained grid, T+1 strictly descending integers tau_T .. tau_0 in 0..N-1. The last one may
            be -1: the final alpha of DDIM. When set, only T steps can be asked for.
        timestep_spacing: How grids are made when `layer_timesteps` is None, see `make_layer_timesteps`.
        kernel: "ddim" or "renoise", see above.
        noise_eta: eta of the ddim kernel, in [0, 1]; the paper has 0.2.
        noise_scale: Factor > 0 on the standard deviation, one for all layers or a list of T, noise_scale[t] for layer
            t (so the last of the list is for the first step).
        noise_scale_type: "config": `noise_scale` above. "per_pixel": `step` must be given a tensor.
        clip_sample: Clamp the predicted x0 to +- `clip_sample_range`.
        clip_sample_range: See there.
        set_alpha_to_one: The final alpha (level -1) is 1; otherwise that of timestep 0.
        steps_offset: Added to the timesteps of spacing "leading".

    Raises:
        ValueError: A value is outside what is said above.
    """

    __module__ = "hsivi_diffusers"

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    add_noise = DDPMScheduler.add_noise
    get_velocity = DDPMScheduler.get_velocity

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        layer_timesteps: list[int] | None = None,
        timestep_spacing: str = "quadratic",
        kernel: str = "ddim",
        noise_eta: float = 0.2,
        noise_scale: float | list[float] = 1.0,
        noise_scale_type: str = "config",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
    ):
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        _check_choice("kernel", kernel, KERNELS)
        _check_choice("noise_scale_type", noise_scale_type, NOISE_SCALE_TYPES)
        if not 0 <= noise_eta <= 1:
            raise ValueError(f"noise_eta={noise_eta}: give a number in [0, 1]; 0 is DDIM, 1 is DDPM's noise")
        _check_layer_timesteps(layer_timesteps, num_train_timesteps)
        _check_noise_scale(noise_scale, layer_timesteps)

        schedule = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
        )
        self.betas, self.alphas, self.alphas_cumprod = schedule.betas, schedule.alphas, schedule.alphas_cumprod
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.layer_grid: torch.Tensor | None = None
        self.timesteps = schedule.timesteps
        if layer_timesteps is not None:
            self.set_timesteps()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler from the config of any scheduler with a beta schedule.

        Raises:
            ValueError: The config is of a flow-matching scheduler, which has no alpha and sigma of this kind.
        """
        if isinstance(config, dict):
            name = config.get("_class_name", "this config")
            shifted = "shift" in config and "beta_start" not in config
            if "FlowMatch" in name or config.get("use_flow_sigmas") or shifted:
                raise ValueError(
                    f"{name} is of a flow-matching scheduler: HSIVI needs a teacher with a beta schedule, such as one "
                    "trained with DDPMScheduler"
                )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        """N, the length of the teacher's clock."""
        return int(self.config.num_train_timesteps)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample as it is; other schedulers scale here."""
        return sample

    # ----- the grid -----

    @staticmethod
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
                "leading" and "linspace": those of diffusers (table 2 of arXiv 2305.08891), ending at -1, the final
                alpha. Where rounding would repeat a timestep, neighbours are moved apart; T = N always takes every
                timestep down to -1.
            num_train_timesteps: N.
            start: tau_T of the first two; 0.8 N for quadratic, N-1 for uniform by default.
            steps_offset: Added to the timesteps of "leading".

        Raises:
            ValueError: T or `start` is out of range, or the spacing unknown.
        """
        size = num_train_timesteps
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        if not 1 <= num_layers <= size:
            raise ValueError(f"{num_layers} steps: give a number from 1 to num_train_timesteps={size}")
        if timestep_spacing in ("quadratic", "uniform") and num_layers < size:
            power, default = (2, round(0.8 * size)) if timestep_spacing == "quadratic" else (1, size - 1)
            start = max(default, num_layers) if start is None else start
            if not num_layers <= start < size:
                raise ValueError(f"start={start}: give a timestep from {num_layers} (the steps) to {size - 1}")
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

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Sets the grid: the trained one, or one made for this count.

        Args:
            num_inference_steps: T. With a trained grid only its own T is accepted, and None means T.
            device: Where `timesteps` goes.

        Raises:
            ValueError: The count differs from that of the trained grid, is missing without one, or is out of range.
        """
        grid = self.config.layer_timesteps
        if grid is None:
            if num_inference_steps is None:
                raise ValueError("this scheduler has no trained grid (layer_timesteps): pass num_inference_steps")
            grid = self.make_layer_timesteps(
                num_inference_steps,
                self.config.timestep_spacing,
                self.config.num_train_timesteps,
                steps_offset=self.config.steps_offset,
            )
        elif num_inference_steps not in (None, len(grid) - 1):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but this sampler was trained for {len(grid) - 1} steps, "
                f"layer_timesteps={list(grid)}: pass num_inference_steps={len(grid) - 1}"
            )
        self.layer_grid = torch.tensor(grid, dtype=torch.long)
        self.num_inference_steps = len(grid) - 1
        self.timesteps = self.layer_grid[:-1].to(device)

    def input_timestep(self, t: torch.Tensor) -> torch.Tensor:
        """Returns tau_{t+1}, the timestep of the input of layer t, of the shape of t."""
        return self._grid().to(t.device)[:-1].flip(0)[t]

    def output_timestep(self, t: torch.Tensor) -> torch.Tensor:
        """Returns tau_t, the timestep of the output of layer t, of the shape of t."""
        return self._grid().to(t.device).flip(0)[t]

    def _grid(self) -> torch.Tensor:
        if self.layer_grid is None:
            raise ValueError("the scheduler has no grid yet: call set_timesteps(num_inference_steps) first")
        return self.layer_grid

    def _position(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the place of each timestep in the grid, and the timestep below it, both of shape (B,)."""
        grid = self._grid().to(timestep.device)
        matches = timestep[:, None] == grid[None, :-1]
        position = matches.int().argmax(1)
        below = grid[position + 1]
        on_grid = matches.any(1)
        if not bool(on_grid.all()):
            if self.config.layer_timesteps is not None:
                raise ValueError(
                    f"timestep {timestep[~on_grid].tolist()} is not an input of a layer: this sampler was trained at "
                    f"{grid[:-1].tolist()}"
                )
            stride = self.config.num_train_timesteps // len(grid[:-1])
            below = torch.where(on_grid, below, (timestep - stride).clamp_min(-1))
        return position, below

    # ----- the layer -----

    def alpha_sigma(self, timestep: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns sqrt(abar) and sqrt(1 - abar) of each timestep, shaped (B, 1, ...) to go with the sample.

        Args:
            timestep: Shape (B,) or (1,), -1 for the final alpha.
            sample: Gives the device, dtype and number of dimensions.
        """
        abar = torch.cat([self.alphas_cumprod.to(sample), self.final_alpha_cumprod[None].to(sample)])
        abar = abar[timestep.to(sample.device)]
        abar = abar.reshape(-1, *[1] * (sample.ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def predict(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a network output as the clean picture and the noise, both of the shape of the sample.

        Args:
            model_output: Shape (B, C, H, W), or (B, 2C, H, W) with a learned variance, which is dropped.
            timestep: Where the sample is, a scalar or shape (B,).
            sample: Shape (B, C, H, W).

        Returns:
            (x0, eps) with sample = alpha x0 + sigma eps; x0 is clamped afterwards if `clip_sample`. Half precision
            comes back as float32.

        Raises:
            ValueError: The output does not fit the sample.
        """
        model_output, sample = self._match(model_output, sample)
        alpha, sigma = self.alpha_sigma(self._vector(timestep, sample), sample)
        if self.config.prediction_type == "epsilon":
            x0, eps = (sample - sigma * model_output) / alpha, model_output
        elif self.config.prediction_type == "sample":
            x0, eps = model_output, (sample - alpha * model_output) / sigma
        else:
            x0, eps = alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0, eps

    def transition(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        noise_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and standard deviation of q_t(x_t | x_{t+1}), the formulas at the head of this file.

        Args:
            model_output: Output of the network at the sample, see `predict`.
            timestep: tau_{t+1}, a scalar or shape (B,).
            sample: x_{t+1}, shape (B, C, H, W).
            noise_scale: In the place of the config's; any shape that broadcasts against the sample.

        Returns:
            Mean, of the shape of the sample, and std, which broadcasts against it. At the last layer too, where
            `step` leaves the noise out.

        Raises:
            ValueError: The timestep is no layer's input, the shapes do not fit, or a per-pixel scale is missing.
        """
        mean, std, _, _ = self._layer(model_output, timestep, sample, noise_scale)
        return mean, std

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
        """Draws x_t ~ q_t(. | x_{t+1}); the last layer returns the mean. Keeps no state: any order, any repetition.

        Args:
            model_output: Output of the network at the sample, see `predict`.
            timestep: tau_{t+1}.
            sample: x_{t+1}, shape (B, C, H, W).
            generator: Source of the noise, one or a list of B.
            variance_noise: The noise itself, of the shape of the sample.
            noise_scale: The per-pixel scale, where `noise_scale_type` is "per_pixel".
            return_dict: Return `HSIVISchedulerOutput` rather than a tuple.
            **kwargs: What pipelines pass to other schedulers (`eta`, `use_clipped_model_output`); ignored.

        Raises:
            ValueError: As `transition`.
        """
        mean, std, x0, last = self._layer(model_output, timestep, sample, noise_scale)
        if bool(last.all()):
            x = mean
        else:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=mean.dtype)
            x = torch.where(last, mean, mean + std * noise)
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return HSIVISchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _layer(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        noise_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns mean and std of the layer, x0, and whether each row is in the last layer, shaped (B, 1, ...)."""
        x0, eps = self.predict(model_output, timestep, sample)
        timestep = self._vector(timestep, x0)
        position, below = self._position(timestep)
        alpha_next, sigma_next = self.alpha_sigma(timestep, x0)
        alpha, sigma = self.alpha_sigma(below, x0)
        c = sigma
        if self.config.kernel == "ddim":
            variance = (1 - (alpha_next / alpha).square()) * (sigma / sigma_next).square()
            c = self.config.noise_eta * variance.sqrt()
        mean = alpha * x0 + (sigma.square() - c.square()).clamp_min(0).sqrt() * eps
        last = (below <= self._grid()[-1].to(below.device)).reshape(alpha.shape)
        return mean, self._noise_scale(noise_scale, position, x0) * c, x0, last

    def _match(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drops a learned variance, checks the shapes, and leaves half precision."""
        if model_output.ndim == sample.ndim and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: they must be "
                "equal, or the output must have twice the channels"
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return model_output.to(dtype), sample.to(dtype)

    def _vector(self, timestep: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).long()
        if len(timestep) not in (1, len(sample)):
            raise ValueError(f"{len(timestep)} timesteps for {len(sample)} samples: give one, or one for each")
        return timestep

    def _noise_scale(
        self, noise_scale: torch.Tensor | None, position: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor | float:
        if noise_scale is not None:
            return noise_scale.to(sample)
        if self.config.noise_scale_type == "per_pixel":
            raise ValueError(
                "noise_scale_type is 'per_pixel', but no noise_scale was given: sample with HSIVIPipeline, which holds "
                "it, or pass step(..., noise_scale=tensor)"
            )
        if isinstance(self.config.noise_scale, int | float):
            return float(self.config.noise_scale)
        scales = torch.tensor(self.config.noise_scale).flip(0).to(sample)[position]
        return scales.reshape(-1, *[1] * (sample.ndim - 1))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def _check_layer_timesteps(grid: list[int] | None, num_train_timesteps: int) -> None:
    if grid is None:
        return
    remedy = f"give T+1 strictly descending integers from {num_train_timesteps - 1} to 0; the last may be -1"
    if len(grid) < 2 or any(isinstance(tau, bool) or int(tau) != tau for tau in grid):
        raise ValueError(f"layer_timesteps={grid!r} is no grid of at least 1 layer: {remedy}")
    if any(above <= below for above, below in zip(grid[:-1], grid[1:], strict=True)):
        raise ValueError(f"layer_timesteps={list(grid)} is not strictly descending: {remedy}")
    if grid[0] >= num_train_timesteps or grid[-1] < -1:
        raise ValueError(f"layer_timesteps={list(grid)} leaves the teacher's clock: {remedy}")


def _check_noise_scale(noise_scale: float | list[float], grid: list[int] | None) -> None:
    scales = [noise_scale] if isinstance(noise_scale, int | float) else list(noise_scale)
    if any(not scale > 0 for scale in scales):
        raise ValueError(f"noise_scale={noise_scale!r}: give numbers > 0; for no noise use noise_eta=0")
    if not isinstance(noise_scale, int | float) and (grid is None or len(scales) != len(grid) - 1):
        wanted = "a grid, layer_timesteps" if grid is None else f"{len(grid) - 1} numbers, one for each layer"
        raise ValueError(f"noise_scale has {len(scales)} numbers: it needs {wanted}")
