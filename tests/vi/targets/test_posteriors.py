import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal, Poisson

from hsivi_diffusers.vi.targets import (
    ConditionedDiffusion,
    LogisticRegression,
    RareEvents,
    conditioned_diffusion,
    rare_events,
)
from hsivi_diffusers.vi.targets.target import gradient


def regression():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator)
    return LogisticRegression(features, (torch.rand(40, generator=generator) < 0.4).float(), prior_std=2.0)


POSTERIORS = {
    "logistic_regression": regression(),
    "conditioned_diffusion": conditioned_diffusion(),
    "short_path": ConditionedDiffusion(torch.tensor([0.3, -0.2]), every=1, horizon=0.5, drift=2.0, noise_std=0.4),
    "rare_events": rare_events(),
}
every_posterior = pytest.mark.parametrize("target", POSTERIORS.values(), ids=POSTERIORS)


@every_posterior
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 4))
@settings(max_examples=40, deadline=None)
def test_the_score_is_the_gradient_of_the_log_density(target, seed, scale):
    x = scale * torch.randn(3, target.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = gradient(target.log_prob, x)
    torch.testing.assert_close(target.score(x), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(target.score(x[1:2]), expected[1:2], rtol=1e-6, atol=1e-8)


@every_posterior
def test_precision_is_that_of_x_and_second_derivatives_flow(target):
    x = 0.5 * torch.randn(4, target.dimension, dtype=torch.float64)
    for function in (target.log_prob, target.score):
        assert function(x.float()).dtype == torch.float32
        torch.testing.assert_close(function(x.float()).double(), function(x), rtol=1e-3, atol=1e-2)
    x.requires_grad_(True)
    slow, fast = (torch.autograd.grad(score.sum(), x)[0] for score in (gradient(target.log_prob, x), target.score(x)))
    torch.testing.assert_close(fast, slow)


def same_up_to_a_constant(target, expected):
    x = torch.randn(6, target.dimension, dtype=torch.float64)
    difference = target.log_prob(x) - torch.stack([expected(row) for row in x])
    torch.testing.assert_close(difference, difference[:1].expand(6))


def test_logistic_regression_is_bernoulli_times_normal():
    target = regression()
    features, labels = target.features.double(), target.labels.double()
    same_up_to_a_constant(
        target,
        lambda x: Bernoulli(logits=features @ x).log_prob(labels).sum() + Normal(0.0, 2.0).log_prob(x).sum(),
    )


def test_conditioned_diffusion_is_a_product_of_steps_and_observations():
    target = conditioned_diffusion()
    observations = target.observations.double()

    def expected(x):
        before, total = torch.zeros((), dtype=torch.float64), 0
        for k, now in enumerate(x, start=1):
            total = total + Normal(before + 10 * before * (1 - before**2) * 0.01, 0.1).log_prob(now)
            if k % 5 == 0:
                total = total + Normal(now, 0.1).log_prob(observations[k // 5 - 1])
            before = now
        return total

    same_up_to_a_constant(target, expected)


def test_rare_events_is_poisson_times_normal():
    target = rare_events()
    counts, exposures = target.counts.double(), target.exposures.double()
    same_up_to_a_constant(
        target,
        lambda x: (
            Poisson(exposures * x[:-1].exp()).log_prob(counts).sum()
            + Normal(x[-1], 3.0).log_prob(x[:-1]).sum()
            + Normal(0.0, 3.0).log_prob(x[-1])
        ),
    )


def test_the_path_is_simulated_from_the_seed_alone():
    first = conditioned_diffusion(seed=3).observations
    torch.manual_seed(9)
    assert torch.equal(first, conditioned_diffusion(seed=3).observations)
    assert not torch.equal(first, conditioned_diffusion(seed=4).observations)
    assert first.shape == (20,)
    assert first.abs()[5:].mean() > 0.5  # in one of the wells


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LogisticRegression(torch.ones(3, 2), torch.ones(2)),
            r"features of shape \(3, 2\) and labels of shape",
        ),
        (lambda: LogisticRegression(torch.ones(2, 2), torch.tensor([1, -1])), r"labels hold \[-1, 1\]: give 0 and 1"),
        (lambda: LogisticRegression(torch.ones(2, 2), torch.ones(2), prior_std=0), "prior_std is 0: give a number > 0"),
        (lambda: ConditionedDiffusion(torch.ones(0)), r"observations of shape \(0,\): give a vector"),
        (lambda: ConditionedDiffusion(torch.ones(2), every=0), "every is 0: give a number > 0"),
        (lambda: ConditionedDiffusion(torch.ones(2), noise_std=-1.0), "noise_std is -1.0"),
        (lambda: RareEvents(torch.ones(2), torch.ones(3)), "give one number > 0 for each of 2 counts"),
        (lambda: RareEvents(torch.ones(2), torch.tensor([1.0, 0.0])), r"exposures \[1.0, 0.0\]: give one number > 0"),
        (lambda: RareEvents(torch.tensor([1.0, -1.0]), torch.ones(2)), r"counts \[1.0, -1.0\]: give numbers >= 0"),
        (lambda: RareEvents(torch.ones(2, 2), torch.ones(2, 2)), r"counts of shape \(2, 2\): give a vector"),
    ],
)
def test_bad_data_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
