"""Students and solvers of a teacher as samplers: what a report compares."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

from hsivi_diffusers import load_teacher
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import make_solver, make_student, sample
from short_run import pipeline_of
from tiny_unet import make_unet

KINDS = ["DDPM", "DDIM, eta 1", "DDIM", "DPM-Solver++", "UniPC"]  # on the grids of diffusers
ETA = {"eta": 1.0}
METHODS = [*KINDS, "DPM-Solver++, few-step grid", "UniPC, few-step grid"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def solver(teacher):
    """A solver of the teacher, and the list of the timesteps at which it calls the network."""
    loaded = load_teacher(str(teacher))
    calls = []
    loaded.network.register_forward_pre_hook(lambda module, given: calls.append(int(given[1][0])))

    def make(method, num_steps):
        calls.clear()
        name, _, few = method.partition(", few-step")
        levels = clock_of(loaded.schedule).few_step_levels((1, 8, 8), num_steps) if few else None
        return make_solver(name, num_steps, Guided(loaded), levels), calls

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_solver_makes_as_many_network_calls_as_it_says_and_may_be_called_again(solver, method):
    sampler, calls = solver(method, 5)
    (images,) = sample(sampler, 3, 3, seed=0)
    assert len(calls) == 5
    assert calls == sorted(calls, reverse=True)
    assert images.shape == (3, 1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    assert images.std() > 0.05
    assert torch.equal(images, next(sample(sampler, 3, 3, seed=0)))


def test_every_method_starts_each_batch_from_the_same_noise(teacher, fast_run):
    loaded = load_teacher(str(teacher))
    student = pipeline_of(fast_run)
    samplers = [(make_student(student, loaded), student.unet)]
    samplers += [(make_solver(method, 2, Guided(loaded)), loaded.network) for method in KINDS]
    starts = []
    for sampler, network in samplers:
        inputs = []
        handle = network.register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given[0]))
        assert [len(batch) for batch in sample(sampler, 5, 3, seed=5)] == [3, 2]
        handle.remove()
        starts.append(torch.cat([inputs[0], inputs[2]]))
    assert starts[0].std() == pytest.approx(1, abs=0.2)
    assert len(starts[0].flatten().unique()) == 5 * 64
    assert all(torch.equal(start, starts[0]) for start in starts)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "kind", "settings"), [("DDPM", DDPMPipeline, {}), ("DDIM, eta 1", DDIMPipeline, ETA)]
)
def test_a_solver_is_that_of_diffusers(solver, teacher, method, kind, settings):
    pipeline = kind.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(3, generator(), num_inference_steps=6, output_type="np", **settings).images
    images = solver(method, 6)[0](3, generator())
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), wanted)


@torch.no_grad()
def test_ddim_is_the_formula_on_the_quadratic_grid(solver, teacher):
    loaded = load_teacher(str(teacher))
    unet, schedule = loaded.network, loaded.schedule
    grid = [round((i / 4) ** 2 * 800) for i in range(4, -1, -1)]
    x = torch.randn(3, 1, 8, 8, generator=generator())
    for above, below in itertools.pairwise(grid):
        abar, abar_below = schedule.alphas_cumprod[[above, below]]
        eps = unet(x, above).sample
        x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
        x = abar_below.sqrt() * x0 + (1 - abar_below).sqrt() * eps
    sampler, calls = solver("DDIM", 4)
    images = sampler(3, generator())
    assert calls == grid[:-1]
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_student_is_its_pipeline_with_each_count_of_steps(several_run, teacher):
    pipeline = pipeline_of(several_run)
    samplers = {count: make_student(pipeline, load_teacher(str(teacher)), count) for count in (1, 2, 4, None)}
    for count, sampler in samplers.items():
        wanted = pipeline(3, generator(4), num_inference_steps=count or 4, output_type="pt").images
        assert torch.equal(sampler(3, generator(4)), wanted)


def test_sample_goes_by_batches_and_follows_its_seed():
    sizes = []

    def sampler(batch_size, source):
        assert not torch.is_grad_enabled()
        sizes.append(batch_size)
        return torch.rand(batch_size, 1, 2, 2, generator=source)

    images = torch.cat([*sample(sampler, 7, 3, seed=1)])
    assert sizes == [3, 3, 1]
    assert torch.equal(images, torch.cat([*sample(sampler, 7, 3, seed=1)]))
    assert not torch.equal(images, torch.cat([*sample(sampler, 7, 3, seed=2)]))
    assert not torch.equal(images[:3], images[3:6])


@pytest.mark.parametrize("method", [*KINDS, "DEIS"])
def test_the_labels_go_to_the_network(class_teacher, method):
    loaded, given = load_teacher(str(class_teacher)), []
    hook = loaded.network.register_forward_pre_hook
    hook(lambda module, args, kwargs: given.append(kwargs["class_labels"]), with_kwargs=True)
    batches = [*sample(make_solver(method, 2, Guided(loaded)), 5, 4, seed=0, num_classes=3)]
    assert [labels.tolist() for labels in given] == [[0, 1, 2, 0]] * 2 + [[1]] * 2
    assert [len(batch) for batch in batches] == [4, 1]


def test_the_labels_go_to_the_student(class_run, class_teacher):
    pipeline = pipeline_of(class_run)
    (images,) = sample(make_student(pipeline, load_teacher(str(class_teacher))), 4, 4, seed=0, num_classes=3)
    assert torch.equal(images, pipeline(4, generator(), class_labels=[0, 1, 2, 0], output_type="pt").images)


@pytest.mark.parametrize("method", KINDS)
def test_a_learned_variance_is_for_ddpm_alone(method):
    unet = make_unet(out_channels=2)
    guided = Guided(load_teacher(DDPMPipeline(unet=unet, scheduler=DDPMScheduler(variance_type="learned_range"))))
    images = make_solver(method, 3, guided)(2, generator())
    with torch.no_grad():
        guided.teacher.network.conv_out.weight[1:].mul_(3)
        guided.teacher.network.conv_out.bias[1:].fill_(1)
    assert images.shape == (2, 1, 8, 8)
    assert torch.equal(images, make_solver(method, 3, guided)(2, generator())) == (method != "DDPM")


@pytest.mark.parametrize(
    ("method", "steps", "settings", "grid"),
    [
        ("DDIM", 4, {}, "800, 450, 200, 50"),
        ("UniPC", 4, {}, "800, 600, 400, 200"),
        ("DDPM", 100, {}, "990, 980, 970, ..., 0"),
        ("DPM-Solver++", 4, {"timestep_spacing": "trailing"}, "999, 749, 499, 249"),
    ],
)
def test_a_solver_has_its_grid_as_text(teacher, method, steps, settings, grid):
    assert make_solver(method, steps, Guided(load_teacher(str(teacher))), **settings).grid == grid
