import pytest
import torch
from torch.distributions import Bernoulli, HalfCauchy, HalfNormal, Normal, Poisson

from training.benchmarks.inference.posterior_models import (
    EFFECTS,
    ERRORS,
    MODELS,
    eight_schools,
    funnel,
    logistic_data,
    logistic_regression,
    poisson_data,
    poisson_groups,
)

X = torch.randn(6, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def constrained(model):
    return model.target.constrain(X[:, : model.target.dimension])


def same_up_to_a_constant(one, other):
    torch.testing.assert_close(one - one[0], other - other[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_posterior_is_finite_with_its_score_and_its_quantities(name):
    model = MODELS[name]()
    x = X[:, : model.target.dimension]
    assert bool(model.target.score(x).isfinite().all())
    quantities = model.quantities(model.target.constrain(x))
    assert quantities.shape == (6, model.target.dimension)
    assert bool(quantities.isfinite().all())


def test_the_schools_have_the_density_of_the_distributions_of_torch():
    model = eight_schools(centred=True)
    of = constrained(model)
    expected = Normal(0, 5).log_prob(of["mu"]) + HalfCauchy(5).log_prob(of["tau"])
    expected = expected + Normal(of["mu"][:, None], of["tau"][:, None]).log_prob(of["theta"]).sum(1)
    expected = expected + Normal(of["theta"], ERRORS).log_prob(EFFECTS).sum(1) + of["tau"].log()
    same_up_to_a_constant(model.target.log_prob(X[:, :10]), expected)


def test_both_forms_of_the_schools_are_one_posterior_with_the_same_quantities():
    centred, other = eight_schools(centred=True), eight_schools(centred=False)
    of = constrained(other)
    theta = of["mu"][:, None] + of["tau"][:, None] * of["eta"]
    moved = {"mu": of["mu"], "tau": of["tau"], "theta": theta}
    jacobian = 8 * of["tau"].log()  # of theta in eta
    x = centred.target.unconstrain(moved)
    same_up_to_a_constant(centred.target.log_prob(x) + jacobian, other.target.log_prob(X[:, :10]))
    torch.testing.assert_close(centred.quantities(moved), other.quantities(of))


def test_the_exact_draws_of_the_schools_have_the_moments_of_their_density():
    """By Stein's identity: E S_k(x) = 0 and E[-(x_k - E x_k) S_k(x)] = 1."""
    for centred in (True, False):
        model = eight_schools(centred)
        x = model.target.unconstrain(model.exact(40_000, torch.Generator().manual_seed(0))).double()
        for terms in (score := model.target.score(x), 1 + (x - x.mean(0)) * score):
            error = terms.std(0) / len(x) ** 0.5
            assert bool((terms.mean(0).abs() < 4.5 * error).all())


def test_the_logistic_regression_has_the_density_of_the_distributions_of_torch():
    features, labels = (part.double() for part in logistic_data())
    of = constrained(logistic_regression())
    logits = of["a"][:, None] + of["b"] @ features.T
    expected = Bernoulli(logits=logits).log_prob(labels).sum(1)
    expected = expected + Normal(0, 5).log_prob(of["a"]) + Normal(0, 2.5).log_prob(of["b"]).sum(1)
    same_up_to_a_constant(logistic_regression().target.log_prob(X[:, :6]), expected)
    assert 10 < float(labels.sum()) < 50


def test_the_regression_of_counts_has_the_density_of_the_distributions_of_torch():
    features, group, counts = poisson_data()
    of = constrained(poisson_groups())
    effects = of["sigma"][:, None] * of["z"].repeat(1, 4)
    assert group.tolist() == [*range(10)] * 4
    rates = (of["a"][:, None] + of["b"] @ features.double().T + effects).exp()
    expected = Poisson(rates).log_prob(counts.double()).sum(1)
    expected = expected + Normal(0, 2).log_prob(of["a"]) + Normal(0, 2).log_prob(of["b"]).sum(1)
    expected = expected + HalfNormal(1).log_prob(of["sigma"]) + Normal(0, 1).log_prob(of["z"]).sum(1)
    same_up_to_a_constant(poisson_groups().target.log_prob(X), expected + of["sigma"].log())


def test_the_funnel_has_the_density_and_the_exact_draws_of_its_definition():
    model = funnel()
    v, z = X[:, 0], X[:, 1:10]
    expected = Normal(0, 3).log_prob(v) + Normal(0, (v / 2).exp()[:, None]).log_prob(z).sum(1)
    same_up_to_a_constant(model.target.log_prob(X[:, :10]), expected)
    exact = model.exact(20_000, torch.Generator().manual_seed(0))
    assert float(exact["v"].std()) == pytest.approx(3, rel=0.03)
    standard = exact["z"] / (exact["v"] / 2).exp()[:, None]
    assert float(standard.std()) == pytest.approx(1, rel=0.01)
    torch.testing.assert_close(model.quantities(exact)[:, 1:].sinh(), exact["z"], rtol=1e-3, atol=1e-4)
