from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal

from hsivi_diffusers.vi import LogProbTarget, as_target
from training.benchmarks.inference.posterior_methods import METHODS, QUICK, Settings, fit_gaussian, run_chain

MEAN = torch.tensor([1.0, -2.0])
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]])


def gaussian():
    precision = COVARIANCE.inverse()
    return LogProbTarget(lambda x: -0.5 * ((x - MEAN.to(x)) @ precision.to(x) * (x - MEAN.to(x))).sum(1), 2)


@pytest.mark.parametrize("full_rank", [True, False])
def test_a_gaussian_fit_of_a_gaussian_is_that_of_the_closed_form(full_rank):
    """The best independent one has the variances 1 / precision_ii."""
    fit = fit_gaussian(gaussian(), full_rank, 0, replace(Settings(), gaussian_steps=800, gaussian_rate=0.05))
    best = COVARIANCE if full_rank else (1 / COVARIANCE.inverse().diagonal()).diag()
    torch.testing.assert_close(fit.mean, MEAN, rtol=0, atol=0.05)
    torch.testing.assert_close(fit.scale @ fit.scale.T, best, rtol=0, atol=0.05)
    assert bool(fit.scale[1, 0]) == full_rank


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_as_many_as_it_should_and_one_seed_is_one_fit(method):
    target = as_target(MultivariateNormal(torch.zeros(2), COVARIANCE)) if method != "nuts" else gaussian()
    one, again, other = (METHODS[method](target, seed, QUICK) for seed in (3, 3, 4))
    assert one.x.shape == (QUICK.draws, 2)
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    assert one.notes.keys() == ({"divergences"} if method == "nuts" else {"pareto_k"})


def test_hsivi_fits_in_the_coordinates_of_the_full_rank_fit():
    settings = replace(Settings(), gaussian_steps=500, gaussian_rate=0.05, num_steps=3, draws=4000, base_std=1.0)
    fitted = METHODS["hsivi"](gaussian(), 0, settings)
    torch.testing.assert_close(fitted.x.mean(0), MEAN, rtol=0, atol=0.3)
    assert float(torch.corrcoef(fitted.x.T)[0, 1]) == pytest.approx(0.8, abs=0.15)


def test_nuts_finds_the_moments_of_a_gaussian():
    chain = run_chain(gaussian(), 0, 100, 400)
    torch.testing.assert_close(chain.x.mean(0).float(), MEAN, rtol=0, atol=0.35)
    torch.testing.assert_close(torch.cov(chain.x.T).float(), COVARIANCE, rtol=0, atol=0.5)
    assert chain.notes == {"divergences": 0}


def test_a_fit_that_diverges_is_refused():
    with pytest.raises(ValueError, match="the Gaussian fit diverged"):
        fit_gaussian(LogProbTarget(lambda x: (x.sum(1) * 1e30).exp(), 2), True, 0, QUICK)
