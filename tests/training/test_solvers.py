import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, LCMScheduler

from hsivi_diffusers.evaluation.solvers import Solver, make_solver, sample
from tiny_unet import make_unet


@pytest.fixture
def consistency_model(unet):
    """A pipeline of random weights with the scheduler that train_consistency.py writes."""
    config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True}
    return DDPMPipeline(unet=unet, scheduler=LCMScheduler(**config))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_consistency_model_is_sampled_as_by_a_pipeline_of_diffusers(consistency_model, num_steps):
    calls = []
    unet = consistency_model.unet
    sampler = Solver(LCMScheduler.from_config(consistency_model.scheduler.config), num_steps, unet)
    handle = unet.register_forward_pre_hook(lambda module, given: calls.append(int(given[1])))
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
