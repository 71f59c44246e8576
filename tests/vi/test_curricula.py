import pytest
import torch

from hsivi_diffusers.vi import Plateau, cosine, joint, sequential


def test_joint_is_one_stage_in_which_all_layers_count_alike():
    (stage,) = joint(4, 100)
    assert torch.equal(stage.beta, torch.ones(4))
    assert stage.num_steps == 100


def test_the_critic_may_learn_alone_at_first():
    alone, both = joint(2, 10, critic_first=4)
    assert (alone.beta.tolist(), alone.num_steps) == ([0, 0], 4)
    assert (both.beta.tolist(), both.num_steps) == ([1, 1], 6)


@pytest.mark.parametrize("critic_first", [-1, 11])
def test_the_critic_cannot_learn_alone_for_longer_than_all(critic_first):
    with pytest.raises(ValueError, match=f"critic_first={critic_first}: give a number of steps from 0 up to the 10"):
        joint(2, 10, critic_first=critic_first)


def test_sequential_trains_one_layer_after_the_other_from_the_base_down():
    stages = sequential(3, 7)
    assert [stage.beta.tolist() for stage in stages] == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [stage.num_steps for stage in stages] == [7, 7, 7]


# ----- plateaus -----


def short_plateau(window, patience):
    plateau = Plateau()
    plateau.window, plateau.patience = window, patience
    return plateau


def noise(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).tolist()


def stops_at(plateau, values):
    """The first update at which the plateau ends the stage, or None."""
    return next((i for i, value in enumerate(values) if plateau(value)), None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("height", [-1e3, 0.0, 50.0])
def test_noise_around_a_constant_ends_a_stage(seed, height):
    stop = stops_at(short_plateau(window=50, patience=3), [height + value for value in noise(5000, seed)])
    assert 4 * 50 - 1 <= stop < 1500
    assert (stop + 1) % 50 == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_value_that_falls_ends_no_stage(seed):
    falling = [value - 0.01 * i for i, value in enumerate(noise(5000, seed))]  # half a std in each window of 50
    assert stops_at(short_plateau(window=50, patience=3), falling) is None


def test_a_value_without_any_noise_ends_a_stage_after_patience_windows_more_than_the_first():
    assert stops_at(short_plateau(window=4, patience=2), [1.0] * 50) == 3 * 4 - 1
    assert stops_at(short_plateau(window=4, patience=2), [-float(i) for i in range(50)]) is None


def test_a_window_is_compared_with_the_lowest_before_it_and_not_with_the_last():
    windows = [1.0, 5.0, 4.0, 3.0, 2.0]
    assert stops_at(short_plateau(window=2, patience=3), [value for value in windows for _ in range(2)]) == 2 * 4 - 1


def test_after_a_stage_a_plateau_starts_over():
    plateau, fresh = short_plateau(window=4, patience=2), short_plateau(window=4, patience=2)
    assert stops_at(plateau, [1.0] * 12) == 11
    assert plateau.state_dict() == fresh.state_dict()
    assert stops_at(plateau, [7.0] * 50) == 11


def test_a_restored_plateau_stops_where_the_saved_one_does():
    values = noise(3000)
    whole, half, rest = (short_plateau(window=30, patience=4) for _ in range(3))
    stop = stops_at(whole, values)
    assert stops_at(half, values[:137]) is None
    state = half.state_dict()
    rest.load_state_dict(state)
    half(0.0)
    assert len(state["values"]) == 137 % 30
    assert stops_at(rest, values[137:]) == stop - 137


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.0), (0.5, 0.525), (1.0, 0.05)])
def test_a_cosine_falls_to_its_end(share, factor):
    assert cosine(share, end=0.05) == pytest.approx(factor)
