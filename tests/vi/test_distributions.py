import torch
from hypothesis import given, settings
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


@given(
    rows=st.integers(1, 6),
    laws=st.integers(1, 6),
    shape=st.sampled_from([(1,), (3,), (2, 2), (2, 1, 3)]),
    broadcast=st.sampled_from(["full", "row", "coordinate", "one"]),
    far=st.sampled_from([0.0, 1e4]),
)
@settings(deadline=None, max_examples=60)
def test_pairwise_log_prob_is_log_prob_pair_by_pair(rows, laws, shape, broadcast, far):
    random = torch.Generator().manual_seed(rows + 10 * laws)
    x, mean = (far + torch.randn(n, *shape, generator=random, dtype=torch.float64) for n in (rows, laws))
    ones = [1] * len(shape)
    of = {"full": (laws, *shape), "row": (laws, *ones), "coordinate": (1, *shape), "one": (1, *ones)}[broadcast]
    std = 0.1 + torch.rand(of, generator=random, dtype=torch.float64)
    pairs = DiagonalGaussian(mean, std).pairwise_log_prob(x)
    assert pairs.shape == (rows, laws)
    each = std.expand_as(mean)
    for j in range(laws):
        alone = DiagonalGaussian(mean[j].expand_as(x), each[j].expand_as(x)).log_prob(x)
        torch.testing.assert_close(pairs[:, j], alone, rtol=1e-6, atol=1e-6)


sigmas = st.lists(st.floats(0, 0.99), min_size=3, max_size=3).map(sorted)


def alpha_sigma(sigma):
    return torch.tensor([[(1 - sigma**2) ** 0.5]], dtype=torch.float64), torch.tensor([[sigma]], dtype=torch.float64)


@given(sigmas, st.floats(0.05, 3), numbers)
def test_diffusion_in_two_steps_is_that_in_one(levels, std, mean):
    first, second, third = map(alpha_sigma, levels)
    q = DiagonalGaussian(torch.full((2, 3), mean, dtype=torch.float64), torch.full((2, 1), std, dtype=torch.float64))
    there = q.diffuse(*first, *second).diffuse(*second, *third)
    at_once = q.diffuse(*first, *third)
    torch.testing.assert_close(there.mean, at_once.mean)
    torch.testing.assert_close(there.std, at_once.std)


@given(sigmas, numbers)
def test_diffusion_takes_diffused_data_to_data_diffused_further(levels, point):
    (alpha_t, sigma_t), (alpha, sigma) = alpha_sigma(levels[0]), alpha_sigma(max(levels[1], 0.01))
    if sigma_t > sigma:
        return
    q = DiagonalGaussian(alpha_t * point, sigma_t.clamp_min(1e-12))  # of data that is a point
    moved = q.diffuse(alpha_t, sigma_t, alpha, sigma)
    torch.testing.assert_close(moved.mean, alpha * point)
    torch.testing.assert_close(moved.std, sigma)
