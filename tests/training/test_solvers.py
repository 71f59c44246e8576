import itertools

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.teachers.ode import few_step_timesteps, power_timesteps, use_grid
from hsivi_diffusers.teachers.solvers import Solver, make_solver, sample
from tiny_unet import make_unet


@pytest.fixture
def consistency_model(unet):
    """A pipeline of random weights with the scheduler that train_baseline.py writes."""
    config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True}
    return DDPMPipeline(unet=unet, scheduler=LCMScheduler(**config))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_consistency_model_is_sampled_as_by_a_pipeline_of_diffusers(consistency_model, num_steps):
    calls = []
    unet = consistency_model.unet
    sampler = Solver(LCMScheduler.from_config(consistency_model.scheduler.config), num_steps, unet)
    handle = unet.register_forward_pre_hook(lambda module, given: calls.append(int(given[1][0])))
    (images,) = sample(sampler, 3, 3, seed=0)
    handle.remove()
    assert len(calls) == num_steps
    assert calls[0] == 999
    assert calls == sorted(calls, reverse=True)
    consistency_model.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wanted = consistency_model(3, generator, num_inference_steps=num_steps, output_type="np").images
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(wanted))


@torch.no_grad()
def test_the_last_step_of_a_consistency_model_adds_no_noise(consistency_model):
    """One step is c_skip x + c_out x0 at the end of the clock, where c_skip is nothing."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    abar = consistency_model.scheduler.alphas_cumprod[999]
    x0 = (x - (1 - abar).sqrt() * consistency_model.unet(x, 999).sample) / abar.sqrt()
    sampler = Solver(LCMScheduler.from_config(consistency_model.scheduler.config), 1, consistency_model.unet)
    images = sampler(2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, x0.clamp(-1, 1) / 2 + 0.5, rtol=0, atol=1e-6)


def test_a_consistency_sampler_may_be_called_again_and_follows_its_seed(consistency_model):
    sampler = Solver(LCMScheduler.from_config(consistency_model.scheduler.config), 3, consistency_model.unet)
    first, again, other = (torch.cat([*sample(sampler, 3, 2, seed=seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", ["DDIM", "UniPC", "DPM-Solver++"])
def test_a_variance_that_the_teacher_predicts_is_dropped(method):
    unet = make_unet(out_channels=2).eval()
    (images,) = sample(make_solver(method, 2, unet, DDPMScheduler().config), 3, 3, seed=0)
    mean_alone = make_unet(out_channels=1).eval()
    weights = unet.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = weights[name][:1]
    mean_alone.load_state_dict(weights)
    (wanted,) = sample(make_solver(method, 2, mean_alone, DDPMScheduler().config), 3, 3, seed=0)
    torch.testing.assert_close(images, wanted)


# ----- grids of your own -----


@torch.no_grad()
@pytest.mark.parametrize("method", ["DPM-Solver++", "UniPC", "DEIS", "SA-Solver"])
def test_the_grid_of_a_solver_given_to_it_gives_its_images(unet, method):
    solver = make_solver(method, 4, unet.eval(), DDPMScheduler().config)
    solver.scheduler.set_timesteps(4)
    same = make_solver(method, 4, unet, DDPMScheduler().config, timesteps=solver.scheduler.timesteps.tolist())
    (images,), (wanted,) = (sample(each, 3, 3, seed=0) for each in (same, solver))
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["DDIM", "UniPC", "iPNDM"])
def test_the_network_is_called_at_the_timesteps_that_are_given(unet, method):
    calls = []
    unet.register_forward_hook(lambda module, args, output: calls.append(int(args[1][0])))
    (images,) = sample(make_solver(method, 3, unet, DDPMScheduler().config, timesteps=[700, 300, 40]), 2, 2, seed=0)
    assert calls == [700, 300, 40]
    assert images.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ipndm_of_one_step_is_ddim(unet, prediction_type):
    """And of more it is Adams-Bashforth: 3/2 and -1/2 of the noise at the second."""
    config = DDPMScheduler(prediction_type=prediction_type, clip_sample=False).config
    (one,), (ddim,) = (
        sample(make_solver(name, 1, unet, config, timesteps=[600]), 3, 3, 0) for name in ("iPNDM", "DDIM")
    )
    torch.testing.assert_close(one, ddim, rtol=0, atol=1e-5)

    (two,) = sample(make_solver("iPNDM", 2, unet, config, timesteps=[600, 200]), 3, 3, seed=0)
    schedule = HSIVIScheduler.from_config(config)
    x, past = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []
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


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5, 3.0])
@given(num_calls=st.integers(1, 100), start=st.integers(150, 999), end=st.integers(0, 50))
def test_a_power_grid_falls_strictly_from_start_to_end(power, num_calls, start, end):
    grid = power_timesteps(num_calls, start, end, power)
    assert len(grid) == num_calls
    assert grid[0] == start
    assert num_calls == 1 or grid[-1] == end
    assert all(high > low for high, low in itertools.pairwise(grid))


def test_a_power_grid_of_more_calls_than_timesteps_is_refused():
    assert power_timesteps(4, 13, 10, 1.5) == [13, 12, 11, 10]
    assert power_timesteps(5, 700, 30, 1.5) == [700, 465, 267, 114, 30]
    with pytest.raises(ValueError, match="5 network calls: give from 1 to 4, for so many timesteps there are"):
        power_timesteps(5, 13, 10, 1.5)


@pytest.mark.parametrize(("shape", "start"), [((1, 8, 8), 800), ((1, 32, 32), 956)])
def test_a_grid_of_few_steps_starts_where_an_image_begins_to_show(shape, start):
    assert few_step_timesteps(HSIVIScheduler(), shape, 4) == power_timesteps(4, start, 20, 1.5)
