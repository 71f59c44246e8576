import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal

from hsivi_diffusers.vi import (
    Bridge,
    DiagonalGaussian,
    DiffusionBridge,
    GeometricBridge,
    IsotropicNormal,
    ScoreMLP,
    ScoreTarget,
    as_target,
)
from scenarios import linear_layers, matching_bridge
from training.benchmarks.inference.targets.plane import Banana, GaussianMixture


def test_a_bridge_without_a_clock_of_its_own_counts_layers():
    bridge = matching_bridge(linear_layers())
    t = torch.tensor([2, 0, 1])
    assert torch.equal(bridge.level(t), t)


def test_a_bridge_with_layers_alone_has_no_random_levels():
    bridge = matching_bridge(linear_layers())
    with pytest.raises(NotImplementedError, match='scoring="own"'):
        bridge.sample_level(torch.zeros(3))
    q = DiagonalGaussian(torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(NotImplementedError, match="GaussianBridge cannot re-noise"):
        bridge.place(q, torch.zeros(2), torch.zeros(2), torch.zeros(2, 3))


def test_a_bridge_without_a_log_density_says_what_to_use():
    with pytest.raises(
        NotImplementedError, match=r"GaussianBridge has no log-density: use LowerBound\(surrogate=True\)"
    ):
        Bridge.log_prob(matching_bridge(linear_layers()), torch.zeros(2, 3), torch.zeros(2))


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


@pytest.mark.parametrize("make", [geometric, diffusion, flow])
def test_levels_rise_from_the_target_to_the_base(make):
    bridge = make(5)
    level = bridge.level(torch.arange(5))
    assert bool((level.diff() > 0).all())
    assert bool((level < 1).all())
    assert bridge.level(torch.tensor([3, 0])).tolist() == [level[3], level[0]]


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
@settings(deadline=None, max_examples=25)
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
@settings(deadline=None, max_examples=25)
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
@settings(deadline=None, max_examples=25)
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


def test_towards_sigma_one_a_diffusion_bridge_tends_to_the_standard_normal():
    bridge, x = diffusion(), points()
    normal = IsotropicNormal(2)
    gaps = []
    for level in (0.9, 0.99, 0.999, 0.999999):
        levels = torch.full((16,), level, dtype=torch.float64)
        gaps.append(float((bridge.score(x, levels) - normal.score(x)).abs().max()))
        last = bridge.log_prob(x, levels)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.01
    torch.testing.assert_close(last, normal.log_prob(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [geometric, diffusion, flow])
def test_a_bridge_has_a_layer(make):
    with pytest.raises(ValueError, match="num_layers=0: a hierarchy has at least 1 layer"):
        make(0)


def test_target_and_base_must_have_one_dimension():
    with pytest.raises(ValueError, match="the base has 3 dimensions, the target 2"):
        GeometricBridge(mixture(), 2, base=IsotropicNormal(3))


def test_a_diffusion_bridge_needs_a_diffused_law_or_a_network():
    with pytest.raises(ValueError, match="Banana is not known: .*score_network.*or take a GeometricBridge"):
        DiffusionBridge(Banana(), 3)
    with pytest.raises(ValueError, match="a NoneType is not known"):
        DiffusionBridge(None, 3)
    with pytest.raises(ValueError, match="dimension is missing"):
        DiffusionBridge(None, 3, score_network=ScoreMLP(2))
    with pytest.raises(ValueError, match="dimension=3, and the target has 2: leave it out"):
        DiffusionBridge(mixture(), 3, dimension=3)
    with pytest.raises(ValueError, match="path='straight' is unknown: choose 'variance preserving' or 'flow'"):
        DiffusionBridge(mixture(), 3, path="straight")


def test_a_score_network_stands_in_for_the_target_is_frozen_and_has_no_log_density():
    network, x, level = ScoreMLP(2, width=8), torch.randn(4, 2), torch.rand(4)
    bridge = DiffusionBridge(None, 3, score_network=network, dimension=2)
    assert torch.equal(bridge.score(x, level), network(x, level))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert bridge.sample_base(5).shape == (5, 2)
    for target in (None, mixture()):
        with pytest.raises(NotImplementedError, match=r"no log-density: use LowerBound\(surrogate=True\) or a critic"):
            DiffusionBridge(target, 3, score_network=network, dimension=2).log_prob(x, level)


def test_a_score_network_may_be_a_function_that_sees_the_condition():
    bridge = DiffusionBridge(None, 3, score_network=lambda x, level, condition: condition[:, None] - x, dimension=2)
    score = bridge.score(torch.zeros(2, 2), torch.rand(2), torch.tensor([1.0, 2.0]))
    assert score.tolist() == [[1, 1], [2, 2]]


def test_a_score_alone_has_no_geometric_log_density_and_the_error_tells_what_to_do():
    bridge = GeometricBridge(ScoreTarget(lambda x: -x, 2), 2)
    level = bridge.level(torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(bridge.score(torch.ones(3, 2), level), -torch.ones(3, 2))
    with pytest.raises(NotImplementedError, match=r"LowerBound\(surrogate=True\)"):
        bridge.log_prob(torch.ones(3, 2), level)
