import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal, Poisson

from hsivi_diffusers.vi.targets import gradient
from training.benchmarks.inference.targets.posteriors import ConditionedDiffusion, LogisticRegression, RareEvents


def regression():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator)
    return LogisticRegression(features, (torch.rand(40, generator=generator) < 0.4).float())


POSTERIORS = {
    "logistic_regression": regression(),
    "conditioned_diffusion": ConditionedDiffusion(),
    "rare_events": RareEvents(),
}
every_posterior = pytest.mark.parametrize("target", POSTERIORS.values(), ids=POSTERIORS)


@every_posterior
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 4))
@settings(max_examples=40)
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
        target, lambda x: Bernoulli(logits=features @ x).log_prob(labels).sum() + Normal(0.0, 1.0).log_prob(x).sum()
    )


def test_conditioned_diffusion_is_a_product_of_steps_and_observations():
    target = ConditionedDiffusion()
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
    target = RareEvents()
    counts, exposures = target.counts.double(), target.exposures.double()
    same_up_to_a_constant(
        target,
        lambda x: (
            Poisson(exposures * x[:-1].exp()).log_prob(counts).sum()
            + Normal(x[-1], 3.0).log_prob(x[:-1]).sum()
            + Normal(0.0, 3.0).log_prob(x[-1])
        ),
    )


def test_the_path_is_simulated_once_and_ends_in_a_well():
    first = ConditionedDiffusion().observations
    torch.manual_seed(9)
    assert torch.equal(first, ConditionedDiffusion().observations)
    assert first.shape == (20,)
    assert first.abs()[5:].mean() > 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, -1]), r"labels hold \[-1, 1\]: give 0 and 1 alone"),
        (torch.ones(1), r"features of shape \(2, 3\) and labels of shape \(1,\): give \(N, d\) and \(N,\)"),
        (torch.ones(2, 1), r"labels of shape \(2, 1\): give \(N, d\) and \(N,\), one label a row"),
    ],
)
def test_labels_that_are_not_one_a_row_or_not_0_and_1_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        LogisticRegression(torch.ones(2, 3), labels)
