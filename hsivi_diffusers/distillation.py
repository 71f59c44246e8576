"""Diffusion UNets as the three players of the core: the teacher's bridge, the student's layers, the critic.

Only adapters: the losses are in `vi.objectives`, the layer's formula in `HSIVIScheduler.transition`. UNets speak of
noise, the core of scores: score = -eps / sigma. Real data is optional: with it the bridge can be drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel, UniPCMultistepScheduler
from torch import Tensor, nn

from .modeling_hsivi import HSIVINoiseScale
from .scheduling_hsivi import HSIVIScheduler
from .vi.bridges import Bridge
from .vi.distributions import DiagonalGaussian, randn_like
from .vi.layers import ConditionalLayers, hierarchy_ends
from .vi.objectives import Weight

LevelLaw = Literal["layer", "uniform"]
# Of a scheduler's config, what a teacher was trained with.
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    "rescale_betas_zero_snr",
)
SampleData = Callable[[int, Tensor | None, torch.Generator | None], Tensor]


class LayerNoiseScale(nn.Module):
    """A learned noise scale of the layers, exp(log_scale): one number, or one for each layer.

    Its values belong into `noise_scale` of the scheduler's config.

    Args:
        noise_scale: What to start from, > 0: a number for all layers, or a list of T, counted from the data side.
    """

    def __init__(self, noise_scale: float | list[float] = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.as_tensor(noise_scale, dtype=torch.float32).log())

    def forward(self, t: Tensor) -> Tensor:
        """Returns the scale of each row's layer, shape (B, 1, 1, 1), for layers t of shape (B,)."""
        log_scale = self.log_scale[t] if self.log_scale.ndim else self.log_scale.expand(t.shape)
        return log_scale.exp()[:, None, None, None]

    def tolist(self) -> float | list[float]:
        """Plain numbers, for the scheduler's config."""
        scale: float | list[float] = self.log_scale.detach().double().exp().tolist()
        return scale


class _ScoreUNet(nn.Module):
    """What critic and discriminator share: the UNet, and its score."""

    def __init__(self, unet: UNet2DModel, scheduler: HSIVIScheduler, num_layers: int = 0) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.num_layers = num_layers

    def _score(self, x: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        """Returns -eps(x, level) / sigma_level."""
        timestep, t = level % len(self.scheduler), level // len(self.scheduler)
        if self.num_layers:
            condition = t if condition is None else condition * self.num_layers + t
        _, noise_pred = self.scheduler.predict(_call(self.unet, x, timestep, condition), timestep, x)
        _, sigma = self.scheduler.alpha_sigma(timestep, noise_pred)
        return -noise_pred / sigma


class UNetCritic(_ScoreUNet):
    """A diffusion UNet as the score of the density at each noise level: -eps(x, level) / sigma_level.

    Args:
        unet: Predicts what the scheduler's `prediction_type` says.
        scheduler: Gives alpha and sigma.
        num_layers: Layers that the unet tells apart, see `label_layers`; 0 for one that does not.
    """

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the score at x, shape (B, C, H, W).

        Args:
            x: Shape (B, C, H, W).
            level: Timesteps, 0..N-1, or timestep + N t where the bridge tells the layer, shape (B,).
            condition: Class labels, shape (B,), or None.
        """
        return self._score(x, level, condition)


class UNetDiscriminator(_ScoreUNet):
    """A `UNetCritic` that also tells draws of the data from draws of the layers, for `Adversarial`; by one network.

    The logits are the mean over channels of the output of the UNet's middle block, one for each place of its map, as in
    adversarial score identity distillation (arXiv 2410.14919): features of the critic, and not one parameter more.

    Args:
        unet: See `UNetCritic`.
        scheduler: See `UNetCritic`.
        num_layers: See `UNetCritic`.

    Raises:
        ValueError: The UNet has no middle block.
    """

    def __init__(self, unet: UNet2DModel, scheduler: HSIVIScheduler, num_layers: int = 0) -> None:
        super().__init__(unet, scheduler, num_layers)
        if unet.mid_block is None:
            raise ValueError("the unet has no mid_block, of which the adversarial term takes its logits: leave it out")

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the score at x, shape (B, C, H, W), and the logits, shape (B, H', W'), from one call of the UNet.

        Args:
            x: Shape (B, C, H, W).
            level: See `UNetCritic`.
            condition: Class labels, shape (B,), or None.
        """
        features: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Tensor) -> None:
            features.append(output)

        handle = self.unet.mid_block.register_forward_hook(keep)
        try:
            score = self._score(x, level, condition)
        finally:
            handle.remove()
        return score, features[0].to(x.dtype).mean(1)


class UNetLayers(ConditionalLayers):
    """The student: one UNet shared by all layers, q_t(x_t | x_{t+1}) by `HSIVIScheduler.transition`.

    Args:
        unet: Starts as a copy of the teacher's.
        scheduler: Holds the grid, or the grids of several hierarchies, see `HSIVIScheduler.depths`.
        noise_scale: The learned scale, per pixel or per layer, or None for that of the scheduler's config.
        clip_pictures: Clip the mean of the last layer to [-1, 1], as pipelines do with what is drawn, and let its
            gradient pass as if it were not clipped (straight through). What lies beyond white or black then counts as
            white or black in training, too, where it would be taken for a fault, and a layer may hide there the grain
            that a prediction of noise leaves.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: HSIVIScheduler,
        noise_scale: HSIVINoiseScale | LayerNoiseScale | None = None,
        clip_pictures: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.noise_scale = noise_scale
        self.clip_pictures = clip_pictures
        self.num_layers = sum(scheduler.depths)

    @property
    def depths(self) -> list[int]:
        """T of each grid."""
        return self.scheduler.depths

    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        """Returns q_t(. | x_next), see `ConditionalLayers`; the condition is class labels of shape (B,)."""
        timestep = self.scheduler.input_timestep(t)
        model_output = _call(self.unet, x_next, timestep, condition)
        several = len(self.scheduler.depths) > 1  # grids, which may share an input and not the output
        prev_timestep = self.scheduler.output_timestep(t) if several else None
        mean, std = self.scheduler.transition(model_output, timestep, x_next, self._noise_scale(t), prev_timestep)
        return DiagonalGaussian(mean=self._clip(mean, t) if self.clip_pictures else mean, std=std)

    def _clip(self, mean: Tensor, t: Tensor) -> Tensor:
        """The mean, that of a last layer clipped in value and not in gradient."""
        _, last = hierarchy_ends(self.depths)
        is_last = torch.isin(t, last.to(t.device)).reshape(-1, *[1] * (mean.ndim - 1))
        return torch.where(is_last, mean + (mean.clamp(-1, 1) - mean).detach(), mean)

    def _noise_scale(self, t: Tensor) -> Tensor | None:
        if self.noise_scale is None:
            return None
        scale: Tensor = self.noise_scale(t) if isinstance(self.noise_scale, LayerNoiseScale) else self.noise_scale()
        return scale


class TeacherPairs:
    """Pairs (x_T, x_0) of noise and what a solver of the teacher's ODE makes of it, drawn with replacement.

    The layer that takes noise is to lead from x_T to x_0, those below it from x_0, diffused to their input, back to
    it. The solver is UniPC of diffusers, on its grid of spacing "leading". Of a teacher that predicts a variance, too,
    the mean is used. The noise may be, and the pairs wait, in main memory; what is drawn goes to the device of the
    teacher.

    Args:
        unet: The teacher.
        scheduler: Gives its noise schedule and what it predicts, and the grid of the layers.
        noise: x_T ~ N(0, I), shape (N, C, H, W).
        condition: Class label of each pair, shape (N,), or None.
        num_calls: Network calls for a pair.
        batch_size: Pairs that the network is called with at once.

    Attributes:
        noise: Shape (N, C, H, W).
        end: x_0, pictures between -1 and 1, of the same shape.
        condition: Shape (N,), or None.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: HSIVIScheduler,
        noise: Tensor,
        condition: Tensor | None = None,
        num_calls: int = 8,
        batch_size: int = 64,
    ) -> None:
        self._device, self.scheduler = unet.device, scheduler
        self.noise, self.condition = noise.cpu(), None if condition is None else condition.cpu()
        noises = noise.split(batch_size)
        classes = [None] * len(noises) if condition is None else condition.to(unet.device).split(batch_size)
        # The betas themselves, for the solver knows fewer names of schedules.
        schedule = {name: scheduler.config[name] for name in SCHEDULE} | {"trained_betas": scheduler.betas.tolist()}
        solver = UniPCMultistepScheduler(**schedule | {"beta_schedule": "linear"}, timestep_spacing="leading")
        ends = [
            _solve(unet, solver, x.to(unet.device), labels, num_calls).cpu()
            for x, labels in zip(noises, classes, strict=True)
        ]
        self.end = torch.cat(ends).clamp_(-1, 1)
        if lost := int((~self.end.isfinite()).flatten(1).any(1).sum()):
            raise ValueError(
                f"{lost} of {len(noise)} pairs end in numbers that are not finite: look at what the teacher draws, and "
                "if it runs in fp16, take bf16 or single precision"
            )

    def sample(self, t: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws (x_{t+1}, the mean of layer t whose clean picture is x_0, condition) for `PairChain`.

        Args:
            t: Layer of each row, shape (B,).
            generator: Source of the pairs and of the noise of the layers below the first.
        """
        index = torch.randint(len(self.noise), (len(t),), generator=generator)
        x_next, x0 = self.noise[index].to(self._device), self.end[index].to(self._device)
        timestep, below = self.scheduler.input_timestep(t), ~torch.isin(t, hierarchy_ends(self.scheduler.depths)[0])
        if bool(below.any()):
            alpha, sigma = self.scheduler.alpha_sigma(timestep, x0)
            diffused = alpha * x0 + sigma * randn_like(x0, generator)
            x_next = torch.where(below.to(x0.device).reshape(alpha.shape), diffused, x_next)
        end = self.scheduler.lead(x0, timestep, x_next, self.scheduler.output_timestep(t))
        return x_next, end, None if self.condition is None else self.condition[index].to(self._device)


class TeacherBridge(Bridge):
    """The diffusion bridge (Example 2): p_level is the data at a noise level, its score the pretrained network's.

    Args:
        unet: The teacher; it is frozen.
        scheduler: Holds the grid; layer t is fitted to the data at tau_t.
        level_range: Lowest and highest timestep of random levels.
        level_law: Where the random levels of a layer lie, see `sample_level`: "layer", between its output and its
            input, or "uniform", in all of the range; by default "layer" for kernel ddim, "uniform" for renoise.
        level_power: p > 0. A random level is low + (high - low) u^p, u uniform on [0, 1): p = 1 is uniform, a larger p
            has more levels of low noise.
        tell_layer: Let a level be timestep + N t in the place of a timestep, so that a critic is told the layer, too:
            for layers that are scored at the same timesteps, of which it would learn the mixture otherwise.
        data: Draws clean data, (size, condition, generator) -> shape (size, ...), each row with its condition; None for
            a bridge that is not drawn from.
        between_share: Share of the rows that are scored so with `scoring="between"`, see `between`; above 0, up to 1.

    Raises:
        ValueError: The range leaves the teacher's clock, the law is unknown, the power is not above 0, the share is out
            of its range, or the grid ends at -1, where the score is infinite.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: HSIVIScheduler,
        level_range: tuple[int, int] = (5, 800),
        level_law: LevelLaw | None = None,
        level_power: float = 1.0,
        data: SampleData | None = None,
        tell_layer: bool = False,
        between_share: float = 0.5,
    ) -> None:
        low, high = level_range
        if not 0 <= low <= high < len(scheduler):
            raise ValueError(f"level_range={level_range}: give two timesteps in order, from 0 to {len(scheduler) - 1}")
        if level_law not in (None, "layer", "uniform"):
            raise ValueError(f"level_law={level_law!r} is unknown: choose 'layer' or 'uniform'")
        if not level_power > 0:
            raise ValueError(f"level_power={level_power}: give a number > 0; 1 is uniform, 2 has more low noise")
        if not 0 < between_share <= 1:
            raise ValueError(f"between_share={between_share}: give a number above 0 and up to 1")
        self.network = UNetCritic(unet.requires_grad_(False).eval(), scheduler)
        self.scheduler = scheduler
        self.level_range = level_range
        self.level_law = level_law or usual_law(scheduler.config.kernel)
        self.level_power = level_power
        self.data = data
        self.tell_layer = tell_layer
        self.between_share = between_share
        self.num_layers = sum(scheduler.depths)
        self.shape = sample_shape(unet)
        if int(scheduler.output_timestep(torch.arange(self.num_layers)).min()) < 0:
            raise ValueError("the grid ends at -1, where the data has no score: end a grid to train on at 0 or above")

    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns -eps*(x, level) / sigma_level."""
        score: Tensor = self.network(x, level, condition)
        return score

    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_T ~ N(0, I) on the teacher's device."""
        return torch.randn(batch_size, *self.shape, generator=generator).to(self.network.unet.device)

    def sample(
        self, level: Tensor, condition: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws from p_level: alpha x + sigma z, x of the data with the row's condition, z ~ N(0, I).

        Raises:
            ValueError: The bridge has no data.
        """
        if self.data is None:
            raise ValueError("a draw of the bridge takes real data: make it with TeacherBridge(..., data=...)")
        x = self.data(len(level), condition, generator).to(self.network.unet.device)
        alpha, sigma = self._alpha_sigma(level, x)
        return alpha * x + sigma * randn_like(x, generator)

    def sample_input(
        self, t: Tensor, condition: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws p_{t+1}, the data at the level of the input of layers t, for `DataChain`; see `sample`."""
        return self.sample(self.scheduler.input_timestep(t), condition, generator)

    def level(self, t: Tensor) -> Tensor:
        """Returns tau_t, or tau_t + N t if the layer is told."""
        return self._with_layer(self.scheduler.output_timestep(t), t)

    def _with_layer(self, timestep: Tensor, t: Tensor) -> Tensor:
        return timestep + len(self.scheduler) * t if self.tell_layer else timestep

    def _alpha_sigma(self, level: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scheduler.alpha_sigma(level % len(self.scheduler), x)

    def sample_level(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws levels low + (high - low) u^p, p the `level_power`: uniformly by default.

        With `level_law` "layer" a layer t is scored from tau_t up to, not including, tau_{t+1}; the first one,
        t = T-1, up to the end of `level_range`. So no two layers of a grid share a level, and the critic, which is told
        the level alone, learns the marginal of each layer and not of their mixture. With "uniform" a renoise layer has
        all of `level_range`, a ddim layer, which can only be diffused upwards, what of it is at or above tau_t. Layers
        then share levels, as those of several grids do: that is what `tell_layer` is for.

        Raises:
            ValueError: A layer has no level in the range.
        """
        lowest, highest = (bound.to(t.device)[t] for bound in self._layer_levels)
        uniform = torch.rand(len(t), generator=generator, dtype=torch.float64).to(t.device)
        level = lowest + (uniform.pow(self.level_power) * (highest + 1 - lowest)).long()
        return self._with_layer(level.minimum(highest), t)  # for a small power may round to 1

    @property
    def _first_layers(self) -> Tensor:
        """The layer of each grid that takes the base."""
        return hierarchy_ends(self.scheduler.depths)[0]

    @cached_property
    def _layer_levels(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest random level of each layer, both of shape (T,)."""
        low, high = self.level_range
        t = torch.arange(self.num_layers)
        own = self.level_law == "layer"
        if not own and self.scheduler.config.kernel != "ddim":
            return torch.full_like(t, low), torch.full_like(t, high)
        outputs, inputs = self.scheduler.output_timestep(t), self.scheduler.input_timestep(t)
        if outputs.max() > high:
            raise ValueError(
                f"a layer ends at timestep {outputs.max()}, above the random levels up to {high}: start the grid "
                "lower, or raise the upper end of level_range"
            )
        if own and low >= inputs.min():
            raise ValueError(f"the random levels start at {low}, above the levels of the last layer: lower them")
        highest = inputs - 1 if own else torch.full_like(t, high)
        highest[self._first_layers] = high
        return outputs.clamp_min(low), highest

    def renoise(self, q: DiagonalGaussian, t: Tensor, level: Tensor) -> DiagonalGaussian:
        """Returns the law of x_s given x_{t+1}, s the level and r = alpha_s / alpha_t.

        For x_t diffused up to s >= tau_t that is N(r mean, r^2 std^2 + sigma_s^2 - r^2 sigma_t^2). A layer of the
        "renoise" kernel has std = sigma_t, so that the variance is sigma_s^2: the formula then holds at every s.
        """
        alpha_t, sigma_t = self._alpha_sigma(self.level(t), q.mean)
        alpha, sigma = self._alpha_sigma(level, q.mean)
        if self.scheduler.config.kernel == "renoise":
            return DiagonalGaussian(mean=alpha / alpha_t * q.mean, std=sigma)
        return q.diffuse(alpha_t, sigma_t, alpha, sigma)

    def between(
        self,
        q: DiagonalGaussian,
        t: Tensor,
        level: Tensor,
        x_next: Tensor,
        noise: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[DiagonalGaussian, Tensor]:
        """Returns N(alpha_s x0, sigma_s^2), s the level, and the noise of a draw that keeps to the layer's input.

        With x0 the clean picture of the layer, eps = (x_{t+1} - alpha_{t+1} x0) / sigma_{t+1}, and c that of a layer
        from tau_{t+1} to s, the noise is (sqrt(sigma_s^2 - c^2) eps + c z) / sigma_s, without gradient: x_s is what
        such a layer would draw. That is done with `between_share` of the rows below the first layer, whose input says
        nothing of a picture, and where the level is below the input; the others have the law of `renoise`, and z.
        """
        timestep, tau = level % len(self.scheduler), self.scheduler.input_timestep(t)
        chosen = torch.rand(len(t), generator=generator).to(t.device) < self.between_share
        chosen &= ~torch.isin(t, self._first_layers.to(t.device)) & (timestep < tau)
        x0, eps = self.scheduler.invert(q.mean, tau, x_next, self.scheduler.output_timestep(t))
        direction, c = self.scheduler.split_noise(tau, torch.minimum(timestep, tau), q.mean)
        alpha, sigma = self._alpha_sigma(level, q.mean)
        fresh, chosen = self.renoise(q, t, level), chosen.reshape(alpha.shape)
        mean, std = torch.where(chosen, alpha * x0, fresh.mean), torch.where(chosen, sigma, fresh.std)
        kept = ((direction * eps + c * noise) / sigma).detach()
        return DiagonalGaussian(mean=mean, std=std), torch.where(chosen, kept, noise)

    def weight(self, sigma_power: float = 0, alpha_power: float = 0) -> Weight:
        """Returns the weight sigma^a alpha^b of a level, in score units; multiply by sigma^-2 for noise units."""

        def weight(level: Tensor) -> Tensor:
            alpha, sigma = self._alpha_sigma(level, torch.zeros(1, device=level.device))
            return sigma**sigma_power * alpha**alpha_power

        return weight


def signal_timestep(schedule: HSIVIScheduler, shape: tuple[int, ...], signal: float) -> int:
    """Returns the first timestep where sqrt(C H W) alpha / sigma is at most a number, or the last where alpha > 0.

    A mean over n values has the noise of one by sqrt(n). So the coarse features of a large picture, or of one in
    colour, are seen through noise that hides those of a small one, at alpha / sigma as many times lower as its side is
    longer (Hoogeboom et al. 2023, arXiv 2301.11093), and levels that are to mean the same are told by this product.

    Args:
        schedule: Gives alpha and sigma at each timestep.
        shape: (C, H, W) of the pictures.
        signal: Above 0. On the linear clock of 1000, 3.2 is at timestep 440 of 8x8 grey pixels, 674 of 32x32, 750 of
            32x32 in colour, 836 of 64x64 in colour.

    Raises:
        ValueError: The signal is not above 0.
    """
    if not signal > 0:
        raise ValueError(f"signal={signal}: give a number above 0, such as 3.2")
    alpha, sigma = schedule.alpha_sigma(torch.arange(len(schedule)), torch.zeros(1))
    above = math.sqrt(math.prod(shape)) * alpha / sigma > signal
    return min(int(above.sum()), int((alpha > 0).sum()) - 1)


def load_teacher(name: str, revision: str | None = None) -> tuple[UNet2DModel, HSIVIScheduler]:
    """Loads a pretrained pipeline and takes its UNet and its noise schedule.

    Args:
        name: Folder or repo id of a diffusers pipeline with a `UNet2DModel` and a scheduler with a beta schedule.
        revision: Branch, tag or commit of a repo.

    Returns:
        The UNet, and a `HSIVIScheduler` without a grid: make one with `from_config(scheduler.config, ...)`.

    Raises:
        ValueError: The pipeline is missing, damaged, or no teacher for this method.
    """
    remedy = "give a folder or repo id that DiffusionPipeline.from_pretrained loads, such as google/ddpm-cifar10-32"
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"teacher {name!r} is not a folder: {remedy}")
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, revision=revision)
    except Exception as error:  # diffusers raises many types here, and all mean the same to the user
        place, reach = ("", "") if path.is_dir() else ("is no folder here, and ", ", from a Hub within reach")
        raise ValueError(
            f"teacher {name!r} {place}cannot be loaded ({type(error).__name__}: {error}): {remedy}{reach}"
        ) from error
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    others = sorted(set(pipeline.components) - {"unet", "scheduler"})
    if hasattr(pipeline, "unet_noise_scale"):
        raise ValueError(f"teacher {name!r} is an HSIVIPipeline, a sampler that was distilled: give the teacher it had")
    if others:
        raise ValueError(
            f"teacher {name!r} is a {type(pipeline).__name__} with {', '.join(others)}: only pipelines of a unet and a "
            "scheduler, which make pictures of pixels, can be distilled"
        )
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"teacher {name!r} has a unet of type {type(unet).__name__}, a UNet2DModel is needed")
    if scheduler is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"teacher {name!r}: {type(scheduler).__name__} has no beta schedule; {remedy}")
    _check_agreement(name, unet, scheduler)
    try:
        schedule = HSIVIScheduler.from_config(scheduler.config)
    except ValueError as error:
        raise ValueError(f"teacher {name!r}: {error}") from error
    # Some schedulers of diffusers keep 2^-24 in the place of a zero at the end.
    if not torch.allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.float(), atol=1e-6):
        raise ValueError(
            f"teacher {name!r}: the noise levels of its {type(scheduler).__name__} cannot be rebuilt from its betas; "
            "only levels that follow from beta_start, beta_end and beta_schedule, or from trained_betas, are supported"
        )
    return unet, schedule


def _check_agreement(name: str, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
    """Refuses a UNet and a scheduler that cannot have been trained together."""
    channels, outputs = unet.config.in_channels, unet.config.out_channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"teacher {name!r}: the unet takes {channels} channels and returns {outputs}; a noise prediction has "
            f"{channels}, or {2 * channels} with a learned variance"
        )
    clock, wanted = scheduler.config.num_train_timesteps, unet.config.get("num_train_timesteps")
    if wanted is not None and wanted != clock:
        raise ValueError(
            f"teacher {name!r}: the unet was made for {wanted} timesteps, the scheduler counts {clock}; mend "
            "num_train_timesteps in one of the two configs"
        )


def sample_shape(unet: UNet2DModel) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the pictures of a UNet."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def usual_law(kernel: str) -> LevelLaw:
    """The level law of a kernel where none is asked for."""
    return "layer" if kernel == "ddim" else "uniform"


def label_layers(unet: UNet2DModel, num_layers: int) -> UNet2DModel:
    """Returns a copy of a UNet that is told the layer: for each one it starts as the UNet itself.

    Args:
        unet: With or without classes.
        num_layers: L. The copy takes class labels, t of a UNet without classes, otherwise class * L + t.

    Raises:
        ValueError: The classes of the UNet are no numbers.
    """
    kind, classes = unet.config.class_embed_type, unet.config.num_class_embeds
    if kind is not None:
        raise ValueError(
            f"class_embed_type={kind!r} of the unet leaves no place to tell a critic the layer: train where it need "
            "not be told, with one --num_layers, and --level_law layer or --scoring own"
        )
    labelled: UNet2DModel = UNet2DModel.from_config(unet.config, num_class_embeds=num_layers * (classes or 1))
    state, name = dict(unet.state_dict()), "class_embedding.weight"
    old = state[name] if classes else torch.zeros_like(labelled.class_embedding.weight[:1])
    labelled.load_state_dict({**state, name: old.detach().repeat_interleave(num_layers, 0)})
    if (unet.device, unet.dtype) != (labelled.device, labelled.dtype):  # fake tensors, of --plan, cannot be moved
        labelled = labelled.to(unet.device, unet.dtype)
    return labelled.train(unet.training)


@torch.no_grad()
def _solve(
    unet: UNet2DModel, solver: UniPCMultistepScheduler, x: Tensor, condition: Tensor | None, num_calls: int
) -> Tensor:
    """Follows the ODE from noise to a picture."""
    solver.set_timesteps(num_calls, device=x.device)
    for timestep in solver.timesteps:
        output = _call(unet, x, timestep, condition)[:, : x.shape[1]]
        x = solver.step(output, timestep, x).prev_sample
    return x


def _call(unet: UNet2DModel, x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    """Calls a network in its own precision and answers in that of x.

    So every formula after it, 1 / sigma among them, runs in the precision of x, and of half precision only the network
    itself sees anything.
    """
    labels = {} if condition is None else {"class_labels": condition}
    output: Tensor = unet(x.to(unet.dtype), timestep, **labels).sample.to(x.dtype)
    return output
