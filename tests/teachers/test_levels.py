"""What follows from a noise schedule: starts, levels, and grids of solvers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import SOLVERS, make_scheduler

LINEAR = HSIVIScheduler()
COSINE = HSIVIScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
FLOW = HSIVIScheduler(prediction_type="flow_prediction", shift=3.0)
GREY, COLOUR = (1, 32, 32), (3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "level"), [((1, 8, 8), 440), ((1, 32, 32), 674), ((3, 32, 32), 750), ((3, 64, 64), 836)]
)
def test_the_signal_falls_to_3_2_where_the_docs_say(shape, level):
    assert clock_of(LINEAR).signal_level(shape, 3.2) == level
    alpha, sigma = LINEAR.alpha_sigma(torch.tensor([level - 1, level]), torch.zeros(1))
    before, there = (math.sqrt(math.prod(shape)) * alpha / sigma).flatten().tolist()
    assert there <= 3.2 < before


@given(st.sampled_from([LINEAR, COSINE, FLOW]), st.floats(1e-3, 1e3), st.integers(1, 64))
def test_a_lower_signal_is_at_no_lower_level_and_on_the_clock(schedule, signal, size):
    clock = clock_of(schedule)
    here, lower = (clock.signal_level((1, size, size), each) for each in (signal, signal / 2))
    assert 0 <= here <= lower < len(schedule)


def test_several_grids_start_a_fiftieth_of_the_clock_apart_and_of_a_flow_together():
    assert clock_of(LINEAR).starts(440, None, GREY, 3) == [440, 460, 480]
    assert clock_of(LINEAR).starts(990, None, GREY, 3) == [959, 979, 999]
    assert clock_of(LINEAR).starts(None, None, GREY, 2) == [None, None]
    assert clock_of(FLOW).starts(None, None, GREY, 2) == [999, 999]


def test_the_highest_level_of_a_flow_is_above_every_output():
    assert clock_of(FLOW).highest_level((1, 1, 1), torch.tensor([0, 990])) == 991


@given(st.sampled_from([LINEAR, COSINE, FLOW]), st.integers(1, 60))
def test_grids_of_solvers_descend_on_the_clock(schedule, num_steps):
    clock = clock_of(schedule)
    for levels in (clock.pair_levels(num_steps), clock.few_step_levels(GREY, num_steps)):
        assert len(levels) == num_steps
        assert all(above > below for above, below in itertools.pairwise(levels))
        assert 0 <= levels[-1] <= levels[0] < len(schedule)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_grids_of_solvers_end_near_the_image_where_their_docs_say(schedule):
    clock = clock_of(schedule)
    end = schedule.levels.time(torch.tensor(clock.pair_levels(15)[-1]))
    assert float(end) == pytest.approx(10, abs=1.5)  # N / 100, of a flow to the nearest level
    assert clock.few_step_levels(GREY, 5)[-1] == 20  # N / 50


def test_a_solver_of_pairs_does_not_start_where_a_noise_prediction_is_worth_nothing():
    start = clock_of(COSINE).pair_levels(15)[0]
    alpha, sigma = COSINE.alpha_sigma(torch.tensor([start - 1, start]), torch.zeros(1))
    assert (alpha / sigma).flatten().tolist() == sorted((alpha / sigma).flatten().tolist(), reverse=True)
    assert float(alpha[0] / sigma[0]) > 0.006 >= float(alpha[1] / sigma[1])
    assert clock_of(LINEAR).pair_levels(15)[0] == 999


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_each_solver_has_the_noise_levels_of_the_teacher(schedule):
    clock = clock_of(schedule)
    for method in SOLVERS:
        if method in clock.unsupported:
            which = "not for rectified flows" if schedule.is_flow else "for rectified flows alone"
            with pytest.raises(ValueError, match=f"method '{method}' is {which}: choose one of"):
                make_scheduler(method, schedule)
            continue
        takes_grid = method not in ("DDPM", "DDIM, eta 1")
        levels = [900, 500, 20] if takes_grid else None
        solver, _ = make_scheduler(method, schedule, levels)
        solver.set_timesteps(3)
        if levels is not None:
            times = schedule.levels.time(torch.tensor(levels)).float()
            torch.testing.assert_close(torch.as_tensor(solver.timesteps).float(), times, rtol=0, atol=1e-2)
        if not schedule.is_flow and hasattr(solver, "alphas_cumprod"):
            torch.testing.assert_close(solver.alphas_cumprod, schedule.alphas_cumprod)
    with pytest.raises(ValueError, match="method 'Heun' is unknown: choose one of"):
        make_scheduler("Heun", schedule)
