import re

import pytest
import torch
from torch.distributions import (
    Beta,
    Dirichlet,
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    LKJCholesky,
    Normal,
    TransformedDistribution,
    biject_to,
    constraints,
)

from hsivi_diffusers.vi import masses
from hsivi_diffusers.vi.bridges import GeometricBridge
from hsivi_diffusers.vi.inference import Inference
from hsivi_diffusers.vi.parameters import NamedTarget

MIXED = {
    "mu": constraints.real,
    "tau": constraints.positive,
    "theta": (constraints.real, (2, 3)),
    "share": (constraints.simplex, (4,)),
    "rate": (constraints.interval(-1.0, 3.0), (2,)),
}
SHAPES = {"mu": (), "tau": (), "theta": (2, 3), "share": (4,), "rate": (2,)}


def flat(parameters):
    return next(iter(parameters.values())).flatten(1).sum(1)


@pytest.mark.parametrize(
    ("distribution", "shape"),
    [
        (Normal(1.0, 2.0), ()),
        (Gamma(2.0, 3.0), ()),
        (Independent(Exponential(torch.tensor([1.0, 2.0, 0.5])), 1), (3,)),
        (Independent(Beta(torch.full((2, 2), 2.0), 3.0), 2), (2, 2)),
        (Dirichlet(torch.tensor([1.0, 2.0, 3.0])), (3,)),
        (LKJCholesky(3, 2.0), (3, 3)),
    ],
)
def test_the_density_on_the_free_space_is_that_of_the_transformed_distribution(distribution, shape):
    target = NamedTarget(lambda theta: distribution.log_prob(theta["a"]), {"a": (distribution.support, shape)})
    free = TransformedDistribution(distribution, [biject_to(distribution.support).inv])
    x = torch.randn(7, target.dimension)
    expected = free.log_prob(x.reshape(7, *target.parameters["a"].free_shape))
    torch.testing.assert_close(target.log_prob(x), expected, rtol=1e-4, atol=1e-4)


def test_several_parameters_stand_side_by_side_with_the_sum_of_their_jacobians():
    def log_prob(of):
        return of["mu"] + of["theta"].sum((1, 2)) + of["share"][:, 0] * of["rate"].sum(1) / of["tau"]

    target = NamedTarget(log_prob, MIXED)
    assert target.dimension == 1 + 1 + 6 + 3 + 2
    x = torch.randn(5, 13, dtype=torch.float64)
    values = target.constrain(x)
    assert {name: value.shape for name, value in values.items()} == {name: (5, *of) for name, of in SHAPES.items()}
    assert torch.equal(values["mu"], x[:, 0])
    torch.testing.assert_close(values["tau"], x[:, 1].exp())
    assert torch.equal(values["theta"], x[:, 2:8].reshape(5, 2, 3))
    torch.testing.assert_close(values["rate"], -1 + 4 * x[:, 11:].sigmoid())
    share = biject_to(constraints.simplex)
    rate = 4 * x[:, 11:].sigmoid() * (1 - x[:, 11:].sigmoid())
    jacobian = x[:, 1] + share.log_abs_det_jacobian(x[:, 8:11], values["share"]) + rate.log().sum(1)
    torch.testing.assert_close(target.log_prob(x), log_prob(values) + jacobian)
    torch.testing.assert_close(target.unconstrain(values), x)
    assert target.constrain(x[:0])["theta"].shape == (0, 2, 3)
    assert target.unconstrain(target.constrain(x[:0])).shape == (0, 13)


def test_a_parameter_rounded_to_the_end_of_its_constraint_has_no_density_and_no_finite_score():
    def log_prob(of):  # torch refuses a scale that is not positive
        return Normal(of["mu"], of["sigma"]).log_prob(torch.tensor(0.5)) - of["sigma"]

    target = NamedTarget(log_prob, {"mu": constraints.real, "sigma": constraints.positive})
    inside = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    x = torch.cat([inside, torch.tensor([[1.0, -200.0], [0.0, 200.0]])])
    value, score = target.log_prob(x), target.score(x)
    assert value[2:].tolist() == [-torch.inf, -torch.inf]
    assert not score[2:].isfinite().all(1).any()
    torch.testing.assert_close(value[:2], target.log_prob(inside))
    torch.testing.assert_close(score[:2], target.score(inside))


def test_a_regression_with_a_scale_is_diagnosed(monkeypatch):
    monkeypatch.setattr(masses, "NUM_STEPS", 30)
    z = torch.linspace(-1, 1, 20)
    y = 1 + 2 * z - z.square() + 0.3 * torch.sin(9 * z)

    def log_prob(of):
        mean = of["a"][:, None] + of["b"] @ torch.stack([z, z.square()])
        prior = Normal(0.0, 5.0).log_prob(of["a"]) + Normal(0.0, 5.0).log_prob(of["b"]).sum(1)
        return prior + HalfNormal(1.0).log_prob(of["sigma"]) + Normal(mean, of["sigma"][:, None]).log_prob(y).sum(1)

    parameters = {"a": constraints.real, "b": (constraints.real, (2,)), "sigma": constraints.positive}
    inference = Inference(GeometricBridge(NamedTarget(log_prob, parameters), 1), num_steps=100, seed=0)
    inference.run(progress=False)
    text = str(inference.diagnose())
    assert "modes that attract no start" in text
    assert re.search(
        r"in coordinate (0 \(a\)|1 \(b\[0\]\)|2 \(b\[1\]\)|3 \(sigma\)) the ", text
    )  # 100 steps are too few
    assert GeometricBridge(good(), 1).coordinate(1) == "coordinate 1 (tau[1])"


@pytest.mark.slow
def test_a_fit_finds_the_moments_of_a_gamma_law():
    law = Gamma(4.0, 2.0)
    target = NamedTarget(lambda theta: law.log_prob(theta["tau"]), {"tau": constraints.positive})
    inference = Inference(GeometricBridge(target, 1), num_steps=400, batch_size=128, width=16, depth=2)
    inference.run(progress=False)
    tau = target.constrain(inference.sample(20_000))["tau"]
    assert float(tau.min()) > 0
    assert float(tau.mean()) == pytest.approx(2.0, rel=0.05)
    assert float(tau.std()) == pytest.approx(1.0, rel=0.1)


def good():
    return NamedTarget(flat, {"tau": (constraints.positive, (2,)), "mu": constraints.real})


def samples(**changes):
    return {"tau": torch.ones(3, 2), "mu": torch.zeros(3), **changes}


def at_zero(log_prob, parameters):
    target = NamedTarget(log_prob, parameters)
    return target.log_prob(torch.zeros(1, target.dimension))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: NamedTarget(flat, {"a": (constraints.positive, (0,))}), "a has the shape (0,): give a tuple of whole"),
        (lambda: NamedTarget(flat, {"a": (constraints.positive, 3)}), "a has the shape 3: give a tuple of whole numbe"),
        (lambda: NamedTarget(flat, {"a": constraints.simplex}), "a has the shape (): Simplex() constrains the last 1"),
        (
            lambda: NamedTarget(flat, {"a": (constraints.corr_cholesky, (2, 3))}),
            "a has the shape (2, 3), which CorrCholesky() does not fit: Input is not square",
        ),
        (lambda: good().constrain(torch.zeros(4, 2)), "x has the shape (4, 2): give (B, 3), without constraints"),
        (lambda: NamedTarget(flat, {"a": "positive"}), "a: 'positive' is no constraint: give one of torch.distrib"),
        (lambda: NamedTarget(flat, {"a": constraints.greater_than}), "is no constraint: give one of torch.distrib"),
        (
            lambda: NamedTarget(flat, {"n": constraints.nonnegative_integer}),
            "n: torch has no bijection from R^n to IntegerGreaterThan(lower_bound=0): sum a discrete parameter out",
        ),
        (lambda: NamedTarget(flat, {"b": constraints.boolean}), "to Boolean(): sum a discrete parameter out"),
        (
            lambda: NamedTarget(flat, {"c": (constraints.positive_definite, (2, 2))}),
            "c: torch has no bijection from R^n to PositiveDefinite(): sum a discrete parameter out, or take",
        ),
        (lambda: NamedTarget(flat, {"d": constraints.dependent}), "d: torch has no bijection from R^n to"),
        (
            lambda: NamedTarget(flat, {"n": constraints.nonnegative}).unconstrain({"n": torch.tensor([0.0, 1.0])}),
            "n: 1 of its values are at the end of GreaterThanEq(lower_bound=0.0)",
        ),
        (lambda: NamedTarget(flat, {}), "dimension=0: give the number of coordinates"),
        (
            lambda: at_zero(lambda theta: theta["sigma"], {"mu": constraints.real, "tau": constraints.positive}),
            "log_prob asks for 'sigma', and the parameters are mu, tau",
        ),
        (
            lambda: at_zero(lambda theta: theta["mu"].sum(), {"mu": constraints.real}),
            "log_prob returned the shape () for x of shape (1, 1): return (1,)",
        ),
        (lambda: good().unconstrain({"tau": torch.ones(3)}), "the samples are tau, and the parameters tau, mu"),
        (lambda: good().unconstrain(samples(eta=torch.ones(3))), "the samples are tau, mu, eta, and the parameters"),
        (lambda: good().unconstrain(samples(tau=torch.ones(3))), "tau has the shape (3,): give (3, 2)"),
        (
            lambda: good().unconstrain(samples(tau=torch.tensor([[1.0, -1], [2, 0], [3, 4]]))),
            "tau: 2 of its values do not satisfy the constraint GreaterThan(lower_bound=0.0)",
        ),
    ],
)
def test_what_is_no_density_over_named_parameters_is_refused_in_one_line(act, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        act()
    assert "\n" not in str(refusal.value)
