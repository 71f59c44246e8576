import pytest
import torch
from torch.distributions import Independent, LogNormal, MultivariateNormal, Normal

from hsivi_diffusers.vi.targets import DiffusibleTarget, IsotropicNormal, LogProbTarget, ScoreTarget, as_target


@pytest.fixture
def normal():
    factor = torch.randn(3, 3, dtype=torch.float64)
    return MultivariateNormal(torch.randn(3, dtype=torch.float64), factor @ factor.T + torch.eye(3))


X = torch.zeros(4, 2)


def quartic(x):
    return -x.pow(4).sum(1)


def test_a_torch_distribution_becomes_a_target_with_its_exact_score(normal):
    target = as_target(normal)
    assert as_target(target) is target
    x = torch.randn(5, 3, dtype=torch.float64)
    assert target.dimension == 3
    torch.testing.assert_close(target.log_prob(x), normal.log_prob(x))
    torch.testing.assert_close(target.score(x), (normal.mean - x) @ normal.precision_matrix)


def test_the_score_of_a_function_is_its_gradient():
    x = torch.randn(4, 2)
    torch.testing.assert_close(LogProbTarget(quartic, 2).score(x), -4 * x.pow(3))


def test_second_derivatives_flow_through_the_score_where_x_has_a_graph():
    x = torch.randn(4, 2, requires_grad=True)
    (hessian_sum,) = torch.autograd.grad(LogProbTarget(quartic, 2).score(x).sum(), x)
    torch.testing.assert_close(hessian_sum, -12 * x.square())


def test_the_score_has_no_graph_where_x_has_none_and_is_there_without_gradients():
    target, x = LogProbTarget(quartic, 2), torch.randn(4, 2)
    with torch.no_grad():
        score = target.score(x)
    assert not score.requires_grad
    assert not target.score(x).requires_grad
    assert not x.requires_grad


def test_a_diffusible_target_needs_its_diffused_log_density_alone():
    class Gaussian(DiffusibleTarget):
        dimension = 2

        def sample(self, size, generator=None):
            return torch.randn(size, 2, generator=generator)

        def diffused_log_prob(self, x, alpha, sigma):
            return -0.5 * x.square().sum(1) / (alpha.square() + sigma.square())

    x, alpha, sigma = torch.randn(3, 2), torch.tensor([1.0, 0.6, 0.1]), torch.tensor([0.0, 0.8, 2.0])
    target = Gaussian()
    torch.testing.assert_close(target.log_prob(x), -0.5 * x.square().sum(1))
    torch.testing.assert_close(target.score(x), -x)
    torch.testing.assert_close(target.diffused_score(x, alpha, sigma), -x / (alpha**2 + sigma**2)[:, None])


def test_a_mixture_of_torch_is_a_target_over_the_whole_plane():
    parts = torch.distributions.MultivariateNormal(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.eye(2))
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), parts)
    x = torch.randn(5, 2)
    torch.testing.assert_close(as_target(mixture).log_prob(x), mixture.log_prob(x))


@pytest.mark.parametrize("cut", [lambda x: x.detach(), lambda x: torch.from_numpy(x.detach().numpy())])
def test_a_function_without_a_gradient_is_refused_where_one_is_needed(cut):
    x = torch.randn(4, 2, requires_grad=True)
    target = LogProbTarget(lambda x: -0.5 * cut(x).square().sum(1), 2)
    for ask in (target.log_prob, target.score, ScoreTarget(lambda x: -cut(x), 2).score):
        with pytest.raises(ValueError, match="has no gradient in x: write it in torch"):
            ask(x)
    with torch.no_grad():
        assert target.log_prob(x).shape == (4,)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: as_target(quartic), r"a target of type function: .* or LogProbTarget\(function, dimension\)"),
        (lambda: as_target(Normal(0.0, 1.0)), r"event shape \(\)"),
        (lambda: as_target(Normal(torch.zeros(2), torch.ones(2))), "wrap it in torch.distributions.Independent"),
        (lambda: as_target(Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1)), "a target has all of R"),
        (lambda: LogProbTarget(lambda x: x.sum(), 2).log_prob(X), r"shape \(\) for x of shape \(4, 2\): return \(4,\)"),
        (
            lambda: ScoreTarget(lambda x: x.sum(1), 2).score(X),
            r"score returned the shape \(4,\) for x of shape \(4, 2\)",
        ),
        (lambda: ScoreTarget(quartic, 2).log_prob(X), "ScoreTarget has a score and no log-density"),
        *(
            (lambda make=make, of=of: make(quartic, of), f"dimension={of}: give the number of coordinates")
            for make in (LogProbTarget, ScoreTarget)
            for of in (10**9, 0, 2.0)
        ),
        (lambda: IsotropicNormal(2, std=0.0), "std=0.0: a standard deviation is positive"),
    ],
)
def test_what_is_no_density_on_vectors_is_refused(act, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        act()


def test_an_error_of_the_users_function_says_what_it_was_called_with():
    with pytest.raises(RuntimeError, match="size of tensor") as info:
        LogProbTarget(lambda x: (x - torch.zeros(3)).square().sum(1), 2).log_prob(torch.zeros(4, 2))
    assert info.value.__notes__ == [
        "log_prob was called with x of shape (4, 2): if that is wrong, check dimension=2; if x has parameters with "
        "bounds, such as a scale, take a NamedTarget"
    ]
