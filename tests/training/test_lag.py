"""How far the critic is behind the student."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler

from hsivi_diffusers.distillation import lag
from hsivi_diffusers.distillation.lag import critic_lag
from hsivi_diffusers.distillation.networks import load_networks
from hsivi_diffusers.distillation.state import TrainingState, trained
from hsivi_diffusers.distillation.state_dicts import copy_state_dict, random_state
from hsivi_diffusers.distillation.teachers import load_parts
from hsivi_diffusers.distillation.updates import make_objective, run_updates
from hsivi_diffusers.run_page import read_log
from tiny_unet import make_unet

CPU = torch.device("cpu")


def judge(state):
    """The critic's loss, and its distance to the unguided teacher."""
    draws = lag._draw(state, 0)
    return lag._judge(state, make_objective(state.config, state.bridge), [next(draws) for _ in range(4)])


def disturb(module, size=0.02):
    with torch.no_grad():
        for weight in trained(module):
            weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", [(1.0,), (3.0,), (2.0, 3.0)])
def test_a_critic_that_has_learned_nothing_is_the_unguided_teacher(
    make_config, class_teacher, fresh_accelerator, scales
):
    config, accelerator = make_config(guidance_scale=scales), Accelerator(cpu=True)
    state = TrainingState(load_networks(load_parts(class_teacher), config, accelerator), config, accelerator)
    if len(scales) > 1:  # its labels for these start elsewhere
        labels = state.critic_unet.class_embedding.weight
        labels.data = state.bridge.unet.class_embedding.weight.repeat_interleave(len(scales), 0)
    loss, distance = judge(state)
    assert loss > 0
    assert distance == pytest.approx(0, abs=1e-9)
    disturb(state.critic)
    assert judge(state)[1] > 1e-3


def test_the_loss_is_that_which_the_critic_is_trained_with(make_state):
    state = make_state(critic_first=1, critic_updates=1)
    with torch.no_grad():
        draw = next(lag._draw(state, 0))
        loss, _ = lag._judge(state, (objective := make_objective(state.config, state.bridge)), [draw])
        assert loss == objective.critic_loss(state.critic, draw).mean()


def test_it_is_small_if_the_critic_has_followed_and_near_one_if_not(make_state):
    """The student is moved away from the teacher, and the critic fitted to it in one of two runs."""
    lags = []
    for updates in (1, 150):
        state = make_state(critic_first=150, max_train_steps=151, critic_updates=1, critic_learning_rate=3e-3)
        disturb(state.layers, 0.1)
        for step in run_updates(state, 0):
            if step.next_step == updates:
                break
        lags.append(critic_lag(state, updates))
    assert 0.5 < lags[0] < 2
    assert lags[1] < 0.25


def test_the_run_is_then_as_it_was(make_config, tmp_path, fresh_accelerator):
    """With dropout, which draws from the generators of torch."""
    DDPMPipeline(make_unet(dropout=0.1), DDPMScheduler()).save_pretrained(tmp_path)
    config, accelerator = make_config(max_train_steps=4), Accelerator(cpu=True)
    state = TrainingState(load_networks(load_parts(tmp_path), config, accelerator), config, accelerator)

    def everything():
        return {
            **{name: copy_state_dict(part.state_dict()) for name, part in state.parts.items()},
            "chains": [copy_state_dict(chain.state_dict()) for chain in state.chains],
        }

    with state.counting_rows() as rows:
        next(run_updates(state, 0))
        before, counted, random = everything(), dict(rows), random_state(CPU)
        first = critic_lag(state, 1)
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)
        assert (rows, random_state(CPU)) == (counted, random)
        assert critic_lag(state, 1) == first


def test_two_processes_see_what_two_micro_batches_see(distil, launch, tmp_path):
    settings = {"max_train_steps": 2, "validation_steps": 1, "critic_updates": 1}
    distil(tmp_path / "one", gradient_accumulation_steps=2, **settings)
    statuses, text = launch(tmp_path / "two", processes=2, **settings)
    assert statuses == [0, 0], text
    one, two = (
        {line["step"]: line["critic/lag"] for line in read_log(tmp_path / name) if "critic/lag" in line}
        for name in ("one", "two")
    )
    assert one.keys() == {1, 2}
    assert two == pytest.approx(one, rel=1e-4)
