"""How far the critic is behind the student."""

import math
from itertools import islice

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from hsivi_diffusers.distillation import lag
from hsivi_diffusers.distillation.lag import critic_lag
from hsivi_diffusers.distillation.pairs import PAIR_CALLS
from hsivi_diffusers.distillation.state import trained
from hsivi_diffusers.distillation.updates import make_objective, run_updates
from hsivi_diffusers.runs.page import read_log
from hsivi_diffusers.runs.state_dicts import random_state
from tiny_unet import make_unet

CPU = torch.device("cpu")


def judge(state):
    """The critic's loss, and its distance to the unguided teacher."""
    objective, draws = make_objective(state.config, state.bridge), lag._draw(state, 0)
    held = [next(draws) for _ in range(4)]
    loss, answers = lag._judge(state, objective, held)
    return loss, lag._distance(state, objective, held, answers)


def disturb(module, size=0.02):
    with torch.no_grad():
        for weight in trained(module):
            weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", [(1.0,), (3.0,), (2.0, 3.0)])
def test_a_critic_that_has_learned_nothing_is_the_unguided_teacher(make_state, class_teacher, scales):
    state = make_state(class_teacher, guidance_scale=scales)
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


@pytest.mark.parametrize(("rate", "least", "most"), [(3e-3, 0.0, 0.1), (3e-5, 0.5, 1.0)])
def test_it_is_small_if_the_critic_has_followed_and_large_if_its_rate_was_too_low(make_state, rate, least, most):
    """The student is moved away from the teacher, and the critic fitted to it in 80 updates."""
    state = make_state(critic_first=80, max_train_steps=81, critic_updates=1, critic_learning_rate=rate)
    disturb(state.layers, 0.1)
    list(islice(run_updates(state, 0), 80))
    assert least <= critic_lag(state, 80) <= most


@pytest.mark.parametrize(
    ("memory_format", "options"),
    [
        (torch.contiguous_format, {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}),
        (torch.channels_last, {}),
        (torch.channels_last, {"use_8bit_adam": True}),
    ],
)
def test_the_run_goes_on_to_the_same_bits(make_state, monkeypatch, memory_format, options):
    """With dropout, which draws from the generators of torch, and whatever the order of the weights in memory."""
    monkeypatch.setattr(lag, "ROWS", 8)
    if "use_8bit_adam" in options:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    unet = make_unet(block_out_channels=(24, 24), dropout=0.1).to(memory_format=memory_format)
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    ends = []
    for looks in (False, True):
        torch.manual_seed(0)
        state = make_state(pipeline, max_train_steps=4, adam_beta1=0.9, **options)
        with state.counting_rows() as rows:
            for step in run_updates(state, 0):
                if looks and step.step < 3:
                    lags = [critic_lag(state, step.step) for _ in range(2)]
                    assert lags[0] == lags[1]
        assert all(weight.grad is None and weight.requires_grad for weight in trained(state.critic))
        moments = state.critic_optimizer.state_dict()["state"]
        ends.append([dict(rows), random_state(CPU), state.critic_optimizer.param_groups[0]["lr"]])
        tensors = [*trained(state.layers), *trained(state.critic), *(each["step"] for each in moments.values())]
        ends[-1].append([tensor if isinstance(tensor, int) else tensor.tolist() for tensor in tensors])
    assert ends[0] == ends[1]


def test_the_pairs_that_it_makes_first_are_counted(make_state):
    """As in a guided run that is resumed in its second half."""
    state = make_state(num_inference_steps=1, num_pairs=8, pair_steps=1, pair_weight=0.1)
    with state.counting_rows() as rows:
        critic_lag(state, 3)
    assert rows == {"student": 0, "critic": 0, "teacher": 8 * PAIR_CALLS}


def test_a_fit_that_diverges_tells_nothing(make_state):
    assert math.isnan(critic_lag(make_state(critic_learning_rate=1e9), 0))


@pytest.mark.slow
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
