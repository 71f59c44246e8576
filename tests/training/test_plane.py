import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from hsivi_diffusers.vi.targets import gradient
from training.benchmarks.inference.targets.plane import (
    Banana,
    Checkerboard,
    GaussianMixture,
    circles,
    cross,
    ring,
    swiss_roll,
)


def tilted():
    """A mixture of three unequal Gaussians in three dimensions."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    means = 2 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    return GaussianMixture(means, covariances, torch.tensor([1.0, 2.0, 5.0]))


NAMED = {"checkerboard": Checkerboard(), "swiss_roll": swiss_roll(), "circles": circles()}
NAMED |= {"ring": ring(), "cross": cross(), "banana": Banana()}
EXTENT = {"checkerboard": 5, "swiss_roll": 6, "circles": 6, "ring": 7, "cross": 10}  # as far as the densities go

# One of each class, of mixtures the most general.
every_diffusible = pytest.mark.parametrize("target", [Checkerboard(), tilted()])
every_class = pytest.mark.parametrize("target", [Checkerboard(), circles(), tilted(), Banana()])

coordinates = st.lists(st.floats(-20, 20), min_size=3, max_size=3)
levels = st.tuples(st.floats(0.01, 1.5), st.floats(0, 3))


def grid(extent, num_points=201):
    """Midpoints of a grid on [-extent, extent]^2, and the area around each."""
    edges = torch.linspace(-extent, extent, num_points + 1, dtype=torch.float64)
    axis = (edges[1:] + edges[:-1]) / 2
    return torch.cartesian_prod(axis, axis), float(edges[1] - edges[0]) ** 2


@every_class
@given(point=coordinates)
@settings(max_examples=40)
def test_the_score_is_the_gradient_of_the_log_density(target, point):
    x = torch.tensor([point[: target.dimension]], dtype=torch.float64)
    torch.testing.assert_close(target.score(x), gradient(target.log_prob, x), rtol=1e-6, atol=1e-8)


@every_diffusible
@given(rows=st.lists(st.tuples(coordinates, levels), min_size=1, max_size=4))
@settings(max_examples=40)
def test_so_it_is_for_rows_at_levels_of_their_own_and_each_row_is_as_if_alone(target, rows):
    points, at = zip(*rows, strict=True)
    x = torch.tensor(points, dtype=torch.float64)[:, : target.dimension]
    alpha, sigma = torch.tensor(at, dtype=torch.float64).unbind(1)
    score = target.diffused_score(x, alpha, sigma)
    expected = gradient(lambda x: target.diffused_log_prob(x, alpha, sigma), x)
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-8)
    for row in range(len(x)):
        one = slice(row, row + 1)
        torch.testing.assert_close(target.diffused_score(x[one], alpha[one], sigma[one]), score[one])


@every_diffusible
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.5), (0.6, 0.8), (0.1, 1.0)])
def test_the_diffused_law_is_that_of_scaled_draws_with_noise(target, alpha, sigma):
    centres = target.sample(40_000, torch.Generator().manual_seed(1)).double() * alpha
    x = centres[:40] + sigma * torch.randn(40, target.dimension, dtype=torch.float64)
    kernel = -0.5 * torch.cdist(x, centres).square() / sigma**2
    kernel = kernel.exp() / (2 * math.pi * sigma**2) ** (target.dimension / 2)
    error = kernel.std(1) / math.sqrt(len(centres))
    rows = torch.ones(40, dtype=torch.float64)
    density = target.diffused_log_prob(x, alpha * rows, sigma * rows).exp()
    assert ((density - kernel.mean(1)).abs() / error).max() < 5


def test_the_density_of_the_banana_integrates_to_one():
    x, area = grid(30, 601)
    assert float(Banana().log_prob(x).exp().sum() * area) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", [*EXTENT, "banana"])
def test_draws_fill_the_boxes_of_a_histogram_as_the_density_says(name):
    target, extent, boxes, size = NAMED[name], EXTENT.get(name, 10), 20, 20_000
    x, area = grid(extent, 8 * boxes)
    mass = (target.log_prob(x).exp() * area).reshape(boxes, 8, boxes, 8).sum((1, 3))
    draws = target.sample(size, torch.Generator().manual_seed(2))
    index = ((draws + extent) / (2 * extent) * boxes).floor().long()
    index = index[((index >= 0) & (index < boxes)).all(1)]
    counts = torch.bincount(index[:, 0] * boxes + index[:, 1], minlength=boxes**2).reshape(boxes, boxes)
    expected = size * mass
    full = expected > 5
    chi_square = ((counts - expected)[full].square() / expected[full]).sum()
    degrees = int(full.sum())
    assert abs(float(chi_square) - degrees) < 5 * math.sqrt(2 * degrees)
    assert counts[~full].sum() < expected[~full].sum() + 5 * (expected[~full].sum() + 1).sqrt()


def test_a_mixture_is_that_of_torch_with_its_moments():
    target = tilted()
    components = MultivariateNormal(target.modes, covariance_matrix=target.covariances)
    expected = MixtureSameFamily(Categorical(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)), components)
    x = torch.randn(9, 3, dtype=torch.float64)
    torch.testing.assert_close(target.log_prob(x), expected.log_prob(x))
    draws = target.sample(50_000, torch.Generator().manual_seed(0))
    error = (expected.variance / len(draws)).sqrt()
    assert ((draws.mean(0) - expected.mean).abs() / error).max() < 5
    torch.testing.assert_close(draws.var(0), expected.variance, rtol=0.05, atol=0)


@every_class
def test_one_seed_gives_one_draw_and_precision_is_that_of_x(target):
    first, second = (target.sample(10, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (10, target.dimension)
    assert first.dtype == target.modes.dtype
    assert not torch.equal(first, target.sample(10))
    x = torch.randn(7, target.dimension, dtype=torch.float64)
    for function in (target.log_prob, target.score):
        assert function(x).dtype == torch.float64
        assert function(x.float()).dtype == torch.float32
        torch.testing.assert_close(function(x.float()).double(), function(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["checkerboard", "circles"])
def test_far_outside_and_on_the_edges_two_derivatives_are_finite(name, dtype):
    target = NAMED[name]
    axis = torch.cat([torch.linspace(-20, 20, 21), torch.linspace(-4.1, 4.1, 20)])
    x = torch.cartesian_prod(axis, axis).to(dtype).requires_grad_(True)
    for alpha, sigma in [(1.0, 0.0), (0.8, 0.6), (1e-3, 1.0)]:
        rows = torch.ones(len(x), dtype=dtype)
        log_prob = target.diffused_log_prob(x, alpha * rows, sigma * rows)
        slow = torch.autograd.grad(log_prob.sum(), x, create_graph=True)[0]
        fast = target.diffused_score(x, alpha * rows, sigma * rows)
        curvatures = [torch.autograd.grad(score.sum(), x)[0] for score in (slow, fast)]
        for value in (log_prob, slow, fast, *curvatures):
            assert value.isfinite().all()


def test_second_derivatives_of_the_checkerboard_are_those_of_its_log_density():
    x = 8 * torch.rand(200, 2, dtype=torch.float64) - 4
    x.requires_grad_(True)
    target = Checkerboard()
    slow, fast = (torch.autograd.grad(score.sum(), x)[0] for score in (gradient(target.log_prob, x), target.score(x)))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


def test_each_black_square_has_the_same_mass_and_a_white_one_none():
    target = Checkerboard()
    draws = target.sample(40_000, torch.Generator().manual_seed(0))
    share = torch.bincount(torch.cdist(draws, target.modes).argmin(1), minlength=8) / len(draws)
    assert target.modes.shape == (8, 2)
    assert (share - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 * 7 / 8 / len(draws))
    torch.testing.assert_close(target.log_prob(target.modes.double()).exp(), torch.full((8,), 1 / 32).double())
    assert target.log_prob(-target.modes.double() * torch.tensor([1, -1])).max() < -10


@pytest.mark.parametrize("name", ["circles", "swiss_roll"])
def test_a_chain_of_gaussians_is_a_smooth_curve_in_about_the_usual_square(name):
    target = NAMED[name]
    steps = torch.cdist(target.modes, target.modes).fill_diagonal_(torch.inf).min(1).values
    assert len(target.modes) <= 100
    assert steps.max() - steps.min() < 0.03
    between = target.modes[10:12].double()
    ridge = torch.lerp(*between, torch.linspace(0, 1, 20, dtype=torch.float64)[:, None])
    assert target.log_prob(ridge).diff().abs().max() < 0.005
    assert (target.sample(2000, torch.Generator().manual_seed(0)).abs() < 5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.eye(2)[None]), r"means \(2,\).*: give the shapes \(M, d\), \(M, d, d\) and \(M,\)"),
        ((torch.zeros(2, 2), torch.eye(2)), r"covariances \(2, 2\).*: give the shapes"),
        ((torch.zeros(1, 2), torch.eye(2)[None], torch.ones(2)), r"weights \(2,\): give the shapes"),
        ((torch.zeros(2, 1), torch.ones(2, 1, 1), torch.tensor([2.0, -1.0])), r"weights \[2.0, -1.0\]: give finite"),
        ((torch.zeros(2, 1), torch.ones(2, 1, 1), torch.zeros(2)), "with a sum > 0"),
        ((torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])), "covariance 0 has the eigenvalue -1: all must"),
        ((torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "not symmetric: give"),
    ],
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)
