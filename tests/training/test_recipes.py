"""Every recipe on a teacher of the published shape, with random weights: what it would cost, and two updates."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import UNet2DModel

from hsivi_diffusers.commands.cli import PushAtEnd, Teacher
from hsivi_diffusers.commands.options import parse_options
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.config import PRESETS, HSIVIConfig
from hsivi_diffusers.distillation.networks import make_networks
from hsivi_diffusers.distillation.state import TrainingState
from hsivi_diffusers.distillation.updates import run_updates

TRAINING = Path(__file__).parents[2] / "training"
RECIPES = sorted(path for preset in PRESETS for path in (TRAINING / "configs").glob(f"*_{preset}.yaml"))
TEACHERS = {"cifar10": "cifar10_32", "celeba64": "celeba_64", "imagenet64": "imagenet_64", "church256": "church_256"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]


def read(path, *arguments):
    """Configs of the teacher and the config of a recipe; the run of `init_from` need not be there."""
    groups = [Teacher, HSIVIConfig, PushAtEnd]
    config = parse_options(groups, "", ["--config", str(path), *arguments])[1]
    return *plan.read_teacher(TRAINING / "teachers" / TEACHERS[path.stem.split("_")[0]], None), config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_planned(path):
    """In the batch and the precision it says."""
    shape, schedule, config = read(path)
    written = yaml.safe_load(path.read_text())
    assert config.train_batch_size == written["train_batch_size"]
    cost = plan.measure(shape, schedule, config)
    assert cost.calls["teacher"] == 1
    assert cost.memory["activations and gradients"] > cost.memory["teacher"] / 10
    assert cost.flops > 1e11


# Those of more layers are the same networks and options in a longer loop, which a plan of them goes through.
@pytest.mark.parametrize("path", [path for path in RECIPES if "_t5_" in path.name], ids=lambda path: path.stem)
def test_a_recipe_makes_two_updates(path):
    """One row and one critic update at a time, on images of 32x32, or it would take minutes; with all weights."""
    few = ("--train_batch_size=1", "--gradient_accumulation_steps=1", "--critic_updates=1")
    shape, schedule, config = read(path, *few, "--lr_warmup_steps=0")  # in a warm-up the first updates are not seen
    shape["sample_size"] = 32
    torch.manual_seed(0)
    unets = tuple(UNet2DModel.from_config(shape) for _ in range(3))
    for unet in unets[1:]:
        unet.load_state_dict(unets[0].state_dict())
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    state = TrainingState(make_networks(unets, schedule, config), config, accelerator)
    before = state.student.unet.conv_in.weight.detach().clone()
    steps = run_updates(state, 0)
    for _ in range(2):
        step = next(steps)
        assert step.layers.loss.isfinite().all()
        assert step.critic.loss.isfinite().all()
    assert not torch.equal(state.student.unet.conv_in.weight, before)
