import pytest
import torch

from hsivi_diffusers.vi import DiagonalGaussian, GaussianMLP, IndependentLayers, SharedLayers


def independent(num_layers=3):
    return IndependentLayers([GaussianMLP(2, width=8, initial_std=0.1 * (i + 1)) for i in range(num_layers)])


def shared(num_layers=3):
    layers = SharedLayers(GaussianMLP(2, width=8, num_layers=num_layers), num_layers)
    with torch.no_grad():
        layers.network.log_std += torch.arange(num_layers)[:, None]
    return layers


@pytest.mark.parametrize("make", [independent, shared])
@pytest.mark.parametrize("t", [[0, 2, 1, 2, 0], [2, 2, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_each_row_is_answered_by_its_own_layer_in_its_own_place(make, t):
    layers, x, t = make(), torch.randn(5, 2), torch.tensor(t)
    q = layers(x, t)
    assert q.mean.shape == q.std.shape == (5, 2)
    for i in range(5):
        alone = layers(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(q.mean[i : i + 1], alone.mean)
        torch.testing.assert_close(q.std[i : i + 1], alone.std)
    for one, other in ((0, 1), (1, 2)):
        assert not torch.allclose(layers(x, torch.full((5,), one)).std, layers(x, torch.full((5,), other)).std)


def test_layer_t_is_the_network_at_place_t():
    layers, x = independent(), torch.randn(4, 2)
    for t in range(3):
        q, wanted = layers(x, torch.full((4,), t)), layers.networks[t](x)
        assert torch.equal(q.mean, wanted.mean)
        assert torch.equal(q.std, wanted.std)
        torch.testing.assert_close(q.std, torch.full((4, 2), 0.1 * (t + 1)))


def test_pictures_go_through_as_vectors_do_and_a_std_that_broadcasts_is_spread_over_them():
    class Shift(torch.nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x_next):
            return DiagonalGaussian(x_next + self.by, torch.full((1, 1, 1, 1), self.by))

    q = IndependentLayers([Shift(1.0), Shift(2.0)])(torch.zeros(3, 1, 2, 2), torch.tensor([1, 0, 1]))
    wanted = torch.tensor([2.0, 1.0, 2.0])[:, None, None, None].expand(3, 1, 2, 2)
    assert torch.equal(q.mean, wanted)
    assert torch.equal(q.std, wanted)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: independent()(torch.zeros(2, 2), torch.zeros(2).long(), torch.zeros(2)), "take no condition: write"),
        (lambda: shared()(torch.zeros(2, 2), torch.zeros(2).long(), torch.zeros(2)), "take no condition: write"),
        (lambda: IndependentLayers([]), r"networks=\[\]: give a network for each of the T layers"),
    ],
)
def test_conditions_and_no_layers_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
