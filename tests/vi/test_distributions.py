import torch
from hypothesis import given
from hypothesis import strategies as st

from hsivi_diffusers.vi import DiagonalGaussian
from hsivi_diffusers.vi.distributions import randn_like

numbers = st.floats(-5, 5)


@given(st.lists(st.tuples(numbers, st.floats(0.05, 4), numbers), min_size=1, max_size=5))
def test_log_prob_is_that_of_torch_and_score_its_gradient(rows):
    mean, std, x = (torch.tensor([column], dtype=torch.float64) for column in zip(*rows, strict=True))
    x.requires_grad_(True)
    q = DiagonalGaussian(mean, std)
    log_prob = q.log_prob(x)
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
    torch.testing.assert_close(log_prob, expected)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(q.score(x), gradient)


def test_rsample_is_mean_plus_std_times_noise_with_a_broadcast_std():
    mean, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    std = torch.rand(4, 1, 1, 1)
    assert torch.equal(DiagonalGaussian(mean, std).rsample(noise), mean + std * noise)
    assert DiagonalGaussian(mean, std).log_prob(noise).shape == (4,)


def test_rsample_reaches_both_parameters_and_detach_neither():
    mean, std = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    q = DiagonalGaussian(mean, std)
    q.rsample(torch.ones(2, 3)).sum().backward()
    assert torch.equal(mean.grad, torch.ones(2, 3))
    assert torch.equal(std.grad, torch.full((2, 1), 3.0))
    assert not q.detach().rsample(torch.ones(2, 3)).requires_grad


def test_one_seed_gives_one_draw():
    x = torch.zeros(2, 3, dtype=torch.float64)
    draws = [randn_like(x, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.float64
    assert not torch.equal(draws[0], randn_like(x, None))
