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

import math
import os
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

OUR_SPACINGS = ("quadratic", "uniform")
TIMESTEP_SPACINGS = (*OUR_SPACINGS, "trailing", "leading", "linspace")


@dataclass
class HSIVISchedulerOutput(BaseOutput):
    """Output of `HSIVIScheduler.step`: x_t, and the predicted clean image x0, both like the sample that was given."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class LayerCoefficients(NamedTuple):
    """The numbers of a layer's formula: floats of one layer, or tensors (B, 1, ...) of one layer for each row."""

    alpha_next: Any
    sigma_next: Any
    alpha: Any
    direction: Any  # sqrt(sigma_t^2 - c^2)
    c: Any
    noise_scale: Any
    last: Any

    def mean(self, x0: Any, eps: Any) -> Any:
        """Returns the mean of the layer, of the clean image x0 and the noise eps in its input."""
        return self.alpha * x0 + self.direction * eps

    @property
    def image_share(self) -> Any:
        """The derivative of the mean with respect to x0, at a given input: alpha_t - direction alpha / sigma there."""
        return self.alpha - self.direction / self.sigma_next * self.alpha_next

    def noise_in(self, sample: Any, x0: Any) -> Any:
        """Returns the noise eps in the input of the layer when its clean image is x0."""
        return (sample - self.alpha_next * x0) / self.sigma_next

    def invert(self, mean: Any, sample: Any) -> tuple[Any, Any]:
        """Returns the (x0, eps) that the mean was made of, with sample = alpha x0 + sigma eps in the input."""
        x0 = (mean - self.direction / self.sigma_next * sample) / self.image_share
        return x0, self.noise_in(sample, x0)


class HSIVIScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of a T-layer hierarchical semi-implicit sampler; one network call per layer.

    Args:
        num_train_timesteps: Length N of the teacher's clock.
        beta_start: First beta, in [0, 1].
        beta_end: Last beta, in [0, 1].
        beta_schedule: Any name that `DDPMScheduler` knows.
        trained_betas: The betas, in [0, 1], instead of the three above.
        prediction_type: What the network predicts: "epsilon", "v_prediction" or "sample".
        layer_timesteps: The trained grid, T+1 strictly descending integers tau_T .. tau_0 in 0..N-1; the last one may
            be -1, the final alpha of DDIM. Only T steps are accepted then. Or a list of such grids of different T.
        timestep_spacing: How grids are made when `layer_timesteps` is None, see `make_layer_timesteps`.
        kernel: "ddim" or "renoise", see above.
        noise_eta: eta of the ddim kernel, in [0, 1]; the paper has 0.2.
        noise_scale: Factor > 0 on the standard deviation, one for all layers or, of one grid, a list of T,
            noise_scale[t] for layer t (so the last of the list is for the first step).
        noise_scale_type: "config": `noise_scale` above. "per_pixel": `step` must be given a tensor.
        clip_sample: Clamp the predicted x0 to +- `clip_sample_range`.
        clip_sample_range: Bound of the clamp, > 0.
        thresholding: Clamp x0 to a quantile of its absolute values and divide by it, instead of `clip_sample` (Imagen).
        dynamic_thresholding_ratio: That quantile, in [0, 1].
        sample_max_value: Upper bound of the threshold, > 0.
        set_alpha_to_one: The final alpha (level -1) is 1; otherwise that of timestep 0.
        steps_offset: Added to the timesteps of spacing "leading", 0..N-1.
        rescale_betas_zero_snr: abar is 0 at the last timestep (alg. 1 of arXiv 2305.08891); not with "epsilon".

    Raises:
        ValueError: A value is outside the ranges above.
    """

    # Saved pipelines name the class by its module, also where this file is saved beside the weights.
    __module__ = "hsivi_diffusers"

    _source = Path(__file__).read_text(encoding="utf-8")
    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    get_velocity = DDPMScheduler.get_velocity
    _threshold_sample = DDPMScheduler._threshold_sample

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
    ):
        _check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        _check_choice("kernel", kernel, ("ddim", "renoise"))
        _check_choice("noise_scale_type", noise_scale_type, ("config", "per_pixel"))
        _check_number("num_train_timesteps", num_train_timesteps, 1, kind=Integral)
        _check_number("steps_offset", steps_offset, 0, num_train_timesteps - 1, kind=Integral)
        _check_number("noise_eta", noise_eta, 0, 1, remedy="; 0 is DDIM, 1 is the noise of DDPM")
        _check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1)
        _check_number("clip_sample_range", clip_sample_range, sys.float_info.min)
        _check_number("sample_max_value", sample_max_value, sys.float_info.min)
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr goes with prediction_type 'v_prediction' or 'sample': at abar = 0 the sample "
                "is pure noise, and a prediction of it does not determine x0"
            )
        if layer_timesteps is not None:
            layer_timesteps = _check_grids(layer_timesteps, num_train_timesteps)
            # A trained grid needs no spacing, and some classes accept only their own.
            spacing = "leading" if timestep_spacing in OUR_SPACINGS else timestep_spacing
            self.register_to_config(layer_timesteps=layer_timesteps, timestep_spacing=spacing)
        self.register_to_config(noise_scale=_check_noise_scale(noise_scale, layer_timesteps))

        given = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        schedule = _make_schedule({name: self.config[name] for name in (*given, "rescale_betas_zero_snr")})
        self.betas, self.alphas, self.alphas_cumprod = schedule.betas, schedule.alphas, schedule.alphas_cumprod
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.layer_grid: torch.Tensor | None = None
        self.timesteps = schedule.timesteps
        self._layers: dict[int, LayerCoefficients] = {}
        self._layers_are_of: tuple[Any, ...] = ()
        for depth in self.depths if layer_timesteps is not None else []:  # checks each; the largest stays
            self.set_timesteps(depth)

    def register_to_config(self, **kwargs: Any) -> None:
        """Adds to the config. A trained sampler keeps all of it: no setting gives way to another class's default."""
        if kwargs.get("layer_timesteps") is not None:
            kwargs.pop("_use_default_values", None)
        super().register_to_config(**kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler from the config of any scheduler with a beta schedule.

        Raises:
            ValueError: The config is of flow matching, or of the noise levels of EDM.
        """
        if isinstance(config, dict):
            name = config.get("_class_name")
            betas = {"beta_start", "trained_betas"} & {*config, *kwargs}
            whole = name is not None or "num_train_timesteps" in config
            if "FlowMatch" in str(name) or config.get("use_flow_sigmas") or (whole and not betas):
                raise ValueError(
                    f"the config of {name or 'this scheduler'} has no beta schedule: flow-matching and EDM models are "
                    "not supported yet; use a teacher trained with betas, such as those of DDPMScheduler"
                )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config and this file beside it, so that the folder also loads without the package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "hsivi_diffusers.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

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
                alpha. Repeated timesteps are moved apart; T = N always takes every timestep down to -1.
            num_train_timesteps: N.
            start: tau_T of the first two; 0.8 N for quadratic, N-1 for uniform by default.
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

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Sets the grid: the trained one, one made for this count, or the one given.

        Args:
            num_inference_steps: T. With trained grids only a T of theirs is accepted, and None means the largest.
            device: Where `timesteps` goes.
            timesteps: Inputs tau_T .. tau_1 of the layers, instead of T; the last layer ends at -1. Or trained ones.

        Raises:
            ValueError: Both or neither are given, or they are not as above.
        """
        grid = self._choose_grid(num_inference_steps, timesteps)
        if grid[0] >= len(self.betas):
            raise ValueError(f"the grid {grid} starts beyond the {len(self.betas)} betas: give trained_betas for all")
        if self.config.prediction_type == "epsilon" and self.alphas_cumprod[grid[0]] == 0:
            raise ValueError(f"abar is 0 at {grid[0]}, where a noise prediction does not determine x0: start lower")
        settings = (grid, self.config.kernel, self.config.noise_eta, self.config.noise_scale)
        if settings != self._layers_are_of:
            self.layer_grid = torch.tensor(grid, dtype=torch.long)
            self._layers, self._layers_are_of = self._make_layers(), settings
        self.num_inference_steps = len(grid) - 1
        self.timesteps = self._grid()[:-1].to(device)

    def _choose_grid(self, num_inference_steps: int | None, timesteps: list[int] | None) -> list[int]:
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("num_inference_steps and timesteps were both given: pass one of them")
        if trained := self.trained_grids:
            return _choose_trained(trained, num_inference_steps, timesteps)
        if timesteps is not None:
            return _check_timesteps("timesteps + [-1]", [*_listed(timesteps), -1], self.config.num_train_timesteps)
        if num_inference_steps is None:
            raise ValueError("this scheduler has no trained grid (layer_timesteps): pass num_inference_steps")
        spacing, size = self.config.timestep_spacing, self.config.num_train_timesteps
        return self.make_layer_timesteps(num_inference_steps, spacing, size, steps_offset=self.config.steps_offset)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Checks the layer that a pipeline starts at; `step` finds its layer by the timestep.

        Raises:
            ValueError: The sampler has no such layer, as when an image-to-image pipeline is given a low strength.
        """
        if self.num_inference_steps is not None and begin_index >= self.num_inference_steps:
            raise ValueError(
                f"begin_index={begin_index}, but there are {self.num_inference_steps} layers, so no layer is left to "
                f"run: with an image-to-image pipeline raise `strength` to 1/{self.num_inference_steps} or more"
            )

    @property
    def trained_grids(self) -> list[list[int]]:
        """The grids of `layer_timesteps`, by rising T; empty if nothing was trained."""
        grids = self.config.layer_timesteps or []
        return [list(grids)] if grids and isinstance(grids[0], int) else sorted(map(list, grids), key=len)

    @property
    def depths(self) -> list[int]:
        """T of each trained grid, or of the one that is set: the layers of all are counted one grid after the other."""
        return [len(grid) - 1 for grid in self.trained_grids] or [len(self._grid()) - 1]

    def input_timestep(self, t: torch.Tensor) -> torch.Tensor:
        """Returns tau_{t+1}, the timestep of the input of layers t, of the shape of t; `depths` tells how t counts."""
        return self._layers_of_all_grids[0].to(t.device)[t]

    def output_timestep(self, t: torch.Tensor) -> torch.Tensor:
        """Returns tau_t, see `input_timestep`."""
        return self._layers_of_all_grids[1].to(t.device)[t]

    @property
    def _layers_of_all_grids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps of input and output of each layer, counted from the data side, one grid after the other."""
        rising = [torch.tensor(grid).flip(0) for grid in self.trained_grids] or [self._grid().flip(0)]
        return torch.cat([grid[1:] for grid in rising]), torch.cat([grid[:-1] for grid in rising])

    def _grid(self) -> torch.Tensor:
        if self.layer_grid is None:
            raise ValueError("the scheduler has no grid yet: call set_timesteps(num_inference_steps) first")
        return self.layer_grid

    def _below(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the place of each timestep in the grid, and the timestep below it, both of shape (B,)."""
        grid = self._grid().to(timestep.device)
        matches = timestep[:, None] == grid[None, :-1]
        position = matches.int().argmax(1)
        below = grid[position + 1]
        on_grid = matches.any(1)
        if not bool(on_grid.all()):
            if self.config.layer_timesteps is not None:
                self._refuse(timestep[~on_grid].tolist())
            stride = self.config.num_train_timesteps // len(grid[:-1])
            below = torch.where(on_grid, below, (timestep - stride).clamp_min(-1))
        return position, below

    def _refuse(self, timesteps: list[int]) -> NoReturn:
        trained, inputs = self.trained_grids, self._grid()[:-1].tolist()
        which, remedy = "this sampler", f"give one of these {len(inputs)}"
        if len(trained) > 1:
            which = f"the grid that is set, of {len(inputs)} steps,"
            remedy = f"there are grids of {_counts(trained)} steps, call set_timesteps(T) with the T you mean first"
        raise ValueError(f"timestep {timesteps} is not an input of a layer: {which} was trained at {inputs}: {remedy}")

    # ----- the layer -----

    def alpha_sigma(self, timestep: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns sqrt(abar) and sqrt(1 - abar) of timesteps (B,) or (1,), shaped (B, 1, ...) to go with the sample.

        Timestep -1 is the final alpha. The sample gives the device, dtype and number of dimensions.
        """
        abar = torch.cat([self.alphas_cumprod.to(sample), self.final_alpha_cumprod[None].to(sample)])
        abar = abar[timestep.to(sample.device)]
        abar = abar.reshape(-1, *[1] * (sample.ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns alpha x0 + sigma noise, of the shape and dtype of x0; timesteps as in `alpha_sigma`."""
        alpha, sigma = self.alpha_sigma(timesteps, original_samples)
        noisy: torch.Tensor = alpha * original_samples + sigma * noise
        return noisy

    def predict(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Converts a network output to (x0, eps) with sample = alpha x0 + sigma eps, float32 at least.

        x0, the clean image, is clamped afterwards if `clip_sample`.

        Args:
            model_output: Shape (B, C, H, W), or (B, 2C, H, W) with a learned variance, which is dropped.
            timestep: Where the sample is, a scalar or shape (B,).
            sample: Shape (B, C, H, W).

        Raises:
            ValueError: The output does not fit the sample.
        """
        model_output, sample = self._match(model_output, sample)
        return self._predict(model_output, sample, *self.alpha_sigma(self._vector(timestep, sample), sample))

    def _predict(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: Any, sigma: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.prediction_type == "epsilon":
            x0, eps = (sample - sigma * model_output) / alpha, model_output
        elif self.config.prediction_type == "sample":
            x0, eps = model_output, (sample - alpha * model_output) / sigma
        else:
            x0, eps = alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0, eps

    def transition(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        noise_scale: torch.Tensor | None = None,
        prev_timestep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and standard deviation of q_t(x_t | x_{t+1}), the formulas at the head of this file.

        The std broadcasts against the sample; it is returned at the last layer, too, whose noise `step` leaves out.

        Args:
            model_output: Output of the network at the sample, see `predict`.
            timestep: tau_{t+1}, a scalar or shape (B,).
            sample: x_{t+1}, shape (B, C, H, W).
            noise_scale: Instead of that of the config; any shape that broadcasts against the sample.
            prev_timestep: tau_t, shape (B,), where it does not follow from the grid that is set, as with several.

        Raises:
            ValueError: The timestep is no layer's input, the shapes do not fit, or a per-pixel scale is missing.
        """
        mean, std, _, _ = self._transition(model_output, timestep, sample, noise_scale, prev_timestep)
        return mean, std if isinstance(std, torch.Tensor) else mean.new_full([1] * mean.ndim, std)

    def _transition(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        noise_scale: torch.Tensor | None,
        prev_timestep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any, torch.Tensor, Any]:
        """Returns mean and std of the layer, x0, and whether it is the last layer, of each row or of all."""
        model_output, sample = self._match(model_output, sample)
        layer = self._layer(timestep, sample, prev_timestep)
        x0, eps = self._predict(model_output, sample, layer.alpha_next, layer.sigma_next)
        mean = layer.mean(x0, eps)
        if noise_scale is not None:
            sizes = zip(reversed(noise_scale.shape), reversed(sample.shape), strict=False)
            if noise_scale.ndim > sample.ndim or any(size not in (1, wanted) for size, wanted in sizes):
                raise ValueError(
                    f"noise_scale has shape {tuple(noise_scale.shape)}: give one that broadcasts to the sample, "
                    f"{tuple(sample.shape)}"
                )
            return mean, noise_scale.to(sample) * layer.c, x0, layer.last
        if self.config.noise_scale_type == "per_pixel":
            raise ValueError(
                "noise_scale_type is 'per_pixel', but no noise_scale was given: sample with HSIVIPipeline, which holds "
                "it, or pass step(..., noise_scale=tensor)"
            )
        return mean, layer.noise_scale * layer.c, x0, layer.last

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
            model_output: See `transition`, as the next two.
            timestep: tau_{t+1}.
            sample: x_{t+1}.
            generator: Source of the noise, one or a list of B.
            variance_noise: The noise itself, of the shape of the sample.
            noise_scale: The per-pixel scale, where `noise_scale_type` is "per_pixel".
            return_dict: Return `HSIVISchedulerOutput` rather than a tuple.
            **kwargs: What pipelines pass to other schedulers, such as `eta`; ignored.

        Raises:
            ValueError: As `transition`; or generator and variance_noise are both given.
        """
        mean, std, x0, last = self._transition(model_output, timestep, sample, noise_scale)
        if generator is not None and variance_noise is not None:
            raise ValueError("generator and variance_noise were both given: pass the source of the noise, or the noise")
        if last is True:
            x = mean
        else:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=mean.dtype)
            elif variance_noise.shape != sample.shape:
                raise ValueError(
                    f"variance_noise has shape {tuple(variance_noise.shape)}: give that of the sample, "
                    f"{tuple(sample.shape)}"
                )
            x = mean + std * variance_noise.to(mean.dtype)
            if last is not False:
                x = torch.where(last, mean, x)
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return HSIVISchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    # ----- the numbers of the layers -----

    def _layer(
        self, timestep: int | torch.Tensor, sample: torch.Tensor, prev_timestep: torch.Tensor | None = None
    ) -> LayerCoefficients:
        """Returns the numbers of the layers that start at the timestep; of one on the grid they are looked up, fast."""
        single = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1
        if single and prev_timestep is None and sample.dtype == torch.float32:
            number: Any = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
            if (known := self._layers.get(number)) is not None:
                return known
        return self.coefficients(self._vector(timestep, sample), sample, prev_timestep)

    def _make_layers(self) -> dict[int, LayerCoefficients]:
        """The numbers of each layer of the grid, by the timestep of its input."""
        inputs = self._grid()[:-1]
        columns = self.coefficients(inputs, inputs[:, None].float())
        rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
        return {timestep: LayerCoefficients(*row) for timestep, row in zip(inputs.tolist(), rows, strict=True)}

    def coefficients(
        self, timestep: torch.Tensor, sample: torch.Tensor, prev_timestep: torch.Tensor | None = None
    ) -> LayerCoefficients:
        """Returns the numbers of layers tau_{t+1} (B,), as tensors (B, 1, ...); see `transition` for the arguments."""
        position, below = (None, prev_timestep) if prev_timestep is not None else self._below(timestep)
        alpha_next, sigma_next = self.alpha_sigma(timestep, sample)
        alpha, sigma = self.alpha_sigma(below, sample)
        c = sigma
        if self.config.kernel == "ddim":
            variance = (1 - (alpha_next / alpha).square()) * (sigma / sigma_next).square()
            c = self.config.noise_eta * variance.sqrt()
        direction = (sigma.square() - c.square()).clamp_min(0).sqrt()
        last = (below <= self._grid()[-1].to(below.device)).reshape(alpha.shape)
        noise_scale = torch.as_tensor(self.config.noise_scale).to(alpha)
        if noise_scale.ndim:  # of the only grid, counted from the data side, the positions from the base
            position = self._below(timestep)[0] if position is None else position
            noise_scale = noise_scale.flip(0)[position].reshape(alpha_next.shape)
        return LayerCoefficients(alpha_next, sigma_next, alpha, direction, c, noise_scale.expand(alpha.shape), last)

    def _match(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drops a learned variance, checks the shapes, and leaves half precision."""
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

    def _vector(self, timestep: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if isinstance(timestep, str):
            raise ValueError(f"timestep={timestep!r}: give a number or a tensor, such as one of scheduler.timesteps")
        timestep = torch.as_tensor(timestep).reshape(-1)
        if len(timestep) not in (1, len(sample)):
            raise ValueError(f"{len(timestep)} timesteps for {len(sample)} samples: give one, or one for each")
        size = len(self.alphas_cumprod)
        # Only on the CPU: on a GPU the check would wait for the device.
        on_clock = (timestep >= 0) & (timestep < size) & (timestep % 1 == 0)
        if timestep.device.type == "cpu" and not bool(on_clock.all()):
            raise ValueError(f"timestep {timestep.tolist()} is off the clock: give integers from 0 to {size - 1}")
        return timestep.to(sample.device, torch.long)


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


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str) and float(value).is_integer()
    except (TypeError, ValueError):
        return False


def _listed(values: Any) -> list[Any]:
    """Returns the values as a list; a single number as a list of one, which a check of a grid then refuses."""
    try:
        return list(values)
    except TypeError:
        return [values]


def _make_schedule(options: dict[str, Any]) -> DDPMScheduler:
    """Returns the scheduler of diffusers that has these betas."""
    remedy = "give betas from 0 to 1, such as beta_start=0.0001, beta_end=0.02, or a list of them as trained_betas"
    try:
        schedule = DDPMScheduler(**options)
        low, high = schedule.betas.aminmax()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"no betas follow from these settings ({str(error).splitlines()[0]}): {remedy}") from error
    if not 0 <= low <= high <= 1 or schedule.betas.ndim != 1:
        raise ValueError(f"betas from {float(low):g} to {float(high):g}, shape {tuple(schedule.betas.shape)}: {remedy}")
    return schedule


def _check_timesteps(name: str, timesteps: Any, num_train_timesteps: int) -> list[int]:
    """Returns the grid as plain integers."""
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
    """Returns one grid, or several of different T, as plain integers."""
    grids = _listed(grids)
    if not grids or not hasattr(grids[0], "__len__") or isinstance(grids[0], str) or getattr(grids[0], "ndim", 1) == 0:
        return _check_timesteps("layer_timesteps", grids, num_train_timesteps)
    checked = [_check_timesteps(f"layer_timesteps[{i}]", grid, num_train_timesteps) for i, grid in enumerate(grids)]
    counts = [len(grid) - 1 for grid in checked]
    if len(set(counts)) < len(counts):
        raise ValueError(f"layer_timesteps holds grids of {counts} steps: give each number of steps one grid")
    return checked if len(checked) > 1 else checked[0]


def _counts(trained: list[list[int]]) -> str:
    *most, last = (str(len(grid) - 1) for grid in trained)
    return f"{', '.join(most)} or {last}" if most else last


def _choose_trained(
    trained: list[list[int]], num_inference_steps: int | None, timesteps: list[int] | None
) -> list[int]:
    """Returns the trained grid that was asked for; the longest, if nothing was."""
    for grid in reversed(trained):
        if num_inference_steps in (None, len(grid) - 1) and (timesteps is None or _listed(timesteps) == grid[:-1]):
            return grid
    counts = _counts(trained)
    asked = f"num_inference_steps={num_inference_steps!r}" if timesteps is None else f"timesteps={timesteps}"
    raise ValueError(
        f"{asked}, but this sampler was trained for {counts} steps, layer_timesteps="
        f"{trained[0] if len(trained) == 1 else trained}: pass num_inference_steps={counts}"
    )


def _check_noise_scale(noise_scale: Any, grid: Any) -> float | list[float]:
    """Returns plain numbers, for JSON; several go with one grid of as many layers."""
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
