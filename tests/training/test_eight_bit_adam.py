"""Adam's moments in 8 bits, by bitsandbytes, which `make test-slow` installs."""

import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from hsivi_diffusers import HSIVITrainer
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.updates import run_updates
from hsivi_diffusers.runs.state_dicts import load_state_dict, save_state_dict
from tiny_unet import make_unet

OPTIONS = {"use_8bit_adam": True, "max_train_steps": 2, "critic_updates": 1, "lr_warmup_steps": 0}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run whose teacher has weights of more than 4,096 numbers: the moments of others are not changed."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    DDPMPipeline(make_unet(block_out_channels=(24, 24)), DDPMScheduler()).save_pretrained(folder)
    return {**OPTIONS, "pretrained_teacher_model": folder}


def test_it_is_refused_without_bitsandbytes_before_the_teacher_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ValueError, match="use_8bit_adam=True needs bitsandbytes: run `pip install 'bitsandbytes>=0.50'`"
    ):
        HSIVITrainer("nowhere", HSIVIConfig(use_8bit_adam=True))


def test_a_tensor_under_two_names_is_saved(tmp_path):
    """As the codes of all moments are."""
    codes = torch.arange(5.0)
    save_state_dict({0: {"qmap": codes}, 1: {"qmap": codes}}, tmp_path / "state.safetensors")
    state = load_state_dict(tmp_path / "state.safetensors")
    assert all(state[name]["qmap"].equal(codes) for name in (0, 1))


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(options, launch, tmp_path, differences):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(whole, **options)[0] == [0]
    assert launch(run, kill={"point": "SIGTERM", "step": 1}, **options)[0] == [75]
    assert launch(run, resume_from_checkpoint="latest", **options)[0] == [0]
    assert differences(run, whole) == []
    moments = load_file(run / "checkpoints" / "checkpoint-2" / "layer_optimizer.safetensors")
    assert torch.uint8 in {moment.dtype for moment in moments.values()}


@pytest.mark.slow
def test_it_trains_near_to_full_precision(options, launch, tmp_path):
    eight, full = tmp_path / "eight", tmp_path / "full"
    assert launch(eight, **options)[0] == launch(full, **{**options, "use_8bit_adam": False})[0] == [0]
    name = "pipeline/unet/diffusion_pytorch_model.safetensors"
    got, wanted = load_file(eight / name), load_file(full / name)
    assert any(not got[name].equal(weight) for name, weight in wanted.items())
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-5)  # the run moves weights by 6e-5


@pytest.mark.slow
def test_it_is_planned(options, make_config, make_state):
    config, teacher = make_config(**options), str(options["pretrained_teacher_model"])
    state = make_state(teacher, **options)
    next(run_updates(state, 0))
    optimizers = (state.layer_optimizer, state.critic_optimizer)
    kept = [moment for each in optimizers for values in each.state.values() for moment in values.items()]
    names = ("state1", "state2", "absmax1", "absmax2")
    held = sum(moment.numel() * moment.element_size() for name, moment in kept if name in names)
    steps = 4 * (len(list(state.layers.parameters())) + len(list(state.critic.parameters())))
    full = make_config(**{**options, "use_8bit_adam": False})
    cost, usual = (plan.measure(*plan.read_teacher(teacher, None), each).memory for each in (config, full))
    assert cost["Adam's moments"] == held + steps
    assert held < usual["Adam's moments"] / 2
    assert cost["activations and gradients"] == pytest.approx(usual["activations and gradients"])
