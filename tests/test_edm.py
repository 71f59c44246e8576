"""EDM: the scheduler, teachers and students against the schedulers and pipelines of diffusers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from gaussian_teacher import MEAN, STD, exact_flow
from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVIScheduler, HSIVITrainer, load_teacher
from hsivi_diffusers.distillation import plan, progress
from hsivi_diffusers.distillation.pairs import follow_ode
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.loading import load_student
from hsivi_diffusers.teachers.solvers import SOLVERS, make_scheduler, make_solver, make_student, run_solver
from hsivi_diffusers.teachers.teacher import Teacher
from short_run import train
from slow import others_slow
from tiny_text import PROMPTS
from tiny_unet import make_unet

STOCK = [
    EDMEulerScheduler(),
    EDMDPMSolverMultistepScheduler(),
    EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_max=120.0, sigma_schedule="exponential"),
    EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", num_train_timesteps=500),
]
GIVEN = {"prompts": PROMPTS, "guidance_scale": 3.0, "lora_rank": 4, "critic_updates": 1, "lr_warmup_steps": 0}
GIVEN |= {"max_train_steps": 3, "validation_steps": 3, "learning_rate": 0.03}


def all_levels(schedule):
    """All levels, and s = sigma / alpha of each, shaped (N, 1, 1, 1)."""
    level = torch.arange(len(schedule))
    alpha, sigma = schedule.alpha_sigma(level, torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    return level, (sigma / alpha).float()


def field(z, time):
    """An output that depends on what a network is given."""
    return torch.sin(3 * z) + time


def walk(scheduler, x, network=field):
    """Follows a scheduler as a pipeline does, with its own network input and times."""
    x = x * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, time), time), time, x, return_dict=False)[0]
    return x


def use_levels(stock, schedule, levels):
    """Gives a scheduler of diffusers the sigmas of levels, and returns it."""
    own, s = stock.set_timesteps, all_levels(schedule)[1].flatten()[[*levels]]

    def set_timesteps(num_inference_steps, device=None):
        own(num_inference_steps, device)
        stock.timesteps, stock.sigmas = stock.precondition_noise(s), torch.cat([s, torch.zeros(1)])

    stock.set_timesteps = set_timesteps
    return stock


@pytest.mark.parametrize("stock", STOCK)
def test_input_time_and_prediction_are_those_of_diffusers_at_all_levels(stock):
    schedule = HSIVIScheduler.from_config(stock.config)
    level, s = all_levels(schedule)
    x, output = torch.randn(2, len(schedule), 2, 3, 3)
    y = x * (1 + s.square()).sqrt()
    times = schedule.levels.time(level)
    torch.testing.assert_close(schedule.scale_model_input(x, times), stock.precondition_inputs(y, s))
    torch.testing.assert_close(times, stock.precondition_noise(s.flatten()), rtol=0, atol=1e-6)
    x0, eps = schedule.predict(output, level, x)
    torch.testing.assert_close(x0, stock.precondition_outputs(y, output, s), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(schedule.diffuse(x0, eps, level), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(schedule.levels.level(times), level)


@pytest.mark.parametrize("stock", STOCK)
def test_without_noise_it_is_the_first_order_solver_of_diffusers(stock):
    levels, noise = [450, 300, 160, 20], torch.randn(2, 2, 3, 3)
    ours = HSIVIScheduler.from_config(stock.config, noise_eta=0.0, layer_timesteps=[*levels, -1])
    stock = use_levels(stock.from_config(stock.config, solver_order=1), ours, levels)
    stock.set_timesteps(4)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1e-6)
    y = noise / ours.alpha_sigma(torch.tensor([450]), noise)[0]
    torch.testing.assert_close(walk(ours, noise), walk(stock, y / stock.init_noise_sigma), rtol=1e-5, atol=1e-5)
    given = HSIVIScheduler.from_config(stock.config)
    given.set_timesteps(timesteps=stock.timesteps.tolist())  # the nearest levels
    assert torch.equal(given.timesteps, ours.timesteps)


def test_half_precision_scales_the_input_as_diffusers_does():
    stock = EDMEulerScheduler()
    schedule, x = HSIVIScheduler.from_config(stock.config), torch.randn(2, 2, 3, 3)
    time = schedule.timesteps[300]
    s = (4 * time).exp()
    y = x * (1 + s.square()).sqrt()
    scaled = schedule.scale_model_input(x.bfloat16(), time)
    assert scaled.dtype == torch.bfloat16
    torch.testing.assert_close(scaled.float(), stock.precondition_inputs(y, s), rtol=0.02, atol=0.02)


def test_a_pipeline_of_ours_scales_the_input():
    scheduler = HSIVIScheduler(edm={}, noise_eta=0.0, layer_timesteps=[900, 500, 100, -1])
    unet, noise = make_unet().eval(), torch.randn(2, 1, 8, 8)
    drawn = HSIVIPipeline(unet, scheduler)(2, latents=noise, output_type="latent").images
    with torch.no_grad():
        wanted = walk(scheduler, noise, lambda z, time: unet(z, time).sample)
    torch.testing.assert_close(drawn, wanted)


COSINE = {"_class_name": "CosineDPMSolverMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HSIVIScheduler(edm={"sigma": 1}), "key of edm='sigma' is unknown: choose one of 'sigma_data'"),
        (lambda: HSIVIScheduler(edm={"sigma_data": 0}), "sigma_data=0: give a number > 0"),
        (lambda: HSIVIScheduler(edm={"sigma_max": 1e-3}), "sigma_max=0.001: give a number above sigma_min=0.002"),
        (lambda: HSIVIScheduler(edm=0.5), "edm=0.5: give a dict of sigma_data"),
        (lambda: HSIVIScheduler(edm={}, prediction_type="sample"), "with edm, prediction_type='sample' is unknown"),
        (lambda: HSIVIScheduler.from_config({**STOCK[0].config, **COSINE}), "no betas, and is neither of a rectified"),
        (lambda: HSIVIScheduler(edm={}).set_timesteps(timesteps=[999, 500]), "leave the teacher's clock: give numbers"),
        (
            lambda: HSIVIScheduler(edm={}).set_timesteps(timesteps=[1.0, -500.0]),
            "give numbers from 1.09551 down to -1.55",
        ),
        (lambda: HSIVIScheduler(edm={}).scale_model_input(torch.zeros(1, 1, 2, 2)), "timestep is missing"),
        (lambda: HSIVIScheduler(edm={}).set_timesteps(sigmas=[80.0, 1.0]), "sigmas are of a rectified flow, and this"),
    ],
)
def test_settings_that_are_not_of_edm_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_levels_rise_as_those_of_linear_betas_do():
    linear = all_levels(HSIVIScheduler())[1].flatten()
    schedule = HSIVIScheduler(edm={"sigma_data": 1.0, "sigma_min": float(linear[0]), "sigma_max": float(linear[-1])})
    s = all_levels(schedule)[1].flatten()
    torch.testing.assert_close(s[[0, -1]], linear[[0, -1]])
    torch.testing.assert_close(s[100:], linear[100:], rtol=0.06, atol=0)


def test_the_clock_does_not_depend_on_the_unit_of_the_data():
    small, large = (
        clock_of(HSIVIScheduler(edm={"sigma_data": d, "sigma_min": 0.01 * d, "sigma_max": 160 * d})) for d in (0.5, 2.0)
    )
    for signal in (0.3, 3.2, 100.0):
        assert small.signal_level((4, 64, 64), signal) == large.signal_level((4, 64, 64), signal)
    assert small.pair_levels(15) == large.pair_levels(15)


@pytest.fixture(scope="module")
def folder(text_teachers):
    return text_teachers("playground")


@pytest.fixture(scope="module")
def teacher(folder):
    teacher = load_teacher(str(folder))
    teacher.encode_prompts(PROMPTS, "", torch.device("cpu"))
    return teacher


@pytest.fixture(scope="module")
def trainer(folder, tmp_path_factory):
    """Of a run of 3 updates, which draws samples of teacher and student."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "TEACHER_STEPS", 2)
        return train(folder, tmp_path_factory.mktemp("edm") / "run", **GIVEN)


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", **options}
    return pipeline(PROMPTS, generator=torch.Generator().manual_seed(5), **given).images


@torch.no_grad()
def test_the_clean_image_of_a_teacher_is_that_of_its_scheduler(teacher):
    stock, (level, s) = EDMDPMSolverMultistepScheduler(), all_levels(teacher.schedule)
    level, s = level[::37], s[::37]
    y = torch.randn(len(s), 4, 8, 8) * (0.25 + s.square()).sqrt()
    condition = torch.arange(len(s)) % 3
    x0, _ = teacher.denoise(teacher.network, y / (1 + s.square()).sqrt(), level, condition)
    z, times = stock.precondition_inputs(y, s), stock.precondition_noise(s.flatten())
    output = teacher.network(z, times, **teacher.arguments(condition, z)).sample
    torch.testing.assert_close(x0, stock.precondition_outputs(y, output, s), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", others_slow([1.0, 3.0], 3.0))
def test_a_solver_of_the_guided_teacher_draws_what_the_stock_pipeline_draws(teacher, folder, scale):
    """A multistep one; the latents have a mean and a standard deviation."""
    levels, stock = range(999, -1, -111), DiffusionPipeline.from_pretrained(folder)
    use_levels(stock.scheduler, teacher.schedule, levels)
    images = draw(stock, num_inference_steps=10, guidance_scale=scale)
    solver = make_solver("DPM-Solver++", 10, Guided(teacher, [scale]), levels)
    drawn = solver(3, torch.Generator().manual_seed(5), torch.arange(3))
    torch.testing.assert_close(drawn, images, rtol=0, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("clips", others_slow([False, True], True))
def test_solvers_see_betas_at_the_same_levels_and_v(teacher, clips, monkeypatch):
    monkeypatch.setattr(teacher, "schedule", HSIVIScheduler.from_config(teacher.schedule.config, clip_sample=clips))
    levels, noise, condition = [800, 500, 200, 20], torch.randn(3, 4, 8, 8), torch.arange(3)
    schedule = HSIVIScheduler.from_config(teacher.schedule.config, layer_timesteps=[*levels, -1], noise_eta=0.0)
    wanted = run_solver(Guided(teacher), schedule, noise, 4, condition)
    solver = make_solver("DDIM", 4, Guided(teacher), levels)
    drawn = run_solver(solver.call, solver.scheduler, noise, 4, condition)
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    for method in {*SOLVERS} - clock_of(teacher.schedule).unsupported:
        drawn = run_solver(solver.call, make_scheduler(method, teacher.schedule)[0], noise, 3, condition)
        assert drawn.isfinite().all()


class StubTeacher:
    """Its guided prediction is the scale."""

    embeds_guidance, network, num_rows = False, None, 2

    def __init__(self, schedule):
        self.schedule = schedule

    def set_guidance(self, w):
        pass

    def call(self, network, x, time, condition):
        return x

    def guide(self, of_condition, of_none, w):
        return w


def test_guidance_decays_from_its_scale_to_none():
    """Though times of the network are negative where there is little noise."""
    scheduler = HSIVIScheduler(edm={})
    time = scheduler.levels.time(torch.tensor([0, 250, 500, 800]))
    guided = Guided(StubTeacher(scheduler), [3.0], end=float(time[2]))
    w = guided(torch.zeros(4, 1, 1, 1), time, torch.zeros(4, dtype=torch.long)).flatten()
    assert w.tolist() == [3, 2, 1, 1]


def test_the_stock_pipeline_draws_with_the_file_what_the_trainer_draws(trainer, folder):
    saved = Path(trainer.config.output_dir) / "pipeline"
    stock = DiffusionPipeline.from_pretrained(folder)
    scheduler = HSIVIScheduler.from_pretrained(saved, subfolder="scheduler")
    stock.scheduler = scheduler
    untrained = draw(stock)
    stock.load_lora_weights(saved, weight_name=ADAPTER)
    images = draw(stock)
    torch.testing.assert_close(images, draw(trainer.pipeline), rtol=0, atol=1e-5)
    assert (images - untrained).abs().max() > 0.01
    student = load_student(saved)
    drawn = make_student(student, trainer.state.teacher)(3, torch.Generator().manual_seed(5), torch.arange(3))
    torch.testing.assert_close(drawn, images, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_equals_one_at_once(trainer, folder, tmp_path, differences):
    run = Path(trainer.config.output_dir)
    other = shutil.copytree(run, tmp_path / "run")
    for name in ("checkpoints/checkpoint-3", "pipeline", "critic"):
        shutil.rmtree(other / name)
    (other / "training.json").unlink()
    HSIVITrainer(str(folder), replace(trainer.config, output_dir=str(other))).train("latest")
    assert differences(other, run) == []


@pytest.mark.slow
def test_a_plan_is_made_of_the_configs_alone(folder, tmp_path):
    """With pairs, whose solver calls the network at other times."""
    configs = shutil.copytree(folder, tmp_path / "configs")
    for weights in configs.rglob("*.safetensors"):
        weights.unlink()
    config = HSIVIConfig(**{**GIVEN, "num_inference_steps": 1, "num_pairs": 2, "train_batch_size": 2})
    assert plan.measure(str(configs), None, config)


class EDMNetwork(torch.nn.Module):
    """The network of EDM whose clean image is exact, for pixels N(MEAN, STD^2); E x0^2 is sigma_data^2 = 0.25."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, z, time):
        s, d = (4 * time).exp().reshape(-1, 1, 1, 1), 0.5
        y = z * (s**2 + d**2).sqrt()
        clean = (STD**2 * y + s**2 * MEAN) / (STD**2 + s**2)
        skip, out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
        return (clean - skip * y) / out + self.shift


def test_pairs_of_a_network_of_your_own_are_the_exact_flow():
    teacher = Teacher(EDMNetwork(), HSIVIScheduler(edm={}), (1, 8, 8))
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = follow_ode(Guided(teacher), noise, num_steps=60).squeeze(1)
    wanted = exact_flow(teacher.schedule, noise, torch.tensor([999]), torch.tensor([-1]))
    torch.testing.assert_close(images, wanted, rtol=0, atol=2e-3)
