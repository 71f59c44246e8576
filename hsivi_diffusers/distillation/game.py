"""A teacher as the core sees it: the layers of the student, the critic, and the bridge of Example 2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.guidance import Guided
from ..teachers.teacher import Teacher
from ..vi.bridges import Bridge
from ..vi.distributions import DiagonalGaussian
from ..vi.layers import ConditionalLayers, hierarchy_ends
from ..vi.objectives import Weight

SPREAD = 0.25  # how far apart the embeddings of guidance scales start


def noise_score(output: Tensor, scheduler: HSIVIScheduler, x: Tensor, level: Tensor) -> Tensor:
    """Returns the score -eps / sigma at x, (B, C, H, W), of a network output at levels (B,)."""
    _, noise_pred = scheduler.predict(output, level, x)
    _, sigma = scheduler.alpha_sigma(level, noise_pred)
    return -noise_pred / sigma


class StudentCritic(nn.Module):
    """A diffusion network as the score of the density at each noise level: -eps(x, level) / sigma_level.

    Args:
        network: Its prediction is of the scheduler's `prediction_type`.
        teacher: Knows how to call it.
        scheduler: Gives alpha and sigma.
        num_layers: Layers in the labels of the network, see `label_layers`; 0 if they are not.
    """

    def __init__(self, network: Any, teacher: Teacher, scheduler: HSIVIScheduler, num_layers: int = 0) -> None:
        super().__init__()
        self.network, self.teacher, self.scheduler, self.num_layers = network, teacher, scheduler, num_layers

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Returns the score at x, shape (B, C, H, W).

        Args:
            x: Shape (B, C, H, W).
            level: Timesteps, 0..N-1, shape (B,).
            condition: Class labels, shape (B,), or None.
            t: Layers, 0..L-1, shape (B,); needed with `num_layers`, ignored without it.
        """
        if self.num_layers:
            if t is None:
                raise ValueError(f"t is missing: this critic has {self.num_layers} layers; give one for each row")
            condition = t if condition is None else condition * self.num_layers + t  # see label_layers
        output = self.teacher.call(self.network, x, self.scheduler.levels.time(level), condition)
        return noise_score(output, self.scheduler, x, level)


class StudentLayers(ConditionalLayers):
    """The student: one network shared by all layers, q_t(x_t | x_{t+1}) by `HSIVIScheduler.transition`.

    Args:
        network: Starts as a copy of the teacher's.
        teacher: Knows how to call it.
        scheduler: Holds the grid, or the grids of several hierarchies.
        noise_scale: The learned scale per pixel, or None for that of the scheduler's config.
        clip_images: Clip the mean of the last layer to [-1, 1], as pipelines do with what is drawn, and let its
            gradient pass as if it were not clipped (straight through).
    """

    def __init__(
        self,
        network: Any,
        teacher: Teacher,
        scheduler: HSIVIScheduler,
        noise_scale: HSIVINoiseScale | None = None,
        clip_images: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.teacher, self.scheduler, self.noise_scale = network, teacher, scheduler, noise_scale
        self.clip_images, self.num_layers = clip_images, sum(scheduler.depths)

    @property
    def depths(self) -> list[int]:
        """T of each grid."""
        return self.scheduler.depths

    def forward(self, x_next: Tensor, t: Tensor, condition: Tensor | None = None) -> DiagonalGaussian:
        """Returns q_t(. | x_next), see `ConditionalLayers`; the condition is class labels of shape (B,)."""
        level = self.scheduler.input_level(t)
        model_output = self.teacher.call(self.network, x_next, self.scheduler.levels.time(level), condition)
        several = len(self.scheduler.depths) > 1  # grids, which may share an input and not the output
        prev_level = self.scheduler.output_level(t) if several else None
        scale = None if self.noise_scale is None else self.noise_scale()
        mean, std = self.scheduler.transition(model_output, level, x_next, scale, prev_level)
        if self.clip_images:
            _, last = hierarchy_ends(self.depths)
            is_last = torch.isin(t, last.to(t.device)).reshape(-1, *[1] * (mean.ndim - 1))
            mean = torch.where(is_last, mean + (mean.clamp(-1, 1) - mean).detach(), mean)
        return DiagonalGaussian(mean=mean, std=std)


@torch.no_grad()
def label_scales(teacher: Teacher, network: Any, scales: Sequence[float]) -> Any:
    """Returns a copy of a network whose labels hold a guidance scale w beside the class, class * G + g.

    For w = 1 it starts as the network itself. The embeddings of others start at e_none + (1 + SPREAD (w - 1)) (e_c -
    e_none), with those of the class and of no class: from equal ones it would not learn to distinguish the scales.

    Raises:
        ValueError: See `Teacher.check_labels`.
    """
    labelled = label_layers(teacher, network, len(scales))
    rows = labelled.class_embedding.weight.unflatten(0, (-1, len(scales)))
    none, w = rows[-1], torch.tensor(scales).to(rows)[:, None]
    rows.copy_(none + (1 + SPREAD * (w - 1)) * (rows - none))
    return labelled


def label_layers(teacher: Teacher, network: Any, num_layers: int) -> Any:
    """Returns a copy of a network whose labels hold the layer too, class * L + t; see `Teacher.label`."""
    teacher.check_labels()
    return teacher.label(network, num_layers)


class TeacherBridge(Bridge):
    """The diffusion bridge (Example 2): p_level is the data at a noise level, its score the pretrained network's.

    Args:
        teacher: Its network is frozen.
        scheduler: Holds the grid; layer t is fitted to the data at tau_t.
        level_range: Lowest and highest timestep of random levels.
        between_share: Share of the rows scored at a random level that keep to their input, see `place`; 0 to 1.
        decay_guidance: Decrease guidance linearly with noise, to none where the highest grid starts.

    Attributes:
        guided: The teacher that is followed.
        guidance_end: Time of the network from which on there is no guidance, None where it is the same at all times.

    Raises:
        ValueError: The range leaves the teacher's clock, the grid ends at -1 and layers have noise, or the
            kernel is another than "ddim".
    """

    def __init__(
        self,
        teacher: Teacher,
        scheduler: HSIVIScheduler,
        level_range: tuple[int, int] = (5, 800),
        between_share: float = 0.0,
        decay_guidance: bool = False,
    ) -> None:
        low, high = level_range
        if not 0 <= low <= high < len(scheduler):
            raise ValueError(f"level_range={level_range}: give two timesteps in order, from 0 to {len(scheduler) - 1}")
        teacher.network.requires_grad_(False).eval()
        self.teacher, self.shape = teacher, teacher.shape
        self.scheduler, self.level_range, self.between_share = scheduler, level_range, between_share
        self.num_layers = sum(scheduler.depths)
        self.guides, self.scales = bool(scheduler.guidance_scales), scheduler.guidance_scales or [1.0]
        # To draw; 0 without classes. With guidance the last label of the teacher is none of them.
        self.num_classes = teacher.num_conditions(self.guides)
        start = scheduler.levels.time(scheduler.input_level(self._first_layers).max()).item()
        self.guidance_end = start if decay_guidance else None
        self.guided = Guided(teacher, self.scales, self.guidance_end)
        if scheduler.config.noise_eta and int(scheduler.output_level(torch.arange(self.num_layers)).min()) < 0:
            raise ValueError(
                "the grid ends at -1, where the data has no score: end a grid to train on at 0 or above, or set "
                "noise_eta=0, which scores no output"
            )
        if (kernel := scheduler.config.kernel) != "ddim":
            raise ValueError(f"kernel={kernel!r} of the scheduler is for sampling: make one with kernel 'ddim'")

    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns -eps*(x, level) / sigma_level, of the guided teacher if there is guidance."""
        return noise_score(self.guided(x, self.scheduler.levels.time(level), condition), self.scheduler, x, level)

    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_T ~ N(0, I) on the teacher's device, without what is above a `noise_cutoff`."""
        noise = torch.randn(batch_size, *self.shape, generator=generator)
        return self.scheduler.low_pass(noise).to(self.teacher.device)

    def level(self, t: Tensor) -> Tensor:
        """Returns tau_t, shape (B,)."""
        return self.scheduler.output_level(t)

    def sample_level(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws levels uniformly from those of the layer.

        A layer t is scored from tau_t, or with noise_eta 0, where its output has no score, from above it, up to, not
        including, tau_{t+1}; the first one, t = T-1, up to the end of `level_range`. So no two layers of a grid share a
        level, and the critic, which takes the level alone, learns the marginal of each. With several grids it takes the
        layer too, see `label_layers`.

        Raises:
            ValueError: A layer has no level in the range.
        """
        device = torch.device("cpu") if t.device.type == "mps" else t.device  # which has no float64
        lowest, highest = (bound.to(device)[t.to(device)] for bound in self._layer_levels)
        uniform = torch.rand(len(t), generator=generator, dtype=torch.float64).to(device)
        return (lowest + (uniform * (highest + 1 - lowest)).long()).to(t.device)

    def check_levels(self) -> None:
        """Refuses, with ValueError, a grid and a range of levels in which a layer has no level."""
        _ = self._layer_levels

    @property
    def _first_layers(self) -> Tensor:
        """The layer of each grid that takes the base."""
        return hierarchy_ends(self.scheduler.depths)[0]

    @cached_property
    def _layer_levels(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest random level of each layer, both of shape (T,)."""
        low, high = self.level_range
        t = torch.arange(self.num_layers)
        outputs, inputs = self.scheduler.output_level(t), self.scheduler.input_level(t)
        if outputs.max() > high:
            raise ValueError(
                f"a layer ends at timestep {outputs.max()}, above {high}, the highest that is scored: set a lower "
                "start_timestep, or take fewer steps"
            )
        if low >= inputs.min():
            raise ValueError(
                f"the last layer starts at timestep {inputs.min()}, and levels are drawn from {low} on: take fewer "
                f"steps, or set level_min below {inputs.min()}"
            )
        highest = inputs - 1
        highest[self._first_layers] = high
        if self.scheduler.config.noise_eta == 0:
            outputs = outputs + 1
            if bool((outputs > highest).any()):
                raise ValueError("noise_eta=0 needs a level between the ends of each layer: take fewer steps")
        return outputs.clamp_min(low), highest

    def place(
        self,
        q: DiagonalGaussian,
        t: Tensor,
        level: Tensor,
        noise: Tensor,
        x_next: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[DiagonalGaussian, Tensor]:
        """Returns the law diffused to the level s and the noise z; `between_share` of the rows keep to their input.

        With r = alpha_s / alpha_t the diffused law is N(r mean, r^2 std^2 + sigma_s^2 - r^2 sigma_t^2), s >= tau_t.

        A draw that keeps to its input, with x0 the clean image of the layer, eps = (x_{t+1} - alpha_{t+1} x0) /
        sigma_{t+1} and c that of a layer from tau_{t+1} to s, has the law N(alpha_s x0, sigma_s^2) and the noise
        (sqrt(sigma_s^2 - c^2) eps + c z) / sigma_s, without gradient: x_s is what such a layer would draw (moment
        matching, arXiv 2406.04103). Rows of the first layer, and with a level above their input, are never chosen.

        Raises:
            ValueError: There is a share and no x_next.
        """
        alpha, sigma = self.scheduler.alpha_sigma(level, q.mean)
        fresh = q.diffuse(*self.scheduler.alpha_sigma(self.level(t), q.mean), alpha, sigma)
        if not self.between_share:
            return fresh, noise
        if x_next is None:
            raise ValueError(f"between_share={self.between_share} needs the input of the layers: give x_next")
        tau = self.scheduler.input_level(t)
        chosen = torch.rand(len(t), generator=generator).to(t.device) < self.between_share
        chosen &= ~torch.isin(t, self._first_layers.to(t.device)) & (level < tau)
        x0, eps = self.scheduler.layers.coefficients(tau, x_next, self.level(t)).invert(q.mean, x_next)
        layer = self.scheduler.layers.coefficients(tau, q.mean, torch.minimum(level, tau))
        chosen = chosen.reshape(alpha.shape)
        mean, std = torch.where(chosen, alpha * x0, fresh.mean), torch.where(chosen, sigma, fresh.std)
        correlated = ((layer.direction * eps + layer.c * noise) / sigma).detach()
        return DiagonalGaussian(mean=mean, std=std), torch.where(chosen, correlated, noise)

    def weight(self, sigma_power: float) -> Weight:
        """Returns the weight sigma^a of a level, in score units; multiply by sigma^-2 for noise units."""
        return lambda level: self.scheduler.alpha_sigma(level, torch.zeros(1, device=level.device))[1] ** sigma_power
