import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from hsivi_diffusers.vi import LogProbTarget, ScoreTarget
from training.benchmarks.inference.targets.plane import Banana
from training.benchmarks.inference.targets.posteriors import RareEvents
from training.benchmarks.inference.targets.whitened import FullNormal, Whitened, laplace, moment_match


def law(dimension=3, condition=20.0, seed=0):
    """A Gaussian away from the origin, the ratio of whose variances is given."""
    random = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=random, dtype=torch.float64))
    variances = torch.logspace(0, torch.tensor(condition).log10().item(), dimension, dtype=torch.float64)
    mean = 3 * torch.randn(dimension, generator=random, dtype=torch.float64)
    return MultivariateNormal(mean, axes * variances @ axes.T)


def as_log_prob(normal):
    return LogProbTarget(normal.log_prob, len(normal.mean))


def as_score(normal):
    return ScoreTarget(lambda x: (normal.mean.to(x) - x) @ normal.precision_matrix.to(x), len(normal.mean))


def points(dimension, size=6):
    return 2 * torch.randn(size, dimension, dtype=torch.float64)


forms = pytest.mark.parametrize("form", [as_log_prob, as_score])


@forms
@pytest.mark.parametrize(("dimension", "condition"), [(1, 1.0), (3, 20.0), (5, 1e2), (10, 1e4), (30, 1e2)])
def test_laplace_is_exact_on_a_gaussian(form, dimension, condition):
    normal = law(dimension, condition)
    fitted = laplace(form(normal))
    torch.testing.assert_close(fitted.mean, normal.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.scale @ fitted.scale.T, normal.covariance_matrix, rtol=1e-6, atol=1e-6)
    assert fitted.mean.dtype == torch.float64
    assert not fitted.mean.requires_grad
    assert not fitted.scale.requires_grad


@pytest.mark.parametrize("target", [Banana(), RareEvents()])
def test_laplace_is_at_the_mode_with_its_curvature(target):
    fitted = laplace(target)
    score = target.score(fitted.mean[None])
    torch.testing.assert_close(score, torch.zeros_like(score), rtol=0, atol=1e-8)
    step = 1e-4 * torch.eye(target.dimension, dtype=torch.float64)
    slopes = (target.score(fitted.mean + step) - target.score(fitted.mean - step)) / 2e-4
    torch.testing.assert_close(torch.linalg.inv(fitted.scale @ fitted.scale.T), -slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "log_prob",
    [
        lambda x: x.sum(1),
        lambda x: 0 * x.sum(1),
        lambda x: x[:, 0].square() - x[:, 1].square(),  # a saddle
        lambda x: (x[:, 0] + 1).square() - (x[:, 1] + 1).square(),  # beside a saddle
        lambda x: x.square().sum(1),
        lambda x: -x[:, 0].square(),
        lambda x: -(x - 0.3).abs().sum(1),
    ],
)
def test_a_target_without_a_mode_is_refused(log_prob):
    target = LogProbTarget(log_prob, 2)
    for of in (target, ScoreTarget(target.score, 2)):
        with pytest.raises(ValueError, match="no mode was found .*use moment_match|has no gradient in x"):
            laplace(of)


# ----- the Gaussian itself -----


def fitted_to(normal):
    return FullNormal(normal.mean, torch.linalg.cholesky(normal.covariance_matrix))


@given(st.integers(1, 6), st.floats(1, 1e4))
@settings(max_examples=20)
def test_whitening_and_unwhitening_undo_each_other(dimension, condition):
    gaussian, x = fitted_to(law(dimension, condition)), points(dimension)
    torch.testing.assert_close(gaussian.unwhiten(gaussian.whiten(x)), x)
    torch.testing.assert_close(gaussian.whiten(gaussian.unwhiten(x)), x)


def test_draws_have_the_moments_and_torchs_precision():
    normal = law()
    x = fitted_to(normal).sample(40_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0).double(), normal.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(x.T).double(), normal.covariance_matrix, rtol=0.05, atol=0.2)
    torch.testing.assert_close(x, fitted_to(normal).sample(40_000, torch.Generator().manual_seed(0)))


# ----- targets in its coordinates -----


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_a_whitened_gaussian_is_the_standard_normal(condition):
    normal, z = law(3, condition), points(3)
    standard = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    whitened = Whitened(as_log_prob(normal))
    torch.testing.assert_close(whitened.log_prob(z), standard.log_prob(z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whitened.score(z), -z, rtol=1e-6, atol=1e-6)
    of_score = Whitened(as_score(normal))
    torch.testing.assert_close(of_score.score(z), -z, rtol=1e-6, atol=1e-6)
    assert whitened.dimension == of_score.dimension == 3
    with pytest.raises(NotImplementedError, match="no log-density"):
        of_score.log_prob(z)


@pytest.mark.parametrize("target", [Banana(), RareEvents()])
def test_the_score_of_a_whitened_target_is_the_gradient_of_its_log_density(target):
    whitened, z = Whitened(target), points(target.dimension).requires_grad_(True)
    (gradient,) = torch.autograd.grad(whitened.log_prob(z).sum(), z)
    torch.testing.assert_close(whitened.score(z), gradient)


def test_an_approximation_of_the_users_own_is_used():
    approximation, z = FullNormal(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]])), torch.randn(5, 2)
    whitened = Whitened(Banana(), approximation)
    x = torch.tensor([1.0, 2.0]) + z @ torch.tensor([[2.0, 0.0], [1.0, 3.0]]).T
    torch.testing.assert_close(whitened.log_prob(z), Banana().log_prob(x) + torch.tensor(6.0).log())


# ----- without a mode -----


def test_moments_are_those_of_the_draws():
    x = law().sample((500,)).float()
    gaussian = moment_match(x)
    z = gaussian.whiten(x.double())
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(3).double(), rtol=0, atol=1e-9)
    assert moment_match(torch.randn(10, 1)).scale.shape == (1, 1)


@pytest.mark.parametrize("draws", [torch.zeros(10, 2), torch.randn(2, 3), torch.full((10, 2), float("nan"))])
def test_draws_without_a_covariance_are_refused(draws):
    with pytest.raises(ValueError, match="no positive definite covariance: give more draws"):
        moment_match(draws)


def test_a_target_that_cannot_be_evaluated_in_double_precision_says_what_to_do():
    features = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"double precision.*features.to\(x\)"):
        laplace(LogProbTarget(lambda x: -(x @ features.T).square().sum(1), 2))
