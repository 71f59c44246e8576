"""Solvers of the teacher's ODE and SDE, on grids of our choice."""

import itertools

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from gaussian_teacher import as_teacher
from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import power_timesteps
from hsivi_diffusers.teachers.loading import load_teacher
from hsivi_diffusers.teachers.solvers import Solver, make_solver, make_student, sample, use_grid
from hsivi_diffusers.teachers.teacher import StudentSampler


def teacher_of(unet, scheduler=None, **options):
    return load_teacher(DDPMPipeline(unet=unet, scheduler=scheduler or DDPMScheduler(clip_sample=False, **options)))


@pytest.fixture
def teacher(unet):
    return Guided(teacher_of(unet))


@pytest.fixture
def consistency_model(unet):
    """A pipeline of random weights with the scheduler that train_baseline.py writes."""
    config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True}
    return DDPMPipeline(unet=unet, scheduler=LCMScheduler(**config))


def consistency_sampler(pipeline, num_steps):
    teacher = teacher_of(pipeline.unet)
    return Solver(LCMScheduler.from_config(pipeline.scheduler.config), num_steps, teacher, Guided(teacher))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_consistency_model_is_sampled_as_by_a_pipeline_of_diffusers(consistency_model, num_steps):
    calls, sampler = [], consistency_sampler(consistency_model, num_steps)
    sampler.teacher.network.register_forward_pre_hook(lambda module, given: calls.append(int(given[1][0])))
    (images,) = sample(sampler, 3, 3, seed=0)
    assert len(calls) == num_steps
    assert calls[0] == 999
    assert calls == sorted(calls, reverse=True)
    assert torch.equal(images, *sample(sampler, 3, 3, seed=0))
    consistency_model.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wanted = consistency_model(3, generator, num_inference_steps=num_steps, output_type="np").images
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(wanted))


# ----- grids of our choice -----


@pytest.mark.parametrize("method", ["DPM-Solver++", "UniPC", "DEIS", "SA-Solver"])
def test_the_grid_of_a_solver_given_to_it_gives_its_images(teacher, method):
    solver = make_solver(method, 4, teacher)
    solver.scheduler.set_timesteps(4)
    same = make_solver(method, 4, teacher, solver.scheduler.timesteps.tolist())
    (images,), (wanted,) = (sample(each, 3, 3, seed=0) for each in (same, solver))
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ipndm_of_one_step_is_ddim_and_of_two_adams_bashforth(unet, prediction_type):
    """3/2 and -1/2 of the noise at the second step."""
    teacher = Guided(teacher_of(unet, prediction_type=prediction_type))
    (one,), (ddim,) = (sample(make_solver(name, 1, teacher, [600]), 3, 3, 0) for name in ("iPNDM", "DDIM"))
    torch.testing.assert_close(one, ddim, rtol=0, atol=1e-5)
    (two,) = sample(make_solver("iPNDM", 2, teacher, [600, 200]), 3, 3, seed=0)
    schedule, past = teacher.teacher.schedule, []
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for level, below in ((600, 200), (200, -1)):
        past.append(schedule.predict(unet(x, level).sample, level, x)[1])
        noise = past[0] if len(past) == 1 else (3 * past[1] - past[0]) / 2
        alpha, sigma = schedule.alpha_sigma(torch.tensor(level), x)
        alpha_below, sigma_below = schedule.alpha_sigma(torch.tensor(below), x)
        x = alpha_below * (x - sigma * noise) / alpha + sigma_below * noise
    torch.testing.assert_close(two, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_pipeline_runs_with_a_solver_on_a_grid(unet):
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    pipeline.scheduler = use_grid(DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config), [700, 300, 40])
    assert len(pipeline(2, num_inference_steps=3).images) == 2
    assert pipeline.scheduler.timesteps.tolist() == [700, 300, 40]
    with pytest.raises(ValueError, match="num_inference_steps=4: this solver has a grid of 3 steps"):
        pipeline(2, num_inference_steps=4)


@given(st.integers(1, 60), st.integers(0, 400), st.integers(60, 500), st.floats(0.3, 3))
def test_power_timesteps_descend_from_the_start_to_the_end(num_steps, end, length, power):
    steps = power_timesteps(num_steps, end + length, end, power)
    assert len(steps) == num_steps
    assert steps[0] == end + length
    assert all(above > below for above, below in itertools.pairwise(steps))
    assert num_steps == 1 or steps[-1] == end


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="12 solver steps: give from 1 to 11"):
        power_timesteps(12, 10, 0, 1.0)


def test_a_student_without_fine_noise_that_no_pipeline_holds_is_measured_as_it_draws(unet):
    teacher = as_teacher(unet, HSIVIScheduler())
    student = StudentSampler(teacher, unet, HSIVIScheduler(layer_timesteps=[440, 0], noise_cutoff=2.0))
    drawn, measured = (draw(3, torch.Generator().manual_seed(0)) for draw in (student, make_student(student, teacher)))
    torch.testing.assert_close(measured, drawn.images, atol=1e-6, rtol=0)
