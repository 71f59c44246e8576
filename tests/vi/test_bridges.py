import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal

from hsivi_diffusers.vi.bridges import Bridge, DiffusionBridge, GeometricBridge
from hsivi_diffusers.vi.networks import ScoreMLP
from hsivi_diffusers.vi.targets import IsotropicNormal, ScoreTarget, as_target
from scenarios import linear_layers, matching_bridge
from training.benchmarks.inference.targets.plane import Banana, GaussianMixture

# ----- bridges to a target -----


def mixture(dtype=torch.float64):
    """Two Gaussians of different weight, shape and place."""
    means = torch.tensor([[1.5, -0.5], [-1.0, 1.0]], dtype=dtype)
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]], dtype=dtype)
    return GaussianMixture(means, covariances, torch.tensor([0.3, 0.7], dtype=dtype))


def geometric(num_layers=4):
    return GeometricBridge(mixture(), num_layers)


def diffusion(num_layers=4):
    return DiffusionBridge(mixture(), num_layers)


def flow(num_layers=4):
    return DiffusionBridge(mixture(), num_layers, path="flow")


def points(size=16):
    return 2 * torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("make", [geometric, diffusion, flow])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_lowest_level_is_the_target_bit_for_bit(make, num_layers):
    bridge, x = make(num_layers), points()
    level = bridge.level(torch.zeros(16, dtype=torch.long))
    assert torch.equal(level, torch.zeros(16))
    assert torch.equal(bridge.log_prob(x, level), bridge.target.log_prob(x))
    assert torch.equal(bridge.score(x, level), bridge.target.score(x))


def test_the_usual_schedules_are_even_in_lambda_and_in_angle():
    for bridge in (geometric(), flow()):
        torch.testing.assert_close(bridge.level(torch.arange(4)), torch.tensor([0, 0.25, 0.5, 0.75]))
    angle = torch.arange(4) * torch.pi / 8
    torch.testing.assert_close(diffusion().level(torch.arange(4)), angle.sin())


def test_at_lambda_zero_a_geometric_bridge_is_its_base():
    base = IsotropicNormal(2, std=1.7)
    bridge, x = GeometricBridge(mixture(), 3, base=base), points()
    level = torch.ones(16)
    torch.testing.assert_close(bridge.log_prob(x, level), base.log_prob(x))
    torch.testing.assert_close(bridge.score(x, level), base.score(x))
    draws = bridge.sample_base(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.std(0), torch.full((2,), 1.7), rtol=0.03, atol=0)


@given(level=st.floats(0, 1), std=st.floats(0.3, 3), shift=st.floats(-2, 2))
@settings(max_examples=25)
def test_the_geometric_mean_of_gaussians_is_the_gaussian_of_the_mixed_precisions(level, std, shift):
    means, stds = (torch.full((2,), number, dtype=torch.float64) for number in (shift, std))
    target = as_target(Independent(Normal(means, stds), 1))
    bridge, x = GeometricBridge(target, 2), points()
    precision = level + (1 - level) / std**2
    mean = (1 - level) * shift / std**2 / precision
    levels = torch.full((16,), level, dtype=torch.float64)
    torch.testing.assert_close(bridge.score(x, levels), (mean - x) * precision)
    log_density = -0.5 * precision * (x - mean).square().sum(1)
    difference = bridge.log_prob(x, levels) - log_density
    torch.testing.assert_close(difference, difference[:1].expand(16))


@pytest.mark.parametrize("path", ["variance preserving", "flow"])
@given(level=st.floats(0, 0.99))
@settings(max_examples=25)
def test_a_diffused_gaussian_is_the_gaussian_of_the_scaled_moments(path, level):
    mean, covariance = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[[2.0, 0.5], [0.5, 0.3]]]).double()
    bridge, x = DiffusionBridge(GaussianMixture(mean, covariance), 2, path=path), points()
    alpha = 1 - level if path == "flow" else (1 - level**2) ** 0.5
    law = MultivariateNormal(alpha * mean[0], alpha**2 * covariance[0] + level**2 * torch.eye(2).double())
    levels = torch.full((16,), level, dtype=torch.float64)
    torch.testing.assert_close(bridge.log_prob(x, levels), law.log_prob(x))
    torch.testing.assert_close(bridge.score(x, levels), (law.mean - x) @ law.precision_matrix)


@pytest.mark.parametrize("make", [geometric, diffusion, flow])
@given(levels=st.lists(st.floats(0, 0.99), min_size=1, max_size=8))
@settings(max_examples=25)
def test_the_score_is_the_gradient_of_the_log_density_at_every_level(make, levels):
    bridge, level = make(), torch.tensor(levels, dtype=torch.float64)
    x = points(len(levels)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(bridge.log_prob(x, level).sum(), x)
    torch.testing.assert_close(bridge.score(x, level), gradient)


@pytest.mark.parametrize("make", [geometric, diffusion, flow])
def test_rows_at_different_levels_do_not_mix(make):
    bridge, x, level = make(), points(4), torch.tensor([0.0, 0.9, 0.3, 0.0])
    for answer in (bridge.log_prob, bridge.score):
        alone = torch.cat([answer(x[i : i + 1], level[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(answer(x, level), alone)


def test_a_score_network_stands_in_for_the_target_is_frozen_and_has_no_log_density():
    network, x, level = ScoreMLP(2, width=8), torch.randn(4, 2), torch.rand(4)
    bridge = DiffusionBridge(None, 3, score_network=network, dimension=2)
    assert torch.equal(bridge.score(x, level), network(x, level))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert bridge.sample_base(5).shape == (5, 2)


def test_a_score_network_may_be_a_function_that_sees_the_condition():
    bridge = DiffusionBridge(None, 3, score_network=lambda x, level, condition: condition[:, None] - x, dimension=2)
    score = bridge.score(torch.zeros(2, 2), torch.rand(2), torch.tensor([1.0, 2.0]))
    assert score.tolist() == [[1, 1], [2, 2]]


X, ZEROS, NO_DENSITY = torch.zeros(2, 2), torch.zeros(2), r"no log-density: use LowerBound\(surrogate=True\)"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: geometric(0), "num_layers=0: a hierarchy has at least 1 layer"),
        (lambda: diffusion(0), "num_layers=0: a hierarchy has at least 1 layer"),
        (lambda: GeometricBridge(mixture(), 2, IsotropicNormal(3)), "the base has 3 dimensions, the target 2"),
        (lambda: DiffusionBridge(Banana(), 3), "Banana is not known: .*score_network.*or take a GeometricBridge"),
        (lambda: DiffusionBridge(None, 3), "a NoneType is not known"),
        (lambda: DiffusionBridge(None, 3, ScoreMLP(2)), "dimension is missing"),
        (lambda: DiffusionBridge(mixture(), 3, dimension=3), "dimension=3, and the target has 2: leave it out"),
        (lambda: DiffusionBridge(mixture(), 3, path="straight"), "path='straight' is unknown: choose 'variance"),
        (lambda: matching_bridge(linear_layers()).sample_level(ZEROS), 'has no random levels: use scoring="own"'),
        (lambda: matching_bridge(linear_layers()).place(None, ZEROS, ZEROS, X), "GaussianBridge cannot re-noise"),
        (lambda: Bridge.log_prob(diffusion(), X, ZEROS), "has no log-density: use LowerBound"),
        (lambda: GeometricBridge(ScoreTarget(lambda x: -x, 2), 2).log_prob(X, ZEROS), NO_DENSITY),
        (lambda: DiffusionBridge(None, 3, ScoreMLP(2), 2).log_prob(X, ZEROS), NO_DENSITY),
        (lambda: DiffusionBridge(mixture(), 3, ScoreMLP(2)).log_prob(X, ZEROS), NO_DENSITY),
    ],
)
def test_what_a_bridge_cannot_do_is_refused_with_what_to_use(act, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        act()
