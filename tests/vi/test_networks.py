import pytest
import torch

from hsivi_diffusers.vi import GaussianMLP, ResidualMLP, ScoreMLP


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_residual_mlp_has_the_parameters_of_its_linear_maps(depth):
    network = ResidualMLP(3, 5, width=7, depth=depth)
    assert count(network) == (3 * 7 + 7) + (depth - 1) * (7 * 7 + 7) + (7 * 5 + 5)
    assert count(ResidualMLP(3, 5, width=7, depth=depth, levels=True)) == count(network) + 16 * 7
    assert network(torch.randn(4, 3)).shape == (4, 5)


def test_a_block_adds_to_what_goes_through_it():
    network, x = ResidualMLP(2, 2, width=8, depth=3), torch.randn(4, 2)
    with torch.no_grad():
        for block in network.blocks:
            block.weight.zero_()
            block.bias.zero_()
        shallow = network.last(torch.nn.functional.silu(network.first(x)))
    torch.testing.assert_close(network(x), shallow)


def test_a_level_matters_row_by_row():
    network, x = ResidualMLP(2, 3, width=8, levels=True), torch.randn(1, 2).expand(3, 2)
    level = torch.tensor([0.0, 0.37, 1.0])
    answer = network(x, level)
    for i in range(3):
        torch.testing.assert_close(answer[i : i + 1], network(x[i : i + 1], level[i : i + 1]))
        for j in range(i):
            assert not torch.allclose(answer[i], answer[j], atol=1e-3)


@pytest.mark.parametrize("num_layers", [None, 3])
def test_a_layer_starts_near_the_identity_with_its_initial_std(num_layers):
    layer, x = GaussianMLP(2, initial_std=0.3, num_layers=num_layers), torch.randn(100, 2)
    t = None if num_layers is None else torch.arange(100) % 3
    q = layer(x, t).detach()
    assert q.mean.shape == q.std.shape == (100, 2)
    assert float((q.mean - x).square().mean().sqrt()) < 0.3
    assert float((q.std / 0.3).log().square().mean().sqrt()) < 1e-5


def test_a_std_is_learnt_layer_by_layer_where_the_network_is_shared():
    layer, t = GaussianMLP(2, width=8, num_layers=3), torch.tensor([0, 2, 0, 1])
    with torch.no_grad():
        layer.log_std.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    expected = torch.tensor([[0.0, 1.0], [4.0, 5.0], [0.0, 1.0], [2.0, 3.0]]).exp()
    torch.testing.assert_close(layer(torch.randn(4, 2), t).std, expected)
    layer(torch.randn(4, 2), torch.tensor([2, 2, 2, 2])).std.sum().backward()
    assert (layer.log_std.grad != 0).tolist() == [[False, False], [False, False], [True, True]]


def test_every_parameter_of_a_layer_learns():
    layer = GaussianMLP(2, width=8, num_layers=2)
    q = layer(torch.randn(16, 2), torch.arange(16) % 2)
    (q.mean.square().sum() + q.std.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_a_critic_starts_near_the_score_of_the_base_and_sees_the_level():
    critic, x = ScoreMLP(2), torch.randn(100, 2)
    score = critic(x, torch.rand(100), None)
    assert score.shape == (100, 2)
    assert float((score + x).detach().square().mean().sqrt()) < 0.3
    assert not torch.allclose(critic(x, torch.zeros(100)), critic(x, torch.full((100,), 0.5)), atol=1e-4)


def test_levels_of_another_dtype_are_taken():
    assert ScoreMLP(2).double()(torch.zeros(2, 2).double(), torch.tensor([0, 1])).dtype == torch.float64


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ResidualMLP(2, 3, levels=True)(torch.zeros(4, 2)), "levels=True takes a level, and no other does"),
        (lambda: ResidualMLP(2, 3)(torch.zeros(4, 2), torch.rand(4)), "levels=True takes a level, and no other does"),
        (lambda: GaussianMLP(2, num_layers=2)(torch.zeros(4, 2)), "give num_layers=T to a network that layers share"),
        (lambda: GaussianMLP(2)(torch.zeros(4, 2), torch.zeros(4).long()), "give num_layers=T to a network that"),
        (lambda: ResidualMLP(0, 2), "inputs=0.*all must be 1 or more"),
        (lambda: ResidualMLP(2, 2, depth=0), "depth=0: all must be 1 or more"),
        (lambda: GaussianMLP(2, initial_std=0.0), "initial_std=0.0: give a number > 0"),
        (lambda: GaussianMLP(20_000), "dimension=20000: the default layers have a d x d matrix each"),
    ],
)
def test_sizes_and_calls_that_are_wrong_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
