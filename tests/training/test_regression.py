"""`training/benchmarks/images/regression.py`: the pairs, their loss, and what is saved."""

import json

import pytest
import torch

from gaussian_teacher import GaussianTeacher, Network, as_teacher, exact_flow
from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from hsivi_diffusers.distillation.pairs import PAIR_CALLS
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import make_solver, sample
from tiny_unet import make_unet
from training.benchmarks.images.regression import PairRegression


class ExactMap(Network):
    """Where the ODE of the Gaussian teacher leads noise from the end of its clock."""

    def clean(self, x, timestep):
        last = torch.tensor([len(self.schedule) - 1])
        return exact_flow(self.schedule, x, last, torch.tensor([-1]))


def images_of(made):
    """The clean images that the ends of the pairs stand for."""
    scheduler, t = made.layers.scheduler, torch.zeros(1, dtype=torch.long)
    noise, (end,) = made.pairs.noise, made.pairs.mean.unbind(1)
    layer = scheduler.layers.coefficients(scheduler.input_level(t), noise, scheduler.output_level(t))
    return layer.invert(end, noise)[0]


def test_the_loss_is_half_the_squared_distance_of_clean_images_of_pairs(unet):
    made = PairRegression(as_teacher(unet, HSIVIScheduler(clip_sample=True)), num_pairs=10)
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter.mul_(1.1)
    made.pairs  # noqa: B018  # the noise of the pairs is drawn
    torch.manual_seed(3)
    loss = made.loss(torch.empty(6, 1, 8, 8))
    torch.manual_seed(3)
    index = torch.randint(10, (6,))
    x, start = made.pairs.noise[index], made.layers.scheduler.input_level(torch.zeros(6, dtype=torch.long))
    alpha, sigma = made.schedule.alpha_sigma(start, x)
    x0 = (x - sigma * made.student(x, start).sample) / alpha  # not clipped
    wanted = (x0 - images_of(made)[index]).square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)


def test_a_pair_is_noise_and_where_a_solver_of_the_teacher_leads_it(unet):
    made = PairRegression(as_teacher(unet, HSIVIScheduler()), num_pairs=5)
    levels = clock_of(made.schedule).pair_levels(PAIR_CALLS)
    solver = make_solver("UniPC", PAIR_CALLS, Guided(made.teacher), levels)
    solver.scheduler.set_timesteps(PAIR_CALLS)
    x = made.pairs.noise
    with torch.no_grad():
        for timestep in solver.scheduler.timesteps:
            x = solver.scheduler.step(unet(x, timestep).sample, timestep, x).prev_sample
    torch.testing.assert_close(images_of(made), x.clamp(-1, 1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_exact_map_of_a_gaussian_teacher_has_almost_no_loss():
    """What is left is the error of the solver, and of the images that are clipped."""
    schedule = HSIVIScheduler()
    made = PairRegression(as_teacher(GaussianTeacher(schedule), schedule), num_pairs=200)
    made.layers.network = ExactMap(schedule)
    clean = torch.empty(500, 1, 8, 8)
    assert float(made.loss(clean)) / 64 < 0.01 * 0.4**2
    made.layers.network.shift.fill_(0.2)
    assert float(made.loss(clean)) / 64 > 0.1 * 0.4**2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_noise_is_taken_for_that_of_our_students_of_one_call(channels):
    schedule = HSIVIScheduler()
    teacher = as_teacher(make_unet(in_channels=channels, out_channels=channels), schedule)
    start, end = PairRegression(teacher, 1).layers.scheduler.config.layer_timesteps
    alpha, sigma = schedule.alpha_sigma(torch.tensor([start - 1, start]), torch.zeros(2))
    above, at = (sigma / (channels**0.5 * alpha)).tolist()
    assert above < 2.5 <= at
    assert end == 0
    told = PairRegression(teacher, 1, start=700)
    assert told.layers.scheduler.config.layer_timesteps == [700, 0]


def test_pairs_follow_their_seed_and_no_evaluation_starts_from_their_noise(unet):
    noise = [PairRegression(as_teacher(unet, HSIVIScheduler()), 100, seed=seed).pairs.noise for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    started = []

    def draw(batch_size, generator):
        started.append(torch.randn(batch_size, 1, 8, 8, generator=generator))
        return started[-1]

    assert len([*sample(draw, 100, 50, seed=0)]) == 2
    for one, other in ((noise[0], noise[2]), (noise[0], torch.cat(started))):
        assert torch.cdist(one.flatten(1), other.flatten(1)).min() > 1


def test_the_saved_pipeline_has_one_step_without_noise_and_training_json_the_cost_of_the_pairs(train_baseline):
    folder = train_baseline("--method=regression", "--num_pairs=10", "--start_timestep=800")
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    config = pipeline.scheduler.config
    assert config.layer_timesteps == [800, 0]
    assert (config.noise_eta, config.clip_sample, config.thresholding) == (0.0, False, False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, output_type="pt").images.shape == (2, 1, 8, 8)
    record = json.loads((folder / "training.json").read_text())
    assert record["network_calls"] == 10 * PAIR_CALLS + 3 * 4
