import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.distillation.output import Output
from hsivi_diffusers.evaluation.solvers import Solver
from tiny_unet import make_unet
from training.benchmarks.images import train_consistency, training_loop
from training.benchmarks.images.train_consistency import (
    Distiller,
    Training,
    distance,
    learning_rate,
    make_sampler,
)

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


class Network(torch.nn.Module):
    """Answers with a given clean picture, in the prediction of the schedule; one parameter shifts the answer."""

    device = torch.device("cpu")

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, timestep):
        alpha, sigma = self.schedule.alpha_sigma(timestep, x)
        x0 = self.clean(x, timestep)
        noise = (x - alpha * x0) / sigma
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
        return UNet2DOutput(sample=output[self.schedule.config.prediction_type] + self.shift)


class GaussianTeacher(Network):
    """The exact network for data N(0.3, 0.4^2) in each pixel."""

    def clean(self, x, timestep):
        alpha, sigma = self.schedule.alpha_sigma(timestep, x)
        return 0.3 + 0.16 * alpha * (x - 0.3 * alpha) / (0.16 * alpha**2 + sigma**2)


class GaussianConsistency(Network):
    """The consistency function of that teacher, affine: where its DDIM steps on a grid end, at timestep 0."""

    def __init__(self, schedule, sampler):
        super().__init__(schedule)
        self.sampler = sampler
        sampler.set_timesteps(sampler.config.original_inference_steps)
        teacher, ends, below = GaussianTeacher(schedule), {0: (0.0, 1.0)}, 0
        for timestep in reversed(sampler.timesteps.tolist()):
            at, unit = torch.tensor([timestep]), torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
            x0, noise = schedule.predict(teacher(unit, at).sample, at, unit)
            alpha, sigma = schedule.alpha_sigma(torch.tensor([below]), unit)
            first, second = (alpha * x0 + sigma * noise).flatten().tolist()
            shift, slope = ends[below]
            ends[timestep], below = (shift + slope * first, slope * (second - first)), timestep
        self.ends = ends

    def clean(self, x, timestep):
        shift, slope = torch.tensor([self.ends[int(each)] for each in timestep]).T[..., None, None, None]
        c_skip, c_out = self.sampler.get_scalings_for_boundary_condition_discrete(timestep[:, None, None, None])
        return (shift + slope * x - c_skip * x) / c_out.clamp_min(1e-3)


def gaussian_distiller(prediction_type="epsilon", num_timesteps=10):
    schedule = HSIVIScheduler(prediction_type=prediction_type)
    sampler = make_sampler(schedule, num_timesteps, start=699)
    student, target = GaussianConsistency(schedule, sampler), GaussianConsistency(schedule, sampler)
    return Distiller(GaussianTeacher(schedule), student, target, schedule, sampler)


def tiny_distiller(unet, **config):
    schedule = HSIVIScheduler(**config)
    torch.manual_seed(1)
    return Distiller(make_unet(), unet, make_unet(), schedule, make_sampler(schedule, 50, start=999))


@pytest.fixture(scope="module")
def train(teacher, tmp_path_factory):
    """Trains for 3 steps of 4 rows and returns the output folder."""

    def run(*arguments):
        folder = tmp_path_factory.mktemp("consistency") / "run"
        settings = [f"--pretrained_teacher_model={teacher}", "--max_train_steps=3", "--train_batch_size=4"]
        train_consistency.main([*settings, "--lr_warmup_steps=1", f"--output_dir={folder}", *arguments])
        return folder

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train()


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def run_for(distiller, training, folder):
    """Trains on ten images of noise."""
    images, output = torch.randn(10, 1, 8, 8), Output(str(folder))
    return train_consistency.train(distiller, images, training, output, Accelerator(), {})


# ----- the consistency function -----


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clip_sample", [True, False])
def test_the_function_is_what_the_scheduler_of_diffusers_samples(unet, prediction_type, clip_sample):
    distiller = tiny_distiller(unet, prediction_type=prediction_type, clip_sample=clip_sample)
    x = torch.randn(3, 1, 8, 8)
    for timestep in (999, 499, 19):
        at = torch.full((3,), timestep)
        scheduler = LCMScheduler.from_config(distiller.sampler.config)
        scheduler.set_timesteps(timesteps=[timestep])
        wanted = scheduler.step(unet(x, at).sample, timestep, x).denoised
        torch.testing.assert_close(distiller.consistency(unet, distiller.schedule, x, at), wanted)


@torch.no_grad()
def test_at_timestep_0_the_function_is_the_identity_and_above_it_the_clean_picture(unet):
    distiller = tiny_distiller(unet)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(distiller.predict(x, torch.zeros(3, dtype=torch.long)), x)
    for timestep in (1, 2, 19):  # c_skip = 1 / (400 t^2 + 1), c_out = (1 + 1 / (400 t^2))^(-1/2)
        at = torch.full((3,), timestep)
        x0, _ = distiller.schedule.predict(unet(x, at).sample, at, x)
        square = 400 * timestep**2
        wanted = x / (square + 1) + x0 / (1 + 1 / square) ** 0.5
        torch.testing.assert_close(distiller.predict(x, at), wanted)


def test_the_student_is_not_clipped_and_its_target_is(unet):
    distiller = tiny_distiller(unet, clip_sample=True)
    x, at = 3 * torch.randn(8, 1, 8, 8), torch.full((8,), 999)
    assert distiller.predict(x, at).abs().max() > 1
    assert distiller.aim(x, at).abs().max() <= 1


# ----- the loss -----


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_target_sees_the_next_picture_of_ddim_on_the_grid_of_the_sampler(unet, prediction_type):
    distiller = tiny_distiller(unet, prediction_type=prediction_type, clip_sample=True)
    assert distiller.grid.tolist() == list(range(999, 0, -20))
    seen = []
    distiller.target.register_forward_pre_hook(lambda module, given: seen.append(given))
    ddim = DDIMScheduler(
        beta_start=1e-4, prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=False
    )
    ddim.set_timesteps(50)
    x = torch.randn(3, 1, 8, 8)
    for timestep, below in ((999, 979), (519, 499), (19, 0)):
        distiller.aim(x, torch.full((3,), timestep))
        wanted = ddim.step(distiller.teacher(x, timestep).sample, timestep, x).prev_sample
        torch.testing.assert_close(seen[-1][0], wanted)
        assert seen[-1][1].tolist() == [below] * 3


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_loss_of_the_exact_consistency_function_is_nothing(prediction_type):
    distiller = gaussian_distiller(prediction_type)
    clean = 0.3 + 0.4 * torch.randn(200, 1, 8, 8)
    assert float(distiller.loss(clean)) < 1e-6
    distiller.student.shift.fill_(0.05)
    assert float(distiller.loss(clean)) > 1e-3


def test_one_step_of_the_exact_consistency_function_draws_the_data():
    distiller = gaussian_distiller(num_timesteps=100)
    start = torch.randn(1000, 1, 8, 8)
    with torch.no_grad():
        images = distiller.predict(start, torch.full((1000,), 699))
    assert images.mean() == pytest.approx(0.3, abs=0.03)
    assert images.std() == pytest.approx(0.4, abs=0.03)


def test_only_the_student_is_trained(unet):
    distiller = tiny_distiller(unet)
    distiller.loss(torch.randn(4, 1, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())
    for fixed in (distiller.teacher, distiller.target):
        assert all(parameter.grad is None for parameter in fixed.parameters())


def test_the_distance_is_that_of_the_example(monkeypatch):
    monkeypatch.setattr(train_consistency, "HUBER_C", 3.0)
    one, other = torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0]])
    assert distance(one, other) == pytest.approx((5 - 3 + 18**0.5 - 3) / 2)


def test_the_target_follows_the_student(unet):
    distiller = tiny_distiller(unet)
    before = [parameter.detach().clone() for parameter in distiller.target.parameters()]
    distiller.move_target()
    for was, now, goal in zip(before, distiller.target.parameters(), unet.parameters(), strict=True):
        torch.testing.assert_close(now, 0.95 * was + 0.05 * goal)


def test_the_learning_rate_warms_up_by_updates_and_falls_by_the_share_of_the_run():
    training = Training(learning_rate=2.0, lr_warmup_steps=4)
    assert [learning_rate(step, 0.0, training) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert [round(learning_rate(9, share, training), 9) for share in (0.5, 1.0, 1.5)] == [1.0, 0.0, 0.0]


# ----- the sampler -----


def test_the_sampler_has_the_noise_levels_of_the_teacher_up_to_its_start():
    for options in ({}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        schedule = HSIVIScheduler(beta_schedule="sigmoid", **options)  # of which LCMScheduler does not know
        whole = make_sampler(schedule, start=999)
        part = make_sampler(schedule, start=699)
        torch.testing.assert_close(whole.alphas_cumprod, schedule.alphas_cumprod, rtol=0, atol=1e-7)
        torch.testing.assert_close(part.alphas_cumprod, schedule.alphas_cumprod[:700], rtol=0, atol=1e-7)
        part.set_timesteps(2)
        assert part.timesteps[0] == 699


def test_sampling_starts_at_the_noise_of_stable_diffusion_where_the_clock_has_it():
    linear = make_sampler(HSIVIScheduler())
    alpha = linear.alphas_cumprod.sqrt()
    assert alpha[-1] <= train_consistency.START_ALPHA < alpha[-2]
    stable_diffusion = HSIVIScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert len(make_sampler(stable_diffusion).betas) == 1000
    assert len(make_sampler(HSIVIScheduler(num_train_timesteps=50)).betas) == 50


def test_the_sampler_clips_as_the_teacher_does():
    clips = {"clip_sample": True, "clip_sample_range": 2.0, "thresholding": True, "sample_max_value": 3.0}
    for options in ({}, clips):
        schedule = HSIVIScheduler(**options)
        sampler = make_sampler(schedule)
        assert {name: sampler.config[name] for name in clips} == {name: schedule.config[name] for name in clips}


# ----- runs -----


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_saved_folder_samples_in_diffusers_as_the_sampler_of_the_report(trained, num_steps):
    pipeline = DiffusionPipeline.from_pretrained(trained / "pipeline")
    assert type(pipeline) is DDPMPipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, torch.Generator().manual_seed(5), num_inference_steps=num_steps, output_type="np").images
    sampler = Solver(LCMScheduler.from_config(pipeline.scheduler.config), num_steps, pipeline.unet)
    wanted = sampler(3, torch.Generator().manual_seed(5)).permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(images), wanted)
    assert images.std() > 0.05


def test_a_pipeline_is_there_whole_or_not_at_all(tmp_path, monkeypatch, train):
    def write_half(pipeline, folder):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", write_half)
    with pytest.raises(OSError, match="no space left"):
        train(f"--output_dir={tmp_path}")
    assert not (tmp_path / "pipeline").exists()


def test_training_json_holds_the_cost_and_the_options(trained, teacher):
    record = json.loads((trained / "training.json").read_text())
    wanted = {"pretrained_teacher_model": str(teacher), "seed": 0, "max_train_steps": 3, "train_batch_size": 4}
    assert wanted.items() <= record.items()
    assert record["network_calls"] == 36
    assert 0 < record["seconds"] < 60


def test_the_network_calls_are_the_rows_that_the_networks_see(unet, tmp_path):
    distiller, rows = tiny_distiller(unet), []
    for network in (distiller.teacher, distiller.student, distiller.target):
        network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    training = Training(max_train_steps=3, train_batch_size=5)
    run_for(distiller, training, tmp_path)
    assert sum(rows) == 3 * 3 * 5


def test_a_run_is_a_function_of_its_seed(train, trained, same_tensors):
    assert same_tensors(weights(train("--seed=0")), weights(trained))
    assert not same_tensors(weights(train("--seed=1")), weights(trained))


def test_half_precision_changes_the_networks_and_not_much_of_the_result(train, trained):
    full, half = weights(trained), weights(train("--mixed_precision=bf16"))
    assert all(value.dtype == torch.float32 for value in half.values())
    difference = torch.stack([(half[name] - full[name]).abs().max() for name in full]).max()
    assert 0 < difference < 0.02


def test_the_averaged_weights_are_saved(unet, tmp_path, monkeypatch):
    """The first update sets the average, the others enter it with 1 - decay."""
    visited = []

    class Recorded(training_loop.EMAModel):
        def step(self, parameters):
            visited.append(parameters[0].detach().clone())
            super().step(parameters)

    monkeypatch.setattr(training_loop, "EMAModel", Recorded)
    monkeypatch.setattr(train_consistency, "EMA_DECAY", 0.15)
    run_for(tiny_distiller(unet), Training(max_train_steps=3, train_batch_size=4, lr_warmup_steps=1), tmp_path)
    first, second, third = visited
    assert not torch.equal(first, second)
    torch.testing.assert_close(next(unet.parameters()), first.lerp(second, 0.85).lerp(third, 0.85), rtol=0, atol=1e-6)


def test_the_clock_ends_a_run_and_lets_the_learning_rate_fall(unet, tmp_path, monkeypatch):
    """The clock here moves one second each time it is read: once at the start, once for each update."""
    rates = []
    make = train_consistency.learning_rate
    monkeypatch.setattr(train_consistency, "learning_rate", lambda *given: rates.append(make(*given)) or rates[-1])
    clock = itertools.count(100.0)
    monkeypatch.setattr(training_loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    training = Training(max_train_steps=1, max_train_seconds=4.0, train_batch_size=2, learning_rate=1.0)
    training.lr_warmup_steps = 0
    ended = run_for(tiny_distiller(unet), training, tmp_path)
    assert ended == (4, 4.0)
    assert rates == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


def test_a_budget_of_seconds_is_kept_by_the_clock_on_the_wall(train):
    folder = train("--max_train_steps=1000000", "--max_train_seconds=0.2")
    record = json.loads((folder / "training.json").read_text())
    assert 0.2 <= record["seconds"] < 20
    assert 1 <= record["max_train_steps"] < 1000


def test_a_loss_that_is_not_finite_stops_the_run(train, monkeypatch):
    monkeypatch.setattr(train_consistency, "distance", lambda *given: given[0].sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0: lower --learning_rate"):
        train()


# ----- refusals -----


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--pretrained_teacher_model=", "--pretrained_teacher_model is missing: give a folder or repo id"),
        ("--pretrained_teacher_model=./nowhere", "teacher './nowhere' is not a folder"),
    ],
)
def test_what_cannot_run_is_refused(train, argument, message):
    with pytest.raises(ValueError, match=message):
        train(argument)


def test_a_folder_named_like_the_organisation_of_a_repo_is_no_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = train_consistency.Teacher(pretrained_teacher_model="google/pipeline")
    train_consistency.check_options(teacher, Output(output_dir="google"))


@pytest.mark.parametrize(
    "options",
    [{"num_class_embeds": 3}, {"out_channels": 2}, {"in_channels": 2, "out_channels": 2}, {"sample_size": (8, 16)}],
    ids=["classes", "learned variance", "two channels", "wide"],
)
def test_a_teacher_that_does_not_suit_is_refused(train, tmp_path, options):
    DDPMPipeline(unet=make_unet(**options), scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has classes, a learned variance, or images of another shape"):
        train(f"--pretrained_teacher_model={tmp_path}")


def test_a_filled_output_folder_is_refused_before_work_unless_overwritten(trained, train, tmp_path, monkeypatch):
    (tmp_path / "precious").touch()
    with monkeypatch.context() as patched:
        patched.setattr(train_consistency, "load_teacher", lambda *given: pytest.fail("work was begun"))
        with pytest.raises(ValueError, match="is not empty"):
            train(f"--output_dir={tmp_path}")
    train(f"--output_dir={tmp_path}", "--overwrite_output_dir")
    assert weights(tmp_path).keys() == weights(trained).keys()


def test_help(check_help):
    check_help(train_consistency.main, "teacher and data", "training", "run")
