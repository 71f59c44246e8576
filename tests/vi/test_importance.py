import math

import pytest
import torch
from torch.distributions import Normal

from hsivi_diffusers.vi.importance import effective_sample_size, log_density, pareto_k
from scenarios import LinearLayers, linear_layers, matching_bridge


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def law(layers):
    mean, variance = (moment.detach()[0] for moment in layers.marginals())
    return Normal(mean, variance.sqrt())


def points(layers):
    """Six points about the mean of the law."""
    noise = torch.randn(6, 3, generator=seeded(0), dtype=torch.float64)
    return law(layers).mean + 0.7 * law(layers).stddev * noise


def exact(layers):
    return law(layers).log_prob(points(layers)).sum(1)


@pytest.fixture(params=[1, 3])
def layers(request):
    """Gaussian layers whose marginals are known, T = 1 and T = 3."""
    return LinearLayers(scale=[0.8], shift=[0.3], std=[0.6]) if request.param == 1 else linear_layers()


def estimates(layers, num_inputs, repeats):
    bridge = matching_bridge(layers)
    return torch.stack(
        [log_density(layers, bridge, points(layers), num_inputs, seeded(seed)) for seed in range(repeats)]
    )


def test_the_estimate_converges_to_the_closed_form(layers):
    errors = [(estimates(layers, size, 3) - exact(layers)).abs().mean() for size in (100, 20_000)]
    assert float(errors[1]) < 0.03
    assert float(errors[0]) > 3 * float(errors[1])


def test_its_density_is_unbiased_and_its_logarithm_too_low_by_the_gap_of_the_docstring(layers):
    log_q, truth = estimates(layers, 50, 500), exact(layers)
    ratio = (log_q - truth).exp()
    error = ratio.std(0) / len(ratio) ** 0.5
    assert bool(((ratio.mean(0) - 1).abs() < 4 * error).all())
    low = (truth - log_q).mean(1)
    assert float(low.mean()) > 4 * float(low.std()) / len(low) ** 0.5
    assert float(low.mean()) == pytest.approx(float(ratio.var(0).mean()) / 2, rel=0.35)


def test_rows_are_estimated_one_by_one_however_many(layers, monkeypatch):
    whole = estimates(layers, 40, 1)
    monkeypatch.setattr("hsivi_diffusers.vi.importance.ROWS", 4)
    torch.testing.assert_close(estimates(layers, 40, 1), whole)
    assert not whole.requires_grad


def test_a_layer_that_ignores_its_input_has_an_exact_density():
    layers = LinearLayers(scale=[0.0], shift=[0.7], std=[2.0])
    torch.testing.assert_close(estimates(layers, 1, 1)[0], exact(layers))


def test_the_effective_sample_size_is_that_of_the_formula():
    weights = torch.tensor([1.0, 2.0, 5.0])
    assert effective_sample_size(weights.log() + 1000) == pytest.approx(64 / 30, rel=1e-4)
    assert effective_sample_size(torch.zeros(17)) == pytest.approx(17)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9, 1.5])
def test_pareto_weights_have_the_k_of_their_law(k):
    """P(w > t) = t^(-1/k), the prior counts as 10 of 280, and the error of k is about (1 + k) / 270^(1/2) a set."""
    sets = torch.rand(10, 8100, generator=seeded(1), dtype=torch.float64)
    found = sum(pareto_k(-k * each.log() + 300) for each in sets) / 10
    assert found == pytest.approx((270 * k + 10 * 0.5) / 280, abs=3 * (1 + k) / 2700**0.5)


def test_a_sampler_that_is_too_narrow_has_a_large_k():
    """q = N(0, s^2) and p = N(0, 1): w has 1 / (1 - s^2) moments."""
    found = {}
    for sd in (0.3, 1.0, 1.2):
        x = sd * torch.randn(20_000, generator=seeded(2), dtype=torch.float64)
        found[sd] = pareto_k(-0.5 * x.square() + 0.5 * (x / sd).square())
    assert found[0.3] > 0.6
    assert found[1.2] < 0.3
    assert found[1.0] == -math.inf


def test_a_single_weight_that_has_it_all_has_an_infinite_k():
    log_weights = torch.zeros(100)
    log_weights[3] = 2000
    assert pareto_k(log_weights) == math.inf
    assert effective_sample_size(log_weights) == pytest.approx(1)


@pytest.mark.parametrize("size", [25, 200, 3000])
def test_k_is_that_of_arviz(size):
    arviz = pytest.importorskip("arviz")
    log_weights = torch.randn(size, generator=seeded(size), dtype=torch.float64)
    assert pareto_k(log_weights) == pytest.approx(float(arviz.psislw(log_weights.numpy())[1]), rel=1e-6)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_no_good_fit(odd):
    log_weights = torch.randn(1000)
    log_weights[0] = -float("inf")  # the density may be 0 there
    assert pareto_k(log_weights) < 0.7
    log_weights[1] = odd
    assert pareto_k(log_weights) == float("inf")
    assert pareto_k(torch.full((30,), -float("inf"))) == float("inf")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: estimates(linear_layers(), 0, 1), "num_inputs=0: give 1 input"),
        (lambda: pareto_k(torch.zeros(24)), "24 weights have no tail to look at: give 25 or more"),
    ],
)
def test_what_cannot_be_estimated_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
