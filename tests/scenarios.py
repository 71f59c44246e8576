"""A linear-Gaussian hierarchy and a Gaussian bridge, of which every marginal, score and divergence is known."""

import torch

from hsivi_diffusers.vi import Bridge, ConditionalLayers, DiagonalGaussian, IndependentLayers

DIMENSION = 3


class LinearLayers(ConditionalLayers):
    """q_t(x_t | x_{t+1}) = N(scale_t x_{t+1} + shift_t, std_t^2), so with x_T ~ N(0, I) all marginals are Gaussian."""

    def __init__(self, scale, shift, std):
        super().__init__()
        self.num_layers = len(scale)
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shift = torch.nn.Parameter(torch.tensor(shift, dtype=torch.float64))
        self.std = torch.tensor(std, dtype=torch.float64)
        self.calls = 0

    def forward(self, x_next, t, condition=None):
        self.calls += 1
        shift = self.shift[t, None] if condition is None else self.shift[t, None] + condition[:, None]
        return DiagonalGaussian(mean=self.scale[t, None] * x_next + shift, std=self.std[t, None])

    def marginals(self):
        """Mean and variance of each coordinate of x_0, ..., x_{T-1}, x_T."""
        mean, variance = [torch.zeros((), dtype=torch.float64)], [torch.ones((), dtype=torch.float64)]
        for t in reversed(range(self.num_layers)):
            mean.insert(0, self.scale[t] * mean[0] + self.shift[t])
            variance.insert(0, self.scale[t] ** 2 * variance[0] + self.std[t] ** 2)
        return torch.stack(mean), torch.stack(variance)


class GaussianBridge(Bridge):
    """p_t = N(mean_t, variance_t) in each of three coordinates."""

    def __init__(self, mean, variance):
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.variance = torch.as_tensor(variance, dtype=torch.float64)
        self.num_layers = len(self.mean)

    def score(self, x, level, condition=None):
        return -(x - self.mean[level, None]) / self.variance[level, None]

    def log_prob(self, x, level):
        mean, variance = self.mean[level, None], self.variance[level, None]
        return torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).sum(1)

    def sample_base(self, batch_size, generator=None):
        return torch.randn(batch_size, DIMENSION, generator=generator, dtype=torch.float64)


class ExactCritic(torch.nn.Module):
    """grad log q_t of the marginal of linear layers."""

    def __init__(self, layers):
        super().__init__()
        mean, variance = layers.marginals()
        self.mean, self.variance = mean.detach(), variance.detach()

    def forward(self, x, level, condition=None, t=None):
        return -(x - self.mean[level, None]) / self.variance[level, None]


class LinearCritic(torch.nn.Module):
    """slope_t x + intercept_t: the family that holds the exact critic."""

    def __init__(self, num_layers):
        super().__init__()
        self.slope = torch.nn.Parameter(-torch.ones(num_layers, dtype=torch.float64))
        self.intercept = torch.nn.Parameter(torch.zeros(num_layers, dtype=torch.float64))

    def forward(self, x, level, condition=None, t=None):
        return self.slope[level, None] * x + self.intercept[level, None]


def linear_layers():
    return LinearLayers(scale=[0.8, 0.5, -0.7], shift=[0.3, -0.5, 1.0], std=[0.4, 0.6, 0.9])


def matching_bridge(layers):
    """The bridge that the layers fit exactly."""
    mean, variance = layers.marginals()
    return GaussianBridge(mean.detach()[:-1], variance.detach()[:-1])


class AffineLayer(torch.nn.Module):
    """N(scale x_next + shift, std^2): one layer of `LinearLayers`, with parameters of its own."""

    def __init__(self, scale, shift, std):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shift = torch.nn.Parameter(torch.tensor(shift, dtype=torch.float64))
        self.std = torch.tensor(std, dtype=torch.float64)

    def forward(self, x_next):
        return DiagonalGaussian(mean=self.scale * x_next + self.shift, std=self.std)


def independent_layers(std=(0.9, 0.9, 0.9)):
    """The layers of `linear_layers()`, each with parameters of its own, and as wide as the lower bound likes them."""
    layers = linear_layers()
    scale, shift = layers.scale.tolist(), layers.shift.tolist()
    return IndependentLayers([AffineLayer(*of) for of in zip(scale, shift, std, strict=True)])


def marginals_of(layers):
    """Mean and variance of each coordinate of x_0, ..., x_T of independent affine layers."""
    numbers = [
        [float(getattr(layer, name).detach()) for layer in layers.networks] for name in ("scale", "shift", "std")
    ]
    return LinearLayers(*numbers).marginals()
