import pytest
import torch

from hsivi_diffusers.vi import DiagonalGaussian
from scenarios import linear_layers, matching_bridge


def test_a_bridge_without_a_clock_of_its_own_counts_layers():
    bridge = matching_bridge(linear_layers())
    t = torch.tensor([2, 0, 1])
    assert torch.equal(bridge.level(t), t)


def test_a_bridge_with_layers_alone_has_no_random_levels():
    bridge = matching_bridge(linear_layers())
    with pytest.raises(NotImplementedError, match='scoring="own"'):
        bridge.sample_level(torch.zeros(3))
    q = DiagonalGaussian(torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(NotImplementedError, match="GaussianBridge cannot re-noise"):
        bridge.renoise(q, torch.zeros(2), torch.zeros(2))
