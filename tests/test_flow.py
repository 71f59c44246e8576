"""Rectified flows: the scheduler on their clock, against the schedulers of diffusers."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from gaussian_teacher import MEAN, STD, GaussianTeacher
from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVIScheduler, HSIVITrainer, TeacherBridge, load_teacher
from hsivi_diffusers.distillation import updates
from hsivi_diffusers.distillation.networks import make_scheduler
from hsivi_diffusers.scheduling_hsivi import _noise_of
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import make_solver, run_solver
from hsivi_diffusers.teachers.teacher import Teacher
from short_run import SETTINGS
from tiny_unet import make_unet

SHAPE = (2, 3, 4, 4)
SIGMAS = [1.0, 0.9, 0.55, 0.2, 0.05]


def flow(**options):
    return HSIVIScheduler(prediction_type="flow_prediction", **options)


def field(x, time):
    """A velocity that depends on x and on the time."""
    return torch.sin(3 * x) + time / 1000


def walk(scheduler, x, **options):
    """Follows a scheduler from x, as a pipeline does."""
    for time in scheduler.timesteps:
        x = scheduler.step(field(x, time), time, x, **options).prev_sample
    return x


DYNAMIC = {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.02},
        DYNAMIC,
        {**DYNAMIC, "time_shift_type": "linear"},
        {**DYNAMIC, "shift_terminal": 0.1},
    ],
)
@pytest.mark.parametrize(
    "grid", [{"sigmas": SIGMAS}, {"sigmas": torch.linspace(1, 1 / 28, 28).numpy()}, {"num_inference_steps": 28}]
)
def test_without_noise_it_is_the_euler_method_of_diffusers(options, grid):
    """Whether a pipeline sends a grid or leaves it to the scheduler."""
    stock = FlowMatchEulerDiscreteScheduler(**options)
    ours = HSIVIScheduler.from_config(stock.config, noise_eta=0.0)
    mu = {"mu": 1.15} if options.get("use_dynamic_shifting") else {}
    for scheduler in (ours, stock):
        scheduler.set_timesteps(**grid, **mu)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=1e-6)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(walk(ours, x), walk(stock, x), rtol=1e-5, atol=1e-5)


def test_the_grid_does_not_depend_on_calls_before_or_on_saving(tmp_path):
    ours = HSIVIScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    ours.set_timesteps(4)
    stock = ours.timesteps.clone()
    ours.save_pretrained(tmp_path)
    again = HSIVIScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    assert torch.equal(again.timesteps, stock)
    again.set_timesteps(sigmas=[1.0, 0.7003, 0.4004])
    with pytest.raises(ValueError, match="2 steps are too many: two of their sigmas have the same level of 1000"):
        again.set_timesteps(sigmas=[0.9004, 0.9003])
    for scheduler in (again, flow(shift=3.0)):
        scheduler.set_timesteps(timesteps=[1000, 700, 400])
    assert torch.equal(again.timesteps, scheduler.timesteps)


def test_the_hash_of_a_flow_teacher_is_that_of_earlier_versions():
    """A run begun by one is resumed."""
    identity = load_teacher(Path(__file__).parents[1] / "assets" / "digits_flow").identity()
    assert identity["teacher_sha256"].startswith("24ea960141")


def test_without_a_generator_the_noise_of_a_flow_follows_from_each_sample():
    scheduler = flow(noise_eta=1.0, layer_timesteps=[999, 500, 0])
    x = torch.randn(3, 3, 4, 4)
    first, again = (walk(scheduler, x), walk(scheduler, x))
    assert torch.equal(first, again)
    torch.testing.assert_close(walk(scheduler, x[1:2]), first[1:2])
    noise = _noise_of(torch.randn(8, 3, 16, 16))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert abs((noise[0] * noise[1]).mean()) < 0.2


def test_renoising_is_the_consistency_sampler_of_diffusers():
    stock = diffusers.FlowMatchLCMScheduler(shift=2.0)
    ours = HSIVIScheduler.from_config(stock.config, kernel="renoise")
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=SIGMAS)
    x = torch.randn(SHAPE)
    drawn = [walk(each, x, generator=torch.Generator().manual_seed(1)) for each in (ours, stock)]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_config_of_any_flow_is_understood_and_survives_saving(other, tmp_path):
    other.save_pretrained(tmp_path / "other")
    for ours in (HSIVIScheduler.from_config(other.config), HSIVIScheduler.from_pretrained(tmp_path / "other")):
        assert (ours.config.prediction_type, ours.config.shift, len(ours)) == ("flow_prediction", 3.0, 1000)
        ours.save_pretrained(tmp_path / "ours")
        again = HSIVIScheduler.from_pretrained(tmp_path / "ours")
        assert torch.equal(again.timesteps, ours.timesteps)
    euler = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    torch.testing.assert_close(euler.timesteps, ours.timesteps)


def test_timesteps_that_were_not_trained_are_named_as_they_were_given():
    scheduler = HSIVIScheduler(prediction_type="flow_prediction", layer_timesteps=[999, 499, -1], shift=3.0)
    with pytest.raises(ValueError, match=r"^timesteps=\[1000, 500.5\], but this sampler was trained for 2 steps"):
        scheduler.set_timesteps(timesteps=[1000, 500.5])


grids = st.lists(st.integers(0, 999), min_size=2, max_size=5, unique=True).map(lambda grid: sorted(grid)[::-1])


@given(shift=st.floats(0.2, 10), eta=st.floats(0, 1), grid=grids)
@settings(deadline=None)
def test_a_layer_is_the_posterior_of_diffusing_up_again(shift, eta, grid):
    """Given x0 and x_{t+1} = r x_t + s z, the layer of eta 1 is the law of x_t by Bayes; eta is a share of the std."""
    scheduler = flow(shift=shift, noise_eta=eta, layer_timesteps=grid)
    t = torch.arange(len(grid) - 1)
    x_next, x0 = torch.randn(2, len(grid) - 1, 1, dtype=torch.float64)
    alpha_next, sigma_next = scheduler.alpha_sigma(scheduler.input_level(t), x0)
    alpha, sigma = scheduler.alpha_sigma(scheduler.output_level(t), x0)
    output = (x_next - alpha_next * x0) / sigma_next - x0
    mean, std = scheduler.transition(output, scheduler.input_level(t), x_next, prev_level=scheduler.output_level(t))
    r = alpha_next / alpha
    s2 = sigma_next**2 - r**2 * sigma**2  # of the noise that is added on the way up
    variance = 1 / (1 / sigma**2 + r**2 / s2)
    torch.testing.assert_close(std, eta * variance.sqrt(), rtol=1e-6, atol=1e-9)
    if eta == 1:  # hypothesis tries the ends of a range
        wanted = variance * (alpha * x0 / sigma**2 + r * x_next / s2)
        torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=1e-6)


def test_a_trained_grid_is_kept_whatever_a_pipeline_sends():
    ours = flow(layer_timesteps=[999, 700, 300, -1], use_dynamic_shifting=True, shift=2.0)
    before = ours.timesteps.clone()
    ours.set_timesteps(3, sigmas=[1.0, 0.5, 0.1], mu=1.3)
    assert torch.equal(ours.timesteps, before)
    assert before[0] == 1000
    ours.set_timesteps(timesteps=before.tolist())
    assert torch.equal(ours.timesteps, before)


def test_noise_is_added_at_the_times_of_the_network():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = HSIVIScheduler.from_config(stock.config)
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    times = ours.timesteps[[0, 500]]
    for each in (ours.scale_noise(x, times, noise), ours.add_noise(x, noise, times)):
        torch.testing.assert_close(each, stock.scale_noise(x, stock.timesteps[[0, 500]], noise))


def test_a_stock_network_starts_at_pure_noise():
    for spacing in ("quadratic", "uniform", "trailing"):
        scheduler = flow(timestep_spacing=spacing)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 1000


def contradict(flow_sigmas, kind):
    HSIVIScheduler.from_config(UniPCMultistepScheduler(use_flow_sigmas=flow_sigmas, prediction_type=kind).config)


def set_steps(options=None, **arguments):
    flow(**(options or {})).set_timesteps(**arguments)


TRAINED, SHIFTED = {"layer_timesteps": [999, 700, 300, -1]}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (contradict, (True, "epsilon"), "use_flow_sigmas=True and prediction_type='epsilon': a rectified"),
        (contradict, (False, "flow_prediction"), "use_flow_sigmas=False and prediction_type='flow_prediction': a"),
        (set_steps, {"options": TRAINED, "sigmas": [1.0, 0.5]}, "trained for 3 steps"),
        (set_steps, {"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "num_inference_steps=3, and 2 sigmas"),
        (set_steps, {"sigmas": [1.5, 0.5]}, r"sigmas=\[1.5, 0.5\]: give descending numbers, from 1 down to above 0"),
        (set_steps, {"sigmas": [0.5, 0.5]}, "give descending numbers"),
        (set_steps, {"sigmas": [1.0], "timesteps": [1000]}, "sigmas and timesteps were both given: pass one"),
        (flow, {"shift_terminal": 1.0}, "shift_terminal=1.0: give a number from"),
        (flow, {"resolution": [512]}, "resolution=.512.: give height and width"),
        (HSIVIScheduler, {"timestep_spacing": "stock"}, "timestep_spacing='stock' is of a rectified flow"),
        (set_steps, {"timesteps": [5000, 1]}, "leave the teacher's clock"),
        (set_steps, {"timesteps": ["a"]}, "give numbers"),
        (set_steps, {"options": SHIFTED, "sigmas": SIGMAS, "mu": -1}, "the shift that follows from mu=-1"),
        (flow(**TRAINED).scale_noise, (torch.zeros(SHAPE), torch.tensor([1000.0])), "noise is missing"),
        (
            flow(**TRAINED).step,
            (torch.zeros(SHAPE), 123.4, torch.zeros(SHAPE)),
            r"123.4.*give some of scheduler",
        ),
    ],
)
def test_what_cannot_be_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments) if isinstance(arguments, dict) else function(*arguments)


# ----- a student -----


def test_a_flow_teacher_is_distilled_into_a_sampler_that_stock_pipelines_run(tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "PAIR_STEPS", 2)
    teacher = DDPMPipeline(unet=make_unet(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    settings = {**SETTINGS, "num_pairs": 8, "num_inference_steps": 1}
    config = HSIVIConfig(**settings, output_dir=str(tmp_path / "run"))
    HSIVITrainer(teacher, config).train()
    ours = HSIVIPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert ours.scheduler.timesteps[0] == 1000
    images = ours(4, torch.Generator().manual_seed(0), output_type="np").images
    stock = DDPMPipeline(unet=ours.unet, scheduler=ours.scheduler)
    drawn = stock(4, torch.Generator().manual_seed(0), num_inference_steps=1, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(drawn), torch.from_numpy(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shift", "steps"), [(5.0, 8), (3.0, 16), (1.0, 32), (10.0, 2)])
def test_every_layer_of_a_flow_has_levels(shift, steps):
    student = make_scheduler(flow(shift=shift), HSIVIConfig(num_inference_steps=steps), (1, 8, 8))
    outputs = student.output_level(torch.arange(steps))
    highest = clock_of(student).highest_level((1, 8, 8), outputs)
    bridge = TeacherBridge(Teacher(make_unet(), student, (1, 8, 8)), student, (5, highest))
    t = torch.arange(steps).repeat(20)
    levels = bridge.sample_level(t)
    assert bool((levels >= student.output_level(t)).all())


def test_solvers_of_diffusers_follow_a_flow_on_their_grid_or_ours():
    for shift in (1.0, 3.0):
        schedule = flow(shift=shift)
        guided = Guided(Teacher(GaussianTeacher(schedule), schedule, (1, 8, 8)))
        x, clock = torch.randn(20, 1, 8, 8).clamp(-1.7, 1.7), clock_of(schedule)
        few, many = (clock.few_step_levels((1, 8, 8), steps) for steps in (8, 50))
        assert few[0] == many[0] == 999
        for method in ("DDIM", "Euler", "DPM-Solver++", "UniPC", "DEIS"):
            for calls, levels, error in ((15, None, 0.09), (15, clock.pair_levels(15), 0.07), (50, many, 0.03)):
                solver = make_solver(method, calls, guided, levels)
                end = run_solver(guided, solver.scheduler, x, calls)
                assert (end - MEAN - STD * x).square().mean().sqrt() < error, (shift, method, calls)
    with pytest.raises(ValueError, match="method 'DDPM' is not for rectified flows: choose one of 'DDIM', 'Euler'"):
        make_solver("DDPM", 15, guided)
