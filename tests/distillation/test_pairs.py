"""Pairs of noise and what the solver of the teacher's ODE makes of it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UniPCMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from gaussian_teacher import MEAN, STD, GaussianTeacher
from hsivi_diffusers import HSIVIScheduler, Teacher
from hsivi_diffusers.distillation.pairs import InterruptedRunError, TeacherPairs, image_loss, read_images, write_images
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.loading import load_teacher
from hsivi_diffusers.teachers.pixels import Pixels
from hsivi_diffusers.teachers.solvers import use_grid
from hsivi_diffusers.vi.regression import half_square
from tiny_unet import make_unet


def pairs_of(unet, noise, condition=None, grid=(440, 0), num_steps=2, noise_eta=1.0, **options):
    schedule = options.pop("schedule", None) or HSIVIScheduler()
    teacher = Pixels.of(SimpleNamespace(unet=unet), schedule)
    student = HSIVIScheduler.from_config(schedule.config, layer_timesteps=list(grid), noise_eta=noise_eta)
    return TeacherPairs(Guided(teacher), student, noise, condition, num_steps, **options)


@pytest.mark.parametrize(
    "settings", [{}, {"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescaled": True}]
)
@pytest.mark.parametrize("classes", [None, 3])
def test_pairs_are_noise_and_what_diffusers_solver_makes_of_it(settings, classes):
    unet = make_unet(num_class_embeds=classes).eval()
    if settings == {"rescaled": True}:
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config = DDPMScheduler(**settings, clip_sample=False).config
    schedule = HSIVIScheduler.from_config(config)
    noise, condition = torch.randn(5, 1, 8, 8), None if classes is None else torch.tensor([0, 1, 2, 0, 1])
    pairs = pairs_of(unet, noise, condition, num_steps=3, batch_size=2, schedule=schedule)
    solver = use_grid(UniPCMultistepScheduler.from_config(config), clock_of(schedule).pair_levels(3))
    solver.set_timesteps(3)
    x = noise
    for timestep in solver.timesteps:
        with torch.no_grad():
            x = solver.step(unet(x, timestep, class_labels=condition).sample, timestep, x).prev_sample
    torch.testing.assert_close(pairs.end, x.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert not pairs.end.requires_grad


@pytest.mark.parametrize("settings", [{"solver_order": 1}, {"final_sigmas_type": "sigma_min"}, {"predict_x0": False}])
def test_pairs_do_not_depend_on_how_the_teachers_pipeline_samples(unet, settings):
    noise, ends = torch.randn(3, 1, 8, 8), []
    for scheduler in (UniPCMultistepScheduler(), UniPCMultistepScheduler(**settings)):
        teacher = load_teacher(DDPMPipeline(unet=unet, scheduler=scheduler))
        ends.append(TeacherPairs(Guided(teacher), HSIVIScheduler(layer_timesteps=[440, 0]), noise, num_steps=3).end)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "clock",
    [
        *({"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2")),
        *({"prediction_type": "flow_prediction", "shift": shift} for shift in (1.0, 3.0, 25.0)),
        *({"prediction_type": "flow_prediction", "num_train_timesteps": size, "shift": 3.0} for size in (50, 100)),
    ],
    ids=str,
)
def test_pairs_follow_the_ode_on_every_clock(clock):
    """Of N(0.3, 0.4^2) in each pixel, whose ODE leads to 0.3 + 0.4 x_T; on the linear clock "leading" has .044."""
    schedule = HSIVIScheduler(**clock)
    noise = torch.randn(20, 1, 8, 8).clamp(-1.7, 1.7)
    teacher = Teacher(GaussianTeacher(schedule), schedule, (1, 8, 8))
    pairs = TeacherPairs(Guided(teacher), HSIVIScheduler(**clock, layer_timesteps=[44, 0]), noise)
    assert (pairs.end - MEAN - STD * noise).square().mean().sqrt() < 0.03


def test_pairs_of_a_schedule_that_the_solver_has_no_name_for_have_its_betas(unet):
    schedule = HSIVIScheduler(beta_schedule="sigmoid")
    pairs = pairs_of(unet, torch.randn(2, 1, 8, 8), num_steps=1, schedule=schedule)
    (only,) = clock_of(schedule).pair_levels(1)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([only, only]), pairs.noise)
    with torch.no_grad():
        clean = (pairs.noise - sigma * unet(pairs.noise, only).sample) / alpha
    torch.testing.assert_close(pairs.end, clean.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_pairs_of_a_teacher_that_predicts_a_variance_are_those_of_its_mean():
    unet = make_unet(in_channels=3, out_channels=6).eval()
    noise, whole = torch.randn(2, 3, 8, 8), unet.forward
    pairs = pairs_of(unet, noise, num_steps=3)
    unet.forward = lambda *given, **named: UNet2DOutput(sample=whole(*given, **named).sample[:, :3])
    assert torch.equal(pairs.end, pairs_of(unet, noise, num_steps=3).end)
    assert pairs.end.shape == noise.shape


def test_pairs_that_are_not_finite_are_refused():
    unet = make_unet()
    next(unet.parameters()).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="6 of 6 pairs contain NaN or inf: .* take bf16"):
        pairs_of(unet, torch.randn(6, 1, 8, 8))


def test_pairs_continue_after_those_that_were_made_to_the_same_bits(unet):
    noise, asked = torch.randn(5, 1, 8, 8), []

    def stop():
        asked.append(None)
        return len(asked) == 3

    whole = pairs_of(unet, noise, batch_size=2)
    with pytest.raises(InterruptedRunError) as stopped:
        pairs_of(unet, noise, batch_size=2, stop=stop)
    (images,) = stopped.value.args
    assert torch.equal(images, whole.made[:4])
    sizes, forward = [], unet.forward
    unet.forward = lambda x, *given, **named: sizes.append(len(x)) or forward(x, *given, **named)
    assert torch.equal(pairs_of(unet, noise, batch_size=2, made=images).end, whole.end)
    assert sizes == [1, 1]


def test_images_are_kept_for_the_same_run_and_damaged_ones_are_not_read(tmp_path):
    path, images = tmp_path / "pairs" / "0.safetensors", torch.randn(3, 1, 8, 8)
    assert read_images(path, "this run") is None
    write_images(path, images, "this run")
    assert torch.equal(read_images(path, "this run"), images)
    assert read_images(path, "another run") is None
    path.write_bytes(path.read_bytes()[:-10])
    assert read_images(path, "this run") is None
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_pairs_are_drawn_as_pairs(unet):
    noise = torch.randn(6, 1, 8, 8)
    pairs = pairs_of(unet, noise)
    x, end, label = pairs.sample(torch.zeros(50, dtype=torch.long), torch.Generator().manual_seed(0))
    places = [(noise == row).flatten(1).all(1).nonzero().item() for row in x]
    assert set(places) == set(range(6))
    torch.testing.assert_close(end, pairs.end[places], atol=1e-3, rtol=0)  # alpha is nearly 1 there
    assert label is None


@pytest.mark.parametrize("noise_eta", [0.2, 1.0])
def test_pairs_of_several_layers_lead_each_to_its_image(noise_eta):
    """The first layer from the noise of the pair, the others from its image, diffused to their input."""
    unet = make_unet(num_class_embeds=6).eval()
    given = {"grid": [700, 300, 0], "noise_eta": noise_eta}
    pairs = pairs_of(unet, torch.randn(6, 1, 8, 8), torch.arange(6), **given)
    t, grid = torch.arange(400) % 2, pairs.scheduler
    x, end, place = pairs.sample(t, torch.Generator().manual_seed(0))
    clean, first = pairs.end[place], t == 1
    assert torch.equal(x[first], pairs.noise[place[first]])
    alpha, sigma = grid.alpha_sigma(grid.input_level(t), x)
    noise = ((x - alpha * clean) / sigma)[~first]
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    # what a network that answers with the image would have for its mean
    answers = HSIVIScheduler.from_config(grid.config, prediction_type="sample", clip_sample=False)
    mean, _ = answers.transition(clean, grid.input_level(t), x)
    torch.testing.assert_close(end, mean, atol=1e-5, rtol=1e-4)


def test_the_coarse_part_of_an_image_counts_more_and_the_rest_as_before():
    """On 8x8 pixels its fields have 2x2: what is constant there is coarse, what has mean 0 in each is not."""
    fields = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    coarse = fields.repeat_interleave(2, -1).repeat_interleave(2, -2)
    fine = torch.randn(2, 3, 8, 4, dtype=torch.float64).repeat_interleave(2, -1)
    fine[..., 1::2] *= -1
    expected = 0.5 * (8 * coarse.square() + fine.square()).sum((1, 2, 3))
    scheduler, t = HSIVIScheduler(layer_timesteps=[440, 220, 10], noise_eta=1.0), torch.tensor([0, 1])
    share = scheduler.layers.coefficients(scheduler.input_level(t), fine, scheduler.output_level(t)).image_share
    torch.testing.assert_close(image_loss(scheduler, 7.0)(share * (coarse + fine), t), expected)
    torch.testing.assert_close(image_loss(scheduler)(share * fine, t), half_square(fine))


def test_the_loss_of_pairs_is_in_image_units_whatever_the_layer():
    """A clean image that is off by d in each value costs d^2/2 a value, for each layer of grids of 1, 2 and 4 steps."""
    scheduler = HSIVIScheduler(layer_timesteps=[[440, 0], [440, 220, 0], [440, 330, 220, 110, 0]], noise_eta=1.0)
    t = torch.arange(7)
    x, x0 = torch.randn(2, 7, 1, 8, 8)
    layer = scheduler.layers.coefficients(scheduler.input_level(t), x, scheduler.output_level(t))
    mean, moved = (layer.mean(clean, layer.noise_in(x, clean)) for clean in (x0, x0 + 0.1))
    torch.testing.assert_close(image_loss(scheduler)(moved - mean, t), torch.full((7,), 0.32), rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.invert(mean, x)[0], x0, rtol=1e-3, atol=1e-4)
