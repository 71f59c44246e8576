import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_diffusers.vi import LogProbTarget, as_target
from training.benchmarks.inference.agreement import (
    compare,
    compare_moments,
    js_divergence,
    ksd,
    mmd,
    mode_errors,
    moments,
    sliced_wasserstein,
)

CORNERS = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])


def normal(size, dimension=2, seed=1):
    return torch.randn(size, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard(dimension=2):
    zero = torch.zeros(dimension, dtype=torch.float64)
    return as_target(torch.distributions.MultivariateNormal(zero, torch.eye(dimension, dtype=torch.float64)))


def two_modes(gap, weights=(0.5, 0.5)):
    """Unit Gaussians at +- gap on the first axis, with the attribute `modes`."""
    modes = torch.tensor([[gap, 0.0], [-gap, 0.0]], dtype=torch.float64)
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    target = LogProbTarget(
        lambda x: torch.logsumexp(log_weights - 0.5 * (x[:, None] - modes).square().sum(2), 1), dimension=2
    )
    target.modes = modes
    return target


def test_js_is_the_formula_with_a_cell_of_its_own_for_draws_outside_the_bounds():
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    one, other = (torch.tensor([[0.1, 0.1]] * n + [[0.9, 0.1]] * (4 - n)) for n in (3, 1))
    m = (p + q) / 2
    expected = float(0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum())
    assert js_divergence(one, other) == pytest.approx(expected, rel=1e-6)
    x = torch.rand(500, 2)
    assert js_divergence(x, x) == 0
    assert js_divergence(0.4 * x, 0.6 + 0.4 * x) == pytest.approx(math.log(2))
    assert js_divergence(x + 5, x) == pytest.approx(math.log(2))
    # Cells are halved, and the overflow has 1/2 against 0: the divergence of (1, 0) and (1/2, 1/2).
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert js_divergence(torch.cat([x, x + 5]), x) == pytest.approx(expected)


@pytest.mark.parametrize("dimension", [2, 10])
def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension(dimension):
    x = normal(500, dimension)
    shift = torch.full((dimension,), 1.5)
    expected = float(shift.norm()) / math.sqrt(dimension)
    assert sliced_wasserstein(x, x + shift) == pytest.approx(expected, rel=0.06)
    assert sliced_wasserstein(x, x) == pytest.approx(0, abs=1e-9)


def test_mmd_is_unbiased():
    values = torch.tensor([mmd(normal(60, seed=2 * k), normal(50, seed=2 * k + 1)) for k in range(300)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(300)
    assert bool((values < 0).any())


@pytest.mark.parametrize("dimension", [1, 2])
def test_mmd_of_gaussians_is_the_closed_form(dimension):
    shift, sd = 1.0, 1.5

    def mean_kernel(h, variance, distance):
        return (h**2 / (h**2 + variance)) ** (dimension / 2) * math.exp(-(distance**2) / (2 * (h**2 + variance)))

    values, expected = [], []
    for k in range(8):
        reference = shift + sd * normal(1000, dimension, 50 + k)
        h = float(torch.pdist(reference).median())
        far = mean_kernel(h, 1 + sd**2, shift * math.sqrt(dimension))
        expected.append(mean_kernel(h, 2, 0) + mean_kernel(h, 2 * sd**2, 0) - 2 * far)
        values.append(mmd(normal(1000, dimension, k), reference))
    assert sum(values) == pytest.approx(sum(expected), rel=0.05)


def test_ksd_is_the_sum_of_derivatives_that_its_docstring_gives():
    x = normal(5, 3)
    score = standard(3).score(x)

    def kernel(a, b):
        return (1 + (a - b).square().sum()) ** -0.5

    def stein(a, b, score_a, score_b):
        by_a, by_b = torch.autograd.functional.jacobian(kernel, (a, b))
        mixed = torch.autograd.functional.hessian(kernel, (a, b))[0][1]
        return float(kernel(a, b) * score_a @ score_b + score_a @ by_b + score_b @ by_a + mixed.trace())

    total = sum(stein(x[i], x[j], score[i], score[j]) for i in range(5) for j in range(5))
    assert ksd(x, standard(3)) == pytest.approx(math.sqrt(total / 25))


def test_modes_have_the_shares_of_the_nearest():
    counts = [5, 3, 2, 0]
    draws = CORNERS.repeat_interleave(torch.tensor(counts), dim=0) + 0.5
    errors = mode_errors(draws, CORNERS)
    assert errors == pytest.approx({"modes_found": 3, "mode_tv": 0.3, "mode_max_error": 1.0})
    exact = mode_errors(draws, CORNERS[:3], weights=torch.tensor([5.0, 3.0, 2.0]))
    assert exact == pytest.approx({"modes_found": 3, "mode_tv": 0, "mode_max_error": 0}, abs=1e-12)


@given(st.floats(-2, 2), st.floats(0.2, 3))
@settings(max_examples=20)
def test_moments_of_a_shifted_and_scaled_copy_are_known(shift, scale):
    x = normal(200, 3) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.1]], dtype=torch.float64)
    mean, covariance = x.mean(0), torch.cov(x.T)
    sd = covariance.diagonal().sqrt()
    moved = mean + scale * (x - mean) + shift * sd * torch.tensor([1.0, -0.5, 0.0])
    expected = {
        "mean_error": abs(shift),
        "mean_error_rms": abs(shift) * math.sqrt(1.25 / 3),
        "sd_ratio_min": scale,
        "sd_ratio_max": scale,
        "covariance_error": abs(scale**2 - 1),
    }
    assert moments(moved, mean, covariance) == pytest.approx(expected, abs=1e-9)


def test_compare_has_what_applies_and_a_floor():
    target = two_modes(3.0)
    side = torch.sign(normal(4000, 1, seed=5)) * target.modes[0]
    draws = normal(4000) + side
    floor = compare(draws[:2000], draws[2000:], target)
    assert set(floor) == {"js", "swd", "mmd", "ksd", "modes_found", "mode_tv", "mode_max_error"}
    wrong = compare(draws[:2000] * 1.5, draws[2000:], target)
    assert all(wrong[name] > 1.5 * floor[name] for name in ("js", "swd", "mmd", "ksd"))
    assert floor["modes_found"] == 2
    assert set(compare(normal(100, 3), normal(100, 3, 2), standard(3))) == {"swd", "mmd", "ksd"}
    target.modes = torch.zeros(2, 2)
    assert set(compare(normal(100), normal(100, 2, 2), target)) == {"js", "swd", "mmd", "ksd"}


def test_compare_moments_measures_in_units_of_the_reference():
    sd = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    target = as_target(torch.distributions.MultivariateNormal(torch.zeros(3).double(), sd.diag().square()))
    x, y = normal(300, 3), normal(300, 3, seed=2)
    scaled = compare_moments(x * sd, torch.zeros(3), sd.diag().square(), y * sd, target)
    plain = compare_moments(x, torch.zeros(3), torch.eye(3), y, standard(3))
    names = {"mean_error", "mean_error_rms", "sd_ratio_min", "sd_ratio_max", "swd", "mmd", "ksd"}
    assert names | {"covariance_error"} == set(scaled)
    assert {k: scaled[k] for k in names} == pytest.approx({k: plain[k] for k in names})


def test_draws_that_are_not_finite_are_refused():
    x = normal(10)
    x[3, 1] = float("nan")
    for measure in (js_divergence, sliced_wasserstein, mmd, mode_errors):
        with pytest.raises(ValueError, match="1 of 20 numbers are not finite"):
            measure(x, normal(10))
    with pytest.raises(ValueError, match="not finite"):
        ksd(x, standard())
