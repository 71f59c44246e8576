"""`training/benchmarks/images/progressive.py`: the aim, the stages, and what is saved."""

import pytest
import torch

from gaussian_teacher import GaussianTeacher, Network, as_teacher, ddim_step
from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from tiny_unet import make_unet
from training.benchmarks.images.baseline import default_start
from training.benchmarks.images.progressive import ProgressiveDistillation

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


class TwoSteps(Network):
    """The exact student of a teacher: one DDIM step of it, on every second timestep of a grid, is two of the teacher.

    Where z_s = a_s x0 + s_s (z - a_t x0) / s_t, the clean image is x0 = (z_s - z s_s / s_t) / (a_s - a_t s_s / s_t).
    """

    def __init__(self, schedule, grid, teacher):
        super().__init__(schedule)
        self.grid, self.teacher = grid, teacher

    def clean(self, x, timestep):
        place = (timestep.reshape(-1, 1) == self.grid).int().argmax(1)
        middle, below = self.grid[place + 1], self.grid[place + 2]
        half = ddim_step(self.schedule, self.teacher.clean(x, timestep), x, timestep, middle)
        end = ddim_step(self.schedule, self.teacher.clean(half, middle), half, middle, below)
        (alpha, sigma), (alpha_below, sigma_below) = (self.schedule.alpha_sigma(at, x) for at in (timestep, below))
        share = sigma_below / sigma
        return (end - share * x) / (alpha_below - share * alpha)


def exact_students(made):
    """The teacher of the first stage, and the exact student of each stage."""
    networks = [made.former]
    for stage in range(made.num_stages):
        networks.append(TwoSteps(made.schedule, made.grid[:: 2**stage], networks[-1]))
    return networks


def gaussian_distillation(num_steps=2, num_stages=3, **config):
    schedule = HSIVIScheduler(**config)
    return ProgressiveDistillation(as_teacher(GaussianTeacher(schedule), schedule), num_steps, num_stages, start=800)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_loss_of_the_exact_student_is_nothing_in_each_stage(prediction_type):
    made = gaussian_distillation(prediction_type=prediction_type)
    assert made.grid.tolist() == list(range(800, -1, -50))
    clean = 0.3 + 0.4 * torch.randn(100, 1, 8, 8)
    networks = exact_students(made)
    for stage in range(3):
        made.stage.fill_(stage)
        made.former, made.student = networks[stage : stage + 2]
        assert float(made.loss(clean)) < 1e-7
        made.student.shift.fill_(0.05)
        assert float(made.loss(clean)) > 1e-3
        made.student.shift.fill_(0.0)


@torch.no_grad()
def test_one_step_to_the_aim_ends_where_two_steps_of_a_teacher_that_clips_do():
    schedule = HSIVIScheduler(clip_sample=True)
    made = ProgressiveDistillation(as_teacher(make_unet().eval(), schedule), 2)
    z = torch.randn(2, 1, 8, 8)
    t, u, s = (torch.tensor(each) for each in ([900, 500], [700, 450], [600, 0]))
    first, _ = schedule.predict(made.former(z, t).sample, t, z)
    half = ddim_step(schedule, first, z, t, u)
    second, _ = schedule.predict(made.former(half, u).sample, u, half)
    wanted = ddim_step(schedule, second, half, u, s)
    torch.testing.assert_close(ddim_step(schedule, made.aim(z, t, u, s), z, t, s), wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_errors_at_little_noise_weigh_by_the_ratio_of_signal_to_noise_and_at_more_by_one():
    made = gaussian_distillation(num_steps=1, num_stages=1)
    made.student = exact_students(made)[1]
    made.aim = lambda z, t, u, s, condition: made.student.clean(z, t) - 0.5
    for timestep in (600, 20):
        made.grid = torch.tensor([timestep, 10, 0])
        made.student.grid = made.grid
        abar = made.schedule.alphas_cumprod[timestep]
        weight = max(1.0, float(abar / (1 - abar)))
        assert float(made.loss(torch.zeros(3, 1, 8, 8))) == pytest.approx(0.25 * weight, rel=1e-3)


def test_a_stage_begins_at_equal_shares_of_a_run_and_makes_the_student_the_teacher(same_tensors):
    unet, seen = make_unet(), []
    given = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    made = ProgressiveDistillation(as_teacher(unet, HSIVIScheduler()), 1, num_stages=4)
    for share in (0.0, 0.2, 0.25, 0.3, 0.5, 0.74, 0.75, 0.99):
        before = made.former.conv_in.weight.clone()
        with torch.no_grad():
            made.student.conv_in.weight.add_(1)
        made.begin_update(share)
        follows = torch.equal(made.former.conv_in.weight, made.student.conv_in.weight)
        assert follows or torch.equal(made.former.conv_in.weight, before)
        seen.append((int(made.stage), follows))
    assert seen == [*[(0, False), (0, False), (1, True), (1, False)], *[(2, True), (2, False), (3, True), (3, False)]]
    assert same_tensors(unet.state_dict(), given)  # the caller's stays as it is


@pytest.mark.parametrize(("stage", "stride"), [(0, 50), (1, 100), (2, 200)])
def test_the_steps_of_a_stage_are_twice_those_of_its_teacher(monkeypatch, stage, stride):
    made, seen = gaussian_distillation(num_steps=4), []
    made.stage.fill_(stage)
    made.student = Network(made.schedule)
    made.student.clean = lambda x, timestep: x

    def aim(z, t, u, s, condition):
        seen.append(torch.stack([t, u, s]))
        return z

    monkeypatch.setattr(made, "aim", aim)
    made.loss(torch.zeros(200, 1, 8, 8))
    t, u, s = seen[0]
    assert sorted(set(t.tolist())) == list(range(stride, 801, stride))
    assert set((t - u).tolist()) == set((u - s).tolist()) == {stride // 2}


def test_the_saved_pipeline_has_the_grid_of_the_last_stage_and_adds_no_noise(train_baseline):
    folder = train_baseline("--method=progressive", "--num_inference_steps=4", "--num_stages=2")
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    grid = HSIVIScheduler.make_layer_timesteps(16, "uniform", 1000, default_start(pipeline.scheduler))
    assert config.layer_timesteps == grid[::4]
    assert (config.noise_eta, config.kernel) == (0.0, "ddim")
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, given: calls.append(int(given[1])))
    images = pipeline(2, torch.Generator().manual_seed(0), output_type="pt").images
    assert calls == grid[:-1:4]
    assert images.shape == (2, 1, 8, 8)
