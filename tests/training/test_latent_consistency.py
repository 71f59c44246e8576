"""`training/benchmarks/images/latent_consistency.py`, and its runs by `train_baseline.py`."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, StableDiffusion3Pipeline

from hsivi_diffusers import load_teacher
from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.teachers.flow_transformers import FlowTransformer
from hsivi_diffusers.teachers.solvers import Solver
from tiny_flows import make_flow
from tiny_text import PROMPTS, make_text
from training.benchmarks.images import latent_consistency, train_baseline
from training.benchmarks.images.latent_consistency import LatentConsistency, set_grid
from training.benchmarks.images.scene_set import LONGEST
from training.benchmarks.images.scenes import draw_scenes, encode

CPU = torch.device("cpu")
NUMBERS = torch.tensor([0, 1, 2, 0, 1, 2])


def load_latents(teacher, train_data, device):
    teacher.encode_prompts(PROMPTS, "", device)
    channels, *size = teacher.shape
    return torch.randn(6, 2 * channels, *size, generator=torch.Generator().manual_seed(0)), NUMBERS  # means and stds


@pytest.fixture
def made(monkeypatch):
    """Of a tiny Stable Diffusion 3 of shift 3, with an adapter that has been trained a little."""
    monkeypatch.setattr(FlowTransformer, "prompt_dtype", None)  # stock pipelines do not round what encoders return
    teacher = load_teacher(make_flow("sd3"))
    load_latents(teacher, "", CPU)
    torch.manual_seed(0)
    made = LatentConsistency(teacher, 4.0, 2)
    for name, weight in made.student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return made


def velocity(made, network, x, sigma, rows):
    given = made.teacher.conditions.arguments(rows, x)
    return network(x, timestep=1000 * sigma.flatten(), **given).sample


@torch.no_grad()
def test_the_target_is_the_student_after_an_euler_step_of_the_guided_velocity(made):
    u = torch.arange(50, 0, -1) / 50
    sigmas = 3 * u / (1 + 2 * u)  # the teacher's shift
    torch.testing.assert_close(made.schedule.levels.time(made.grid), 1000 * sigmas)
    x, rows, none = torch.randn(3, *made.teacher.shape), NUMBERS[:3], torch.full((3,), len(PROMPTS))
    places = torch.tensor([0, 20, 49])
    lower = torch.cat([sigmas[1:], torch.zeros(1)])
    sigma, below = (each[places, None, None, None] for each in (sigmas, lower))
    of_prompt, of_none = (velocity(made, made.teacher.network, x, sigma, each) for each in (rows, none))
    down = x + (below - sigma) * (of_none + 4 * (of_prompt - of_none))
    wanted = down - below * velocity(made, made.student, down, below, rows)
    found = made.aim(x, made.grid[places], rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], down[2])  # at sigma 0 the function is the identity


def test_the_loss_is_the_distance_of_the_student_to_its_target_which_has_no_gradient(made):
    latents, _ = load_latents(made.teacher, "", CPU)
    torch.manual_seed(1)
    loss = made.loss(latents, NUMBERS)
    torch.manual_seed(1)
    mean, std = latents.chunk(2, dim=1)
    clean = mean + std * torch.randn_like(mean)
    level = made.grid[torch.randint(50, (6,))]
    sigma = made.schedule.levels.time(level)[:, None, None, None] / 1000
    x = (1 - sigma) * clean + sigma * torch.randn_like(clean)
    found, aim = x - sigma * velocity(made, made.student, x, sigma, NUMBERS), made.aim(x, level, NUMBERS)
    assert not aim.requires_grad
    torch.testing.assert_close(loss, (((found - aim) ** 2 + 0.001**2).sqrt() - 0.001).mean())
    loss.backward()
    assert all(weight.grad is not None for weight in made.student.parameters() if weight.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_stock_scheduler_and_pipeline_draw_what_the_function_says(made, num_steps):
    u = torch.tensor([1.0, 0.76, 0.5, 0.26])[:num_steps]  # places 0, 12, 25, 37 of the 50, as in LCMScheduler
    levels = (1000 * u).round().long() - 1
    assert {*levels.tolist()} <= {*made.grid.tolist()}
    generator = torch.Generator().manual_seed(5)
    noise = x = torch.randn(3, *made.teacher.shape, generator=generator)
    state = generator.get_state()
    for place, level in enumerate(levels):
        x0 = made.predict(x, level.expand(3), NUMBERS[:3])
        if place + 1 < num_steps:
            x = made.schedule.diffuse(x0, torch.randn(x.shape, generator=generator), levels[place + 1].expand(3))
    call = partial(made.teacher.call, made.student)
    scheduler = set_grid(FlowMatchLCMScheduler.from_config(made.sampler.config), made.schedule, num_steps)
    images = Solver(scheduler, num_steps, made.teacher, call)(3, torch.Generator().manual_seed(5), NUMBERS[:3])
    torch.testing.assert_close(images, made.teacher.decode(x0), rtol=1e-4, atol=1e-4)

    pipeline = made.pipeline()
    assert type(pipeline) is StableDiffusion3Pipeline
    pipeline.set_progress_bar_config(disable=True)
    torch.set_rng_state(state)  # the pipeline gives the steps no generator
    given = {"sigmas": u.tolist(), "guidance_scale": 1.0, "output_type": "pt", "height": 16, "width": 16}
    drawn = pipeline([*PROMPTS], latents=noise, num_inference_steps=num_steps, **given).images
    torch.testing.assert_close(drawn, images, rtol=1e-3, atol=1e-3)


def test_latents_are_those_that_the_teacher_decodes(made):
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, _ = encode(made.teacher.vae, images)
    with torch.no_grad():
        wanted = made.teacher.vae.encode(to_model_range(images)).latent_dist.mean
    torch.testing.assert_close(made.teacher.unscale(mean.float()), wanted, rtol=1e-2, atol=1e-2)  # bfloat16


def test_what_it_cannot_learn_is_refused(tmp_path):
    make_flow("sd3").save_pretrained(tmp_path / "flow")
    make_text("sd").save_pretrained(tmp_path / "betas")
    for teacher, data, message, *more in (
        (
            "flow",
            "scenes",
            "start_timestep=600: --method lcm_lora starts at pure noise, leave it out",
            "--start_timestep=600",
        ),
        ("flow", "digits", "--train_data digits: --method lcm_lora takes captioned images: give scenes"),
        ("betas", "scenes", "--method lcm_lora adapts a rectified flow that takes text, by a LoRA, and .* is not one"),
    ):
        given = [f"--pretrained_teacher_model={tmp_path / teacher}", f"--train_data={data}", "--method=lcm_lora", *more]
        with pytest.raises(ValueError, match=message):
            train_baseline.main([*given, f"--output_dir={tmp_path / 'run'}"])


def test_its_pipeline_has_the_adapter_in_its_weights(made):
    x, time = torch.randn(2, *made.teacher.shape), torch.tensor([0.4, 0.9])
    with torch.no_grad():
        before, teacher = (
            velocity(made, network, x, time, NUMBERS[:2]) for network in (made.student, made.teacher.network)
        )
        after = velocity(made, made.pipeline().transformer, x, time, NUMBERS[:2])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, teacher, rtol=1e-2, atol=1e-3)


def test_a_run_continues_to_the_bit_and_its_pipeline_loads(tmp_path, monkeypatch, same_tensors):
    monkeypatch.setattr(train_baseline, "load_latents", load_latents)
    make_flow("sd3").save_pretrained(tmp_path / "teacher")
    common = [f"--pretrained_teacher_model={tmp_path / 'teacher'}", "--method=lcm_lora", "--lora_rank=2"]
    common += ["--train_batch_size=2", "--max_train_steps=3", "--checkpointing_steps=2", "--guidance_scale=4"]
    train_baseline.main([*common, f"--output_dir={tmp_path / 'whole'}"])
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    assert isinstance(whole.scheduler, FlowMatchLCMScheduler)
    assert whole.scheduler.config.shift == 3
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("pipeline", "checkpoints/checkpoint-3"):
        shutil.rmtree(part / name)
    (part / "training.json").unlink()
    train_baseline.main([*common, f"--output_dir={part}", "--resume_from_checkpoint=latest"])
    resumed = DiffusionPipeline.from_pretrained(part / "pipeline")
    assert same_tensors(whole.transformer.state_dict(), resumed.transformer.state_dict())


def test_scenes_are_learned_with_their_captions(monkeypatch):
    monkeypatch.setattr(latent_consistency, "NUM_SCENES", 4)
    drawn = torch.randint(256, (4, 3, 16, 24), dtype=torch.uint8), draw_scenes(4, False, np.random.default_rng(0))
    monkeypatch.setattr(latent_consistency, "make_scenes", lambda number, seed: drawn)
    teacher = load_teacher(make_flow("sd3"))
    teacher.set_size([16, 24])
    latents, numbers = latent_consistency.load_latents(teacher, "scenes", CPU)
    assert (latents.shape[1:], numbers.tolist()) == ((2 * teacher.shape[0], *teacher.shape[1:]), [0, 1, 2, 3])
    assert teacher.conditions.prompts == [scene.caption for scene in drawn[1]]
    assert teacher.longest == LONGEST
