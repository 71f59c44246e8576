"""`training/benchmarks/images/consistency.py`: the function, its loss, and the sampler."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from gaussian_teacher import GaussianTeacher, Network, as_teacher, ddim_step
from hsivi_diffusers import HSIVIScheduler
from tiny_unet import make_unet
from training.benchmarks.images import baseline, consistency
from training.benchmarks.images.consistency import ConsistencyDistillation, distance, make_sampler

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
CLIPS = {"clip_sample": True, "clip_sample_range": 2.0, "thresholding": True, "sample_max_value": 3.0}


def heun_step(schedule, teacher, x, timestep, below):
    """Heun's step of dy / dr = x0, which is the teacher's ODE for y = x / sigma and r = alpha / sigma."""
    (alpha, sigma), (alpha_below, sigma_below) = (schedule.alpha_sigma(each, x) for each in (timestep, below))
    length = alpha_below / sigma_below - alpha / sigma
    first = teacher.clean(x, timestep)
    second = teacher.clean(sigma_below * (x / sigma + length * first), below)
    return sigma_below * (x / sigma + length * (first + second) / 2)


class GaussianConsistency(Network):
    """The consistency function of the Gaussian teacher, affine: where its steps on a grid end, at timestep 0."""

    def __init__(self, schedule, sampler):
        super().__init__(schedule)
        self.sampler = sampler
        teacher, self.ends, below = GaussianTeacher(schedule), {0: (0.0, 1.0)}, 0
        unit = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
        for timestep in reversed(sampler.timesteps.tolist()):
            down = heun_step(schedule, teacher, unit, torch.tensor([timestep]), torch.tensor([below]))
            first, second = down.flatten().tolist()
            shift, slope = self.ends[below]
            self.ends[timestep], below = (shift + slope * first, slope * (second - first)), timestep

    def clean(self, x, timestep):
        shift, slope = torch.tensor([self.ends[int(each)] for each in timestep]).T[..., None, None, None]
        c_skip, c_out = self.sampler.get_scalings_for_boundary_condition_discrete(timestep[:, None, None, None])
        return (shift + slope * x - c_skip * x) / c_out.clamp_min(1e-3)


def gaussian_distillation(prediction_type="epsilon", num_timesteps=10):
    schedule = HSIVIScheduler(prediction_type=prediction_type)
    made = ConsistencyDistillation(as_teacher(GaussianTeacher(schedule), schedule), num_timesteps, start=699)
    made.student, made.target = (GaussianConsistency(schedule, made.sampler) for _ in range(2))
    return made


def tiny_distillation(unet, num_timesteps=50, **config):
    """Three networks of different random weights; the student's are those of the unet."""
    torch.manual_seed(1)
    made = ConsistencyDistillation(as_teacher(make_unet(), HSIVIScheduler(**config)), num_timesteps, start=999)
    made.student.load_state_dict(unet.state_dict())
    made.target.load_state_dict(make_unet().state_dict())
    return made


# ----- the consistency function -----


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clip_sample", [True, False])
def test_the_function_is_what_the_scheduler_of_diffusers_samples(unet, prediction_type, clip_sample):
    made = tiny_distillation(unet, prediction_type=prediction_type, clip_sample=clip_sample)
    x = torch.randn(3, 1, 8, 8)
    for timestep in (999, 499, 19):
        at = torch.full((3,), timestep)
        scheduler = LCMScheduler.from_config(made.sampler.config)
        scheduler.set_timesteps(timesteps=[timestep])
        wanted = scheduler.step(unet(x, at).sample, timestep, x).denoised
        torch.testing.assert_close(made.consistency(unet, made.schedule, x, at), wanted)


@torch.no_grad()
def test_at_timestep_0_the_function_is_the_identity_and_above_it_the_clean_image(unet):
    made = tiny_distillation(unet)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(made.predict(x, torch.zeros(3, dtype=torch.long)), x)
    for timestep in (1, 2, 19):  # c_skip = 1 / (400 t^2 + 1), c_out = (1 + 1 / (400 t^2))^(-1/2)
        at = torch.full((3,), timestep)
        x0, _ = made.schedule.predict(unet(x, at).sample, at, x)
        square = 400 * timestep**2
        wanted = x / (square + 1) + x0 / (1 + 1 / square) ** 0.5
        torch.testing.assert_close(made.predict(x, at), wanted)


def test_the_student_is_not_clipped_and_its_target_is(unet):
    made = tiny_distillation(unet, clip_sample=True)
    x, at = 3 * torch.randn(8, 1, 8, 8), torch.full((8,), 999)
    assert made.predict(x, at).abs().max() > 1
    assert made.aim(x, at).abs().max() <= 1


# ----- the teacher's step -----


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_teacher_looks_at_both_ends_of_a_step_of_ddim_and_the_target_at_its_mean_image(unet, prediction_type):
    made = tiny_distillation(unet, prediction_type=prediction_type, clip_sample=True)
    assert made.grid.tolist() == list(range(999, 0, -20))
    by_teacher, by_target = [], []
    made.teacher.network.register_forward_pre_hook(lambda module, given: by_teacher.append(given))
    made.target.register_forward_pre_hook(lambda module, given: by_target.append(given))
    ddim = DDIMScheduler(
        beta_start=1e-4, prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=False
    )
    ddim.set_timesteps(50)
    x = torch.randn(3, 1, 8, 8)
    for timestep, below in ((999, 979), (519, 499), (19, 0)):
        at, lower = torch.full((3,), timestep), torch.full((3,), below)
        made.aim(x, at)
        (first, _), (down, last) = by_teacher[-2:]
        assert torch.equal(first, x)
        euler = ddim.step(made.teacher.network(x, timestep).sample, timestep, x)
        torch.testing.assert_close(down, euler.prev_sample)
        ends = [
            made.schedule.predict(made.teacher.network(each, t).sample, t, each)[0]
            for each, t in ((x, at), (down, lower))
        ]
        wanted = ddim_step(made.schedule, (ends[0] + ends[1]) / 2, x, at, lower)
        torch.testing.assert_close(by_target[-1][0], wanted)
        assert last.tolist() == by_target[-1][1].tolist() == [below] * 3


# ----- the loss -----


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_loss_of_the_exact_consistency_function_is_nothing(prediction_type):
    made = gaussian_distillation(prediction_type)
    clean = 0.3 + 0.4 * torch.randn(200, 1, 8, 8)
    assert float(made.loss(clean)) < 1e-6
    made.student.shift.fill_(0.05)
    assert float(made.loss(clean)) > 1e-3


def test_the_distance_is_that_of_the_example(monkeypatch):
    monkeypatch.setattr(consistency, "HUBER_C", 3.0)
    one, other = torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0]])
    assert distance(one, other) == pytest.approx((5 - 3 + 18**0.5 - 3) / 2)


def test_the_target_follows_the_student_and_starts_as_it_does(unet):
    made = tiny_distillation(unet)
    before = [parameter.detach().clone() for parameter in made.target.parameters()]
    made.begin_update(0.5)
    for was, now, goal in zip(before, made.target.parameters(), unet.parameters(), strict=True):
        torch.testing.assert_close(now, 0.95 * was + 0.05 * goal)
    fresh = ConsistencyDistillation(as_teacher(make_unet(), HSIVIScheduler()))
    fresh.begin_update(0.0)
    for one, other in zip(fresh.target.parameters(), fresh.student.parameters(), strict=True):
        assert torch.equal(one, other)


# ----- the sampler -----


def test_the_sampler_has_the_clipping_and_noise_levels_of_the_teacher_and_40_of_its_timesteps():
    made = ConsistencyDistillation(as_teacher(make_unet(), HSIVIScheduler()), start=999)
    assert made.grid.tolist() == list(range(999, 0, -25))
    assert made.pipeline().scheduler.config.original_inference_steps == 40
    for options in ({}, CLIPS, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        schedule = HSIVIScheduler(beta_schedule="sigmoid", **options)  # of which LCMScheduler does not know
        for start in (999, 719):
            sampler = make_sampler(schedule, start=start)
            wanted = schedule.alphas_cumprod[: start + 1]
            torch.testing.assert_close(sampler.alphas_cumprod, wanted, rtol=0, atol=1e-7)
            assert {name: sampler.config[name] for name in CLIPS} == {name: schedule.config[name] for name in CLIPS}
            sampler.set_timesteps(2)
            assert sampler.timesteps[0] == start


def test_sampling_starts_at_the_noise_of_stable_diffusion_where_the_clock_has_it():
    linear = make_sampler(HSIVIScheduler())
    alpha = linear.alphas_cumprod.sqrt()
    assert alpha[-1] <= baseline.START_ALPHA < alpha[-2]
    stable_diffusion = HSIVIScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert len(make_sampler(stable_diffusion).betas) == 1000
    assert len(make_sampler(HSIVIScheduler(num_train_timesteps=50)).betas) == 50
