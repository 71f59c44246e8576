"""Every recipe on a teacher of the published shape, with random weights: what it would cost, and two updates."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import UNet2DModel

from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.config import PRESETS, parse_recipe
from hsivi_diffusers.distillation.trainer import Players, make_networks

TRAINING = Path(__file__).parents[2] / "training"
RECIPES = sorted(path for preset in PRESETS for path in (TRAINING / "configs").glob(f"*_{preset}.yaml"))
TEACHERS = {"cifar10": "cifar10_32", "celeba64": "celeba_64", "imagenet64": "imagenet_64", "church256": "church_256"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]


def read(path, *arguments):
    """The options of a recipe, for its teacher here."""
    teacher = TRAINING / "teachers" / TEACHERS[path.stem.split("_")[0]]
    given = ["--config", str(path), f"--pretrained_teacher_model={teacher}", *arguments]
    return parse_recipe("", given)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_planned(path):
    """In the batch and the precision it says."""
    options = read(path)
    written = yaml.safe_load(path.read_text())
    assert options.training.train_batch_size == written["train_batch_size"]
    cost = plan.measure(options)
    assert cost.calls["teacher"] == 1
    assert cost.memory["activations and gradients"] > cost.memory["teacher"] / 10
    assert cost.flops > 1e11


# Those of more layers are the same networks and options in a longer loop, which a plan of them goes through.
@pytest.mark.parametrize("path", [path for path in RECIPES if "_t5_" in path.name], ids=lambda path: path.stem)
def test_a_recipe_makes_two_updates(path):
    """One row and one critic update at a time, on pictures of 32x32, or it would take minutes; with all weights."""
    few = ("--train_batch_size=1", "--gradient_accumulation_steps=1", "--critic_updates=1")
    options = read(path, *few, "--lr_warmup_steps=0")  # in a warm-up the first updates are too small to be seen
    config, schedule = plan.read_configs(str(options.teacher.pretrained_teacher_model), None)
    config["sample_size"] = 32
    torch.manual_seed(0)
    unets = tuple(UNet2DModel.from_config(config) for _ in range(3))
    for unet in unets[1:]:
        unet.load_state_dict(unets[0].state_dict())
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    players = Players(make_networks(unets, schedule, options), options, accelerator)
    before = players.student.unet.conv_in.weight.detach().clone()
    steps = players.updates(0)
    for _ in range(2):
        step = next(steps)
        assert step.layers.loss.isfinite().all()
        assert step.critic.loss.isfinite().all()
    assert not torch.equal(players.student.unet.conv_in.weight, before)
