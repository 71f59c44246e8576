"""Pairs of noise and where the solver of the teacher's ODE leads it."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UniPCMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from gaussian_teacher import MEAN, STD, GaussianTeacher
from hsivi_diffusers import HSIVIScheduler, Teacher
from hsivi_diffusers.distillation.pairs import (
    InterruptedRunError,
    TeacherPairs,
    end_levels,
    follow_ode,
    image_loss,
    layers_by_pairs,
    pair_levels,
    read_ends,
    write_ends,
)
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.loading import load_teacher
from hsivi_diffusers.teachers.pixels import Pixels
from hsivi_diffusers.teachers.solvers import use_grid
from hsivi_diffusers.vi.regression import half_square
from tiny_unet import make_unet


def images_of(unet, noise, condition=None, num_steps=2, schedule=None, **options):
    """Where the ODE leads noise, (N, C, H, W), not clipped."""
    teacher = Pixels.of(SimpleNamespace(unet=unet), schedule or HSIVIScheduler())
    return follow_ode(Guided(teacher), noise, condition, num_steps=num_steps, **options).squeeze(1)


def gaussian_teacher(schedule):
    """Of N(MEAN, STD^2) in each pixel, whose ODE leads to MEAN + STD x_T."""
    return Guided(Teacher(GaussianTeacher(schedule), schedule, (1, 8, 8)))


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
    images = images_of(unet, noise, condition, num_steps=3, batch_size=2, schedule=schedule)
    solver = use_grid(UniPCMultistepScheduler.from_config(config), clock_of(schedule).pair_levels(3))
    solver.set_timesteps(3)
    x = noise
    for timestep in solver.timesteps:
        with torch.no_grad():
            x = solver.step(unet(x, timestep, class_labels=condition).sample, timestep, x).prev_sample
    torch.testing.assert_close(images, x, atol=1e-4, rtol=1e-4)
    assert not images.requires_grad


@pytest.mark.parametrize("settings", [{"solver_order": 1}, {"final_sigmas_type": "sigma_min"}, {"predict_x0": False}])
def test_pairs_do_not_depend_on_how_the_teachers_pipeline_samples(unet, settings):
    noise, ends = torch.randn(3, 1, 8, 8), []
    for scheduler in (UniPCMultistepScheduler(), UniPCMultistepScheduler(**settings)):
        teacher = load_teacher(DDPMPipeline(unet=unet, scheduler=scheduler))
        ends.append(follow_ode(Guided(teacher), noise, num_steps=3))
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
    """On the linear clock "leading" has .044."""
    noise = torch.randn(20, 1, 8, 8).clamp(-1.7, 1.7)
    images = follow_ode(gaussian_teacher(HSIVIScheduler(**clock)), noise)
    assert (images.squeeze(1) - MEAN - STD * noise).square().mean().sqrt() < 0.03


@pytest.mark.parametrize("clock", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "flow_prediction"}])
@pytest.mark.parametrize("noise_eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "grid", [[700, 500, 300, 0], [[600, 0], [700, 300, 0], [800, 600, 400, 200, 0]]], ids=["one", "many"]
)
def test_first_layers_that_meet_their_pairs_draw_the_marginals_of_the_data(clock, noise_eta, grid):
    """With the noise of the layer: N(alpha MEAN, alpha^2 STD^2 + sigma^2)."""
    student = HSIVIScheduler(**clock, layer_timesteps=grid, noise_eta=noise_eta)
    noise, ends = torch.randn(600, 1, 8, 8), end_levels(student)
    pairs = TeacherPairs(student, noise, follow_ode(gaussian_teacher(HSIVIScheduler(**clock)), noise, ends=ends))
    assert [end is None for end in ends] == [depth < 3 for depth in student.depths]
    for t in torch.tensor(layers_by_pairs(student.depths)).split(1):
        x, mean, _ = pairs.sample(t.expand(6000), torch.Generator().manual_seed(0))
        layer = student.layers.coefficients(student.input_level(t), x, student.output_level(t))
        drawn = mean + layer.c * torch.randn(x.shape)
        alpha, sigma = (each.item() for each in student.alpha_sigma(student.output_level(t), x))
        assert drawn.mean().item() == pytest.approx(alpha * MEAN, abs=0.02)
        assert drawn.std().item() == pytest.approx(math.hypot(alpha * STD, sigma), rel=0.02)
        centred = (mean - mean.mean()) / mean.std()
        assert (centred * x).mean().item() == pytest.approx(1, abs=0.02)  # each is led from its own noise


def test_the_network_is_not_called_below_the_ends():
    teacher, called = gaussian_teacher(HSIVIScheduler()), []
    schedule, network = teacher.teacher.schedule, teacher.teacher.network
    network.register_forward_pre_hook(lambda _, given: called.append(int(given[1].flatten()[0])))
    full = clock_of(schedule).pair_levels(15)
    for ends in ([230], [full[3]], [500, 230], [None, 230]):
        called.clear()
        follow_ode(teacher, torch.randn(2, 1, 8, 8), ends=ends)
        assert called == pair_levels(schedule, ends)
    assert pair_levels(schedule, [230]) == [level for level in full if level > 230]
    assert pair_levels(schedule, [500, 230]) == sorted([500, *pair_levels(schedule, [230])], reverse=True)
    assert pair_levels(schedule, [None]) == full


def test_several_ends_are_on_one_way(unet):
    teacher, noise = Guided(Pixels.of(SimpleNamespace(unet=unet), HSIVIScheduler())), torch.randn(3, 1, 8, 8)
    images, first, second = follow_ode(teacher, noise, ends=[None, 400, 154]).unbind(1)
    assert torch.equal(first, follow_ode(teacher, noise, ends=[400]).squeeze(1))
    for end, state in ((None, images), (154, second)):  # on other grids
        torch.testing.assert_close(state, follow_ode(teacher, noise, ends=[end]).squeeze(1), atol=0.02, rtol=0)


def test_an_end_above_the_levels_of_the_solver_is_the_noise_itself():
    """Zero terminal SNR, and a first step that ends at a high level."""
    clock = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = HSIVIScheduler(**clock, layer_timesteps=[990, 960, 500, 0], noise_eta=0.0)
    noise, ends = torch.randn(3, 1, 8, 8), end_levels(schedule)
    assert ends == [960]
    assert pair_levels(schedule, ends) == []
    assert torch.equal(follow_ode(gaussian_teacher(schedule), noise, ends=ends).squeeze(1), noise)


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_a_first_step_from_pure_noise_that_keeps_nothing_of_it_has_pairs_to_the_lowest_level(steps):
    grid = [1000 - round(1000 * step / steps) for step in range(steps + 1)]
    flow = {"prediction_type": "flow_prediction", "layer_timesteps": [999, *grid[1:]]}
    assert end_levels(HSIVIScheduler(**flow, noise_eta=1.0)) == [0]
    assert end_levels(HSIVIScheduler(**flow, noise_eta=0.0)) == [grid[1]]


def test_pairs_of_a_schedule_that_the_solver_has_no_name_for_have_its_betas(unet):
    schedule = HSIVIScheduler(beta_schedule="sigmoid")
    noise = torch.randn(2, 1, 8, 8)
    images = images_of(unet, noise, num_steps=1, schedule=schedule)
    (only,) = clock_of(schedule).pair_levels(1)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([only, only]), noise)
    with torch.no_grad():
        clean = (noise - sigma * unet(noise, only).sample) / alpha
    torch.testing.assert_close(images, clean, atol=1e-4, rtol=1e-4)


def test_pairs_of_a_teacher_that_predicts_a_variance_are_those_of_its_mean():
    unet = make_unet(in_channels=3, out_channels=6).eval()
    noise, whole = torch.randn(2, 3, 8, 8), unet.forward
    images = images_of(unet, noise, num_steps=3)
    unet.forward = lambda *given, **named: UNet2DOutput(sample=whole(*given, **named).sample[:, :3])
    assert torch.equal(images, images_of(unet, noise, num_steps=3))
    assert images.shape == noise.shape


def test_pairs_that_are_not_finite_are_refused():
    unet = make_unet()
    next(unet.parameters()).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="6 of 6 pairs contain NaN or inf: .* take bf16"):
        images_of(unet, torch.randn(6, 1, 8, 8))


def test_pairs_continue_after_those_that_were_made_to_the_same_bits(unet):
    noise, asked = torch.randn(5, 1, 8, 8), []

    def stop():
        asked.append(None)
        return len(asked) == 3

    whole = images_of(unet, noise, batch_size=2)
    with pytest.raises(InterruptedRunError) as stopped:
        images_of(unet, noise, batch_size=2, stop=stop)
    (made,) = stopped.value.args
    assert torch.equal(made.squeeze(1), whole[:4])
    sizes, forward = [], unet.forward
    unet.forward = lambda x, *given, **named: sizes.append(len(x)) or forward(x, *given, **named)
    assert torch.equal(images_of(unet, noise, batch_size=2, made=made), whole)
    assert sizes == [1, 1]


def test_ends_are_kept_for_the_same_run_and_damaged_ones_are_not_read(tmp_path):
    path, ends = tmp_path / "pairs" / "0.safetensors", torch.randn(3, 1, 1, 8, 8)
    assert read_ends(path, "this run") is None
    write_ends(path, ends, "this run")
    assert torch.equal(read_ends(path, "this run"), ends)
    assert read_ends(path, "another run") is None
    path.write_bytes(path.read_bytes()[:-10])
    assert read_ends(path, "this run") is None
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("clips", [False, True])
def test_pairs_are_drawn_as_pairs(clips):
    """Of one step the mean is that of a network that answers with the image."""
    noise, images, labels = torch.randn(6, 1, 8, 8), 2 * torch.randn(6, 1, 1, 8, 8), torch.arange(6)
    scheduler = HSIVIScheduler(layer_timesteps=[440, 0], noise_eta=1.0, prediction_type="sample", clip_sample=False)
    t = torch.zeros(50, dtype=torch.long)
    given = images.clone()
    pairs = TeacherPairs(scheduler, noise, images, labels, clips)
    x, end, places = pairs.sample(t, torch.Generator().manual_seed(0))
    assert set(places.tolist()) == set(range(6))
    assert torch.equal(x, noise[places])
    answers = given.squeeze(1)[places]
    mean, _ = scheduler.transition(answers.clamp(-1, 1) if clips else answers, scheduler.input_level(t), x)
    torch.testing.assert_close(end, mean, atol=1e-5, rtol=1e-4)
    assert pairs.mean.data_ptr() == images.data_ptr()  # all pairs at once may be as much as there is memory for
    assert TeacherPairs(scheduler, noise, images).sample(t)[2] is None


def test_a_student_without_fine_noise_sees_the_rest_of_the_noise_that_the_ode_started_from():
    noise, images = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 1, 8, 8)
    scheduler = HSIVIScheduler(layer_timesteps=[440, 0], prediction_type="sample", noise_cutoff=2.0)
    t, given = torch.zeros(50, dtype=torch.long), images.clone()
    x, end, places = TeacherPairs(scheduler, noise, images, torch.arange(6)).sample(t)
    assert torch.equal(x, scheduler.low_pass(noise)[places])
    mean, _ = scheduler.transition(given.squeeze(1)[places], scheduler.input_level(t), x)
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
