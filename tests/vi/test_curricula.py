import pytest
import torch

from hsivi_diffusers.vi import joint


def test_joint_is_one_stage_in_which_all_layers_count_alike():
    (stage,) = joint(4, 100)
    assert torch.equal(stage.beta, torch.ones(4))
    assert stage.num_steps == 100


def test_shares_are_rescaled_to_mean_one():
    (stage,) = joint(2, 10, beta=[1, 3])
    assert stage.beta.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("beta", [[1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_shares_that_do_not_fit_are_refused(beta):
    with pytest.raises(ValueError, match="give 2 shares"):
        joint(2, 10, beta=beta)


def test_a_hierarchy_has_a_layer():
    with pytest.raises(ValueError, match="at least 1 layer"):
        joint(0, 10)
