"""The teacher as the bridge of the core: p_t is the data at a noise level, its score the pretrained network's."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.denoisers import Network, num_classes, sample_shape
from ..teachers.guidance import guided
from ..vi.bridges import Bridge
from ..vi.distributions import DiagonalGaussian
from ..vi.layers import hierarchy_ends
from ..vi.objectives import Weight
from .student import UNetCritic


class TeacherBridge(Bridge):
    """The diffusion bridge (Example 2): p_level is the data at a noise level, its score the pretrained network's.

    Args:
        unet: The teacher; it is frozen.
        scheduler: Holds the grid; layer t is fitted to the data at tau_t.
        level_range: Lowest and highest timestep of random levels.
        between_share: Share of the rows scored at a random level that keep to their input, see `place`; 0 to 1.
        guidance_falls: Guide less the more noise there is, not at all where the highest grid starts.

    Attributes:
        guidance_end: Time of the network from which on there is no guidance, None where it is the same at all times.

    Raises:
        ValueError: The range leaves the teacher's clock, the grid ends at -1, where the score is infinite, or the
            kernel is another than "ddim".
    """

    def __init__(
        self,
        unet: Network,
        scheduler: HSIVIScheduler,
        level_range: tuple[int, int] = (5, 800),
        between_share: float = 0.0,
        guidance_falls: bool = False,
    ) -> None:
        low, high = level_range
        if not 0 <= low <= high < len(scheduler):
            raise ValueError(f"level_range={level_range}: give two timesteps in order, from 0 to {len(scheduler) - 1}")
        self.unet = unet.requires_grad_(False).eval()
        self.scheduler, self.level_range, self.between_share = scheduler, level_range, between_share
        self.num_layers = sum(scheduler.depths)
        self.shape = sample_shape(unet)
        self.guides, self.scales = bool(scheduler.guidance_scales), scheduler.guidance_scales or [1.0]
        # To draw; 0 without classes. With guidance the last label of the teacher is none of them.
        self.num_classes = num_classes(unet, self.guides)
        start = scheduler.levels.time(scheduler.input_level(self._first_layers).max()).item()
        self.guidance_end = start if guidance_falls else None
        self.network = UNetCritic(guided(unet, self.scales, self.guidance_end), scheduler)
        if int(scheduler.output_level(torch.arange(self.num_layers)).min()) < 0:
            raise ValueError("the grid ends at -1, where the data has no score: end a grid to train on at 0 or above")
        if (kernel := scheduler.config.kernel) != "ddim":
            raise ValueError(f"kernel={kernel!r} of the scheduler is for sampling: make one with kernel 'ddim'")

    def score(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns -eps*(x, level) / sigma_level, of the guided teacher if there is guidance."""
        score: Tensor = self.network(x, level, condition)
        return score

    def sample_base(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_T ~ N(0, I) on the teacher's device."""
        return torch.randn(batch_size, *self.shape, generator=generator).to(self.network.unet.device)

    def level(self, t: Tensor) -> Tensor:
        """Returns tau_t, shape (B,)."""
        return self.scheduler.output_level(t)

    def sample_level(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws levels uniformly from those of the layer.

        A layer t is scored from tau_t, or with noise_eta 0, where its output has no score, from above it, up to, not
        including, tau_{t+1}; the first one, t = T-1, up to the end of `level_range`. So no two layers of a grid share a
        level, and the critic, which is told the level alone, learns the marginal of each. With several grids it must be
        told the layer, see `label_layers`.

        Raises:
            ValueError: A layer has no level in the range.
        """
        place = torch.device("cpu") if t.device.type == "mps" else t.device  # which has no float64
        lowest, highest = (bound.to(place)[t.to(place)] for bound in self._layer_levels)
        uniform = torch.rand(len(t), generator=generator, dtype=torch.float64).to(place)
        return (lowest + (uniform * (highest + 1 - lowest)).long()).to(t.device)

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
                f"a layer ends at timestep {outputs.max()}, above the random levels up to {high}: start the grid "
                "lower, or raise the upper end of level_range"
            )
        if low >= inputs.min():
            raise ValueError(f"the random levels start at {low}, above the levels of the last layer: lower them")
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
        kept = ((layer.direction * eps + layer.c * noise) / sigma).detach()
        return DiagonalGaussian(mean=mean, std=std), torch.where(chosen, kept, noise)

    def weight(self, sigma_power: float) -> Weight:
        """Returns the weight sigma^a of a level, in score units; multiply by sigma^-2 for noise units."""
        return lambda level: self.scheduler.alpha_sigma(level, torch.zeros(1, device=level.device))[1] ** sigma_power
