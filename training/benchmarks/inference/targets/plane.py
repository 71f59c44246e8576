"""Densities with exact answers, most on the plane: mixtures of Gaussians, curves made of them, squares, a banana."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsivi_diffusers.vi import DiffusibleTarget, SampledTarget
from hsivi_diffusers.vi.distributions import randn_like

SPACING = 1.25  # of Gaussians in a chain, in std: the density of their sum varies by 1e-5 of itself along it


class GaussianMixture(DiffusibleTarget):
    """p(x) = sum_m w_m N(x; mu_m, C_m) on R^d.

    Diffused, it is sum_m w_m N(x; alpha mu_m, alpha^2 C_m + sigma^2 I). With C_m = V_m diag(v_m) V_m^T, the coordinates
    V_m^T x of each component are independent at every level, with variances alpha^2 v_m + sigma^2.

    Args:
        means: mu, shape (M, d), also the attribute `modes`. Draws get its dtype and device.
        covariances: C, shape (M, d, d), symmetric and positive definite.
        weights: w, shape (M,), >= 0; divided by their sum. Equal by default.

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None) -> None:
        weights = means.new_ones(len(means)) if weights is None else weights
        _check_shapes(means, covariances, weights)
        covariances = covariances.to("cpu", torch.float64)
        variances, axes = torch.linalg.eigh(covariances)
        _check_covariances(covariances, variances)
        self.modes = means
        self.covariances = covariances
        self.dimension = means.shape[1]
        self.weights = weights.to("cpu", torch.float64) / float(weights.sum())
        flat_axes = axes.transpose(0, 1).flatten(1)  # (d, M d): the coordinates of all components in one product
        centres = torch.einsum("md,mde->me", means.to("cpu", torch.float64), axes)
        self._scales = axes * variances.sqrt()[:, None]
        if (variances == variances[0, 0]).all():
            variances = variances[:1, :1]  # one number for all: much less to compute at each call
        self._parameters = (self.weights.log(), centres, variances, flat_axes)

    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.modes.device if generator is None else generator.device
        weights = self.weights.to(device, self.modes.dtype)
        component = torch.multinomial(weights, size, replacement=True, generator=generator).to(self.modes.device)
        noise = randn_like(self.modes.new_empty(size, self.dimension), generator)
        return self.modes[component] + torch.einsum("bde,be->bd", self._scales.to(noise)[component], noise)

    def diffused_log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._joint(x, alpha, sigma)[0].logsumexp(1)

    def diffused_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns sum_m P(m given x) V_m diag(alpha^2 v_m + sigma^2)^-1 V_m^T (alpha mu_m - x), shape (B, d)."""
        joint, pull, axes = self._joint(x, alpha, sigma)
        return -(joint.softmax(1)[..., None] * pull).flatten(1) @ axes.T

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log w_m N_m(x), shape (B, M); -grad log N_m along the axes, shape (B, M, d); and the axes."""
        log_weights, centres, variances, axes = (value.to(x) for value in self._parameters)
        variance = alpha.square()[:, None, None] * variances + sigma.square()[:, None, None]
        offset = (x @ axes).unflatten(1, centres.shape) - alpha[:, None, None] * centres
        pull = offset / variance
        log_det = variance.log().sum(2) * (self.dimension / variance.shape[2])
        constant = self.dimension * math.log(2 * math.pi)
        return log_weights - 0.5 * ((offset * pull).sum(2) + log_det + constant), pull, axes


class Checkerboard(DiffusibleTarget):
    """Uniform on the black squares of [-4, 4]^2, blurred by N(0, 0.2^2 I); their centres are `modes`, shape (8, 2).

    Column i and row j of the 4 x 4 squares, counted from the lower left corner, meet in a black one where i + j is
    even. With g_i(u) = Phi((alpha b_i - u) / s) - Phi((alpha a_i - u) / s), s^2 = alpha^2 0.2^2 + sigma^2, for a column
    (or row) from a_i to b_i, the diffused density is sum over black (i, j) of g_i(x_1) g_j(x_2) / (alpha^2 area), where
    area is that of all black squares. As i and j are both even or both odd, it is a sum of two products.
    """

    dimension = 2
    smoothing, width = 0.2, 2.0

    def __init__(self) -> None:
        self.edges = torch.linspace(-4, 4, 5, dtype=torch.float64)
        centres = (self.edges[:-1] + self.edges[1:]).float() / 2
        black = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
        self.modes = centres[torch.tensor(black)]

    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        device = None if generator is None else generator.device
        square = torch.randint(len(self.modes), (size,), generator=generator, device=device).to(self.modes.device)
        place = torch.rand(size, 2, generator=generator, device=device, dtype=self.modes.dtype).to(self.modes.device)
        noise = randn_like(self.modes.new_empty(size, 2), generator)
        return self.modes[square] + self.width * (place - 0.5) + self.smoothing * noise

    def diffused_log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        edges, _ = self._edges(x, alpha, sigma)
        area = len(self.modes) * self.width**2
        return _of_black(_intervals(edges)[0]).logsumexp(1) - math.log(area) - 2 * alpha.log()

    def diffused_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        edges, std = self._edges(x, alpha, sigma)
        mass, slope = _intervals(edges)
        parity = _of_black(mass).softmax(1)[:, None]  # (B, 1, 2): x is in an even column and row, or in odd ones
        within = [(mass[..., k::2].softmax(2) * slope[..., k::2]).sum(2) for k in (0, 1)]
        return (parity * torch.stack(within, 2)).sum(2) / std[:, None]

    def _edges(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the edges as seen from x, (alpha edge - x) / s, shape (B, 2, cells + 1), and s, shape (B,)."""
        std = (alpha.square() * self.smoothing**2 + sigma.square()).sqrt()
        edges = alpha[:, None] * self.edges.to(x.device, x.dtype)
        return (edges[:, None] - x[..., None]) / std[:, None, None], std


class Banana(SampledTarget):
    """x_1 ~ N(0, 2^2), x_2 given x_1 ~ N(x_1^2 / 4 - 1, 0.5^2)."""

    dimension = 2
    std_1, std_2 = 2.0, 0.5

    def __init__(self) -> None:
        self.modes = torch.tensor([[0.0, -1.0]])

    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        first, second = randn_like(self.modes.new_empty(size, 2), generator).unbind(1)
        first = self.std_1 * first
        return torch.stack([first, self._ridge(first) + self.std_2 * second], 1)

    def log_prob(self, x: Tensor) -> Tensor:
        across, off = x[:, 0] / self.std_1, (x[:, 1] - self._ridge(x[:, 0])) / self.std_2
        return -0.5 * (across.square() + off.square()) - math.log(2 * math.pi * self.std_1 * self.std_2)

    def score(self, x: Tensor) -> Tensor:
        pull = (x[:, 1] - self._ridge(x[:, 0])) / self.std_2**2
        return torch.stack([0.5 * x[:, 0] * pull - x[:, 0] / self.std_1**2, -pull], 1)

    def _ridge(self, first: Tensor) -> Tensor:
        return 0.25 * first.square() - 1.0


def ring() -> GaussianMixture:
    """Returns eight separate round Gaussians, evenly spaced on a circle of radius 5."""
    return _round(_circle(8, 5.0), 0.2)


def cross() -> GaussianMixture:
    """Returns two Gaussians of opposite correlation, in the shape of an X."""
    covariances = torch.tensor([[[2.0, 1.8], [1.8, 2.0]], [[2.0, -1.8], [-1.8, 2.0]]])
    return GaussianMixture(torch.zeros(2, 2), covariances)


def circles() -> GaussianMixture:
    """Returns two circles around the origin, of std 0.3 across: chains of round Gaussians, `SPACING` std apart."""
    means = [_circle(math.ceil(2 * math.pi * radius / (SPACING * 0.3)), radius) for radius in (1.5, 3.5)]
    return _round(torch.cat(means), 0.3)


def swiss_roll() -> GaussianMixture:
    """Returns a spiral of 1.5 turns, of std 0.25 across: a chain of round Gaussians, `SPACING` std apart."""
    angle = math.pi * (1 + 3 * torch.linspace(0, 1, 20001, dtype=torch.float64))
    curve = 3.25 * angle[:, None] / angle[-1] * torch.stack([angle.cos(), angle.sin()], 1)
    length = torch.cat([angle.new_zeros(1), curve.diff(dim=0).norm(dim=1).cumsum(0)])
    num_modes = math.ceil(float(length[-1]) / (SPACING * 0.25)) + 1
    at = torch.searchsorted(length, torch.linspace(0, float(length[-1]), num_modes, dtype=torch.float64))
    return _round(curve[at.clamp(max=len(curve) - 1)].float(), 0.25)


def _circle(num_modes: int, radius: float) -> Tensor:
    angle = 2 * math.pi * torch.arange(num_modes, dtype=torch.float64) / num_modes
    return (radius * torch.stack([angle.cos(), angle.sin()], 1)).float()


def _round(means: Tensor, std: float) -> GaussianMixture:
    return GaussianMixture(means, (std**2 * torch.eye(2, dtype=torch.float64)).expand(len(means), 2, 2))


def _of_black(mass: Tensor) -> Tensor:
    """From log masses of columns and rows, shape (B, 2, cells), those of the even and the odd squares, shape (B, 2)."""
    return torch.stack([mass[..., k::2].logsumexp(2).sum(1) for k in (0, 1)], 1)


def _intervals(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log(Phi(z_{i+1}) - Phi(z_i)) and (phi(z_i) - phi(z_{i+1})) / (Phi(z_{i+1}) - Phi(z_i)), ascending z.

    They are exact in both tails: on one side of 0 both go by the nearer end, less what lies beyond the farther, and by
    Phi(-|z|) = exp(-z^2 / 2) scaled(|z|) / 2, scaled(z) = erfcx(z / sqrt(2)).
    """
    straddles = (z[..., :-1] <= 0) & (z[..., 1:] >= 0)
    inside = torch.where(straddles, torch.erf(z / math.sqrt(2)).diff(dim=-1), 1.0) / 2
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    near, far = _ordered(z.abs())
    scaled_far, scaled_near = _ordered(torch.special.erfcx(z.abs() / math.sqrt(2)))
    gap = (scaled_far / scaled_near).log() - 0.5 * (far - near) * (far + near)
    gap = torch.where(straddles, -1.0, gap)  # any number: log and division must bear what is not chosen, too
    rest = -torch.expm1(gap)
    mass = (scaled_near * rest / 2).log() - 0.5 * near.square()
    slope = z[..., :-1].sign() * math.sqrt(2 / math.pi) * (1 / scaled_near - gap.exp() / scaled_far) / rest
    return torch.where(straddles, inside.log(), mass), torch.where(straddles, -density.diff(dim=-1) / inside, slope)


def _ordered(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller and the larger end of each interval."""
    return torch.minimum(ends[..., :-1], ends[..., 1:]), torch.maximum(ends[..., :-1], ends[..., 1:])


def _check_shapes(means: Tensor, covariances: Tensor, weights: Tensor) -> None:
    num_modes, dimension = means.shape if means.ndim == 2 else (0, 0)
    shapes = (num_modes, dimension), (num_modes, dimension, dimension), (num_modes,)
    if not means.numel() or (means.shape, covariances.shape, weights.shape) != shapes:
        raise ValueError(
            f"means {tuple(means.shape)}, covariances {tuple(covariances.shape)}, weights {tuple(weights.shape)}: give "
            "the shapes (M, d), (M, d, d) and (M,), one row a component"
        )
    if not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError(f"weights {weights.tolist()}: give finite numbers >= 0 with a sum > 0, or none")


def _check_covariances(covariances: Tensor, variances: Tensor) -> None:
    if not torch.allclose(covariances, covariances.mT, rtol=1e-4, atol=1e-6):
        raise ValueError("covariances are not symmetric: give (C + C^T) / 2")
    if not (variances > 0).all():
        worst = int(variances[:, 0].argmin())
        raise ValueError(
            f"covariance {worst} has the eigenvalue {float(variances[worst, 0]):.3g}: all must be > 0; add a little to "
            "its diagonal"
        )
