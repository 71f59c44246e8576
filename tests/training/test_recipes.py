"""The recipes for published teachers: each row of docs/benchmarks/reproducing.md, and the configs as they are."""

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hsivi_diffusers import TeacherBridge
from hsivi_diffusers.commands.cli import PushAtEnd, Teacher
from hsivi_diffusers.commands.options import parse_options
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.networks import make_networks, make_student_and_critic
from hsivi_diffusers.distillation.state import TrainingState
from hsivi_diffusers.distillation.updates import run_updates
from hsivi_diffusers.runs.options import flatten
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.loading import read_teacher

ROOT = Path(__file__).parents[2]
TEACHERS = {"cifar10": "cifar10_32", "celeba64": "celeba_64", "imagenet64": "imagenet_64", "church256": "church_256"}
PAGE = (ROOT / "docs/benchmarks/reproducing.md").read_text()
PAPER = re.search(r'paper="([^"]*)"', PAGE)[1].replace("\\", "").split()
ROWS = re.findall(r"^\| (\w+) \| (\d+) \| `([^`]*)` \|", PAGE, re.MULTILINE)
RECIPES = {f"{name} {steps} paper": (name, *PAPER, *words.split()) for name, steps, words in ROWS}
RECIPES |= {f"{name} {steps} fast": (name, f"--num_inference_steps={steps}") for name, steps, _ in ROWS}


@cache
def options_of(recipe, *more):
    """Teacher and config of a recipe, checked as a run would; the run of `init_from` need not be there."""
    name, *words = RECIPES[recipe]
    given = ["--config", str(ROOT / f"training/configs/{name}.yaml"), *words, *more]
    teacher, config, _ = parse_options([Teacher, HSIVIConfig, PushAtEnd], "", given)
    config.check()
    return teacher, config


def config_from_the_teacher(recipe, *more):
    """The config of a recipe without the run that it starts from, whose student is of the same shapes."""
    return replace(options_of(recipe, *more)[1], init_from=None)


def folder_of(recipe):
    return str(ROOT / "training/teachers" / TEACHERS[RECIPES[recipe][0]])


def meta_teacher(recipe):
    with torch.device("meta"):
        return read_teacher(folder_of(recipe))


def test_the_recipes_are_complete():
    steps = {"cifar10": (5, 10, 15), "celeba64": (5, 10), "imagenet64": (5, 10, 15), "church256": (5, 10)}
    assert {*RECIPES} == {f"{name} {t} {preset}" for name in steps for t in steps[name] for preset in ("fast", "paper")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_row_and_the_noise_levels_of_its_teacher(recipe):
    (options, config), teacher = options_of(recipe), meta_teacher(recipe)
    name, steps, preset = recipe.split()
    assert (config.preset, config.depths) == (preset, [int(steps)])
    known = f"google/ddpm-{TEACHERS[name].replace('_', '-')}", f"runs/teachers/{TEACHERS[name]}"
    assert options.pretrained_teacher_model in known
    networks = make_networks(teacher, teacher.network, teacher.network, config)
    lowest, highest = config.level_min, clock_of(teacher.schedule).highest_level(teacher.shape, torch.tensor([]))
    bridge = TeacherBridge(teacher, networks.scheduler, (lowest, highest))
    if config.scoring != "own":
        levels = torch.stack([bridge.sample_level(torch.arange(*config.depths)) for _ in range(50)])
        assert ((levels >= lowest) & (levels <= highest)).all()
    # The first step sees hardly anything but noise, in preset fast some of the coarse features of the image.
    alpha = teacher.schedule.alphas_cumprod[networks.scheduler.config.layer_timesteps[0]].sqrt()
    if preset == "fast":
        signal = math.sqrt(math.prod(teacher.shape)) * alpha / (1 - alpha**2).sqrt()
        assert 3 < signal <= 3.2
    else:
        assert alpha < 0.3


def test_the_lowest_imagenet_level_is_that_of_a_linear_schedule():
    linear, cosine = (meta_teacher(f"{name} 5 fast").schedule.alphas_cumprod for name in ("cifar10", "imagenet64"))
    assert int((cosine - linear[5]).abs().argmin()) == options_of("imagenet64 5 fast")[1].level_min


@pytest.mark.parametrize("recipe", [name for name, words in RECIPES.items() if "--init_from" in words])
def test_a_run_that_another_starts_from_is_a_recipe_of_the_same_teacher_with_more_steps(recipe):
    options = flatten(options_of(recipe))
    (other,) = (
        found
        for found in (flatten(options_of(name)) for name in RECIPES)
        if found["output_dir"] == options["init_from"]
    )
    assert other["num_inference_steps"] > options["num_inference_steps"]
    for name in ("pretrained_teacher_model", "noise_scale_type"):
        assert other[name] == options[name]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_planned(recipe):
    """In the batch and the precision it says."""
    config = config_from_the_teacher(recipe)
    cost = plan.measure(folder_of(recipe), None, config)
    by_pairs = bool(config.num_pairs) / config.depths[0]  # the share of rows that nobody scores, drawn at random
    assert cost.calls["teacher"] == pytest.approx(1 - by_pairs, abs=4 * (by_pairs / config.train_batch_size) ** 0.5)
    assert (cost.calls["teacher"] < 1) == bool(config.num_pairs)
    assert cost.memory["activations and gradients"] > cost.memory["teacher"] / 10
    assert cost.work.flops > 1e11


# Those of more steps are the same networks and options in a longer loop, which a plan of them goes through.
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if " 5 " in recipe])
def test_a_recipe_makes_two_updates(recipe):
    """One row and one critic update at a time, on images of 32x32, or it would take minutes; with all weights."""
    few = ("--train_batch_size=1", "--gradient_accumulation_steps=1", "--critic_updates=1", "--num_pairs=0")
    config = config_from_the_teacher(recipe, *few, "--lr_warmup_steps=0")  # in a warm-up first updates are not seen
    torch.manual_seed(0)
    teacher = read_teacher(folder_of(recipe))
    teacher.shape = (3, 32, 32)
    networks = make_networks(teacher, *make_student_and_critic(teacher, config), config)
    state = TrainingState(networks, config, Accelerator(cpu=True, mixed_precision="no"))
    before = state.student.network.conv_in.weight.detach().clone()
    steps = run_updates(state, 0)
    for _ in range(2):
        step = next(steps)
        assert step.layers.loss.isfinite().all()
        assert step.critic.loss.isfinite().all()
    assert not torch.equal(state.student.network.conv_in.weight, before)
