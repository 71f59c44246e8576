"""A student that predicts something else than its teacher: fitted first, saved as a plain pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler

from hsivi_diffusers import HSIVIPipeline
from hsivi_diffusers.distillation import plan, updates
from hsivi_diffusers.vi import DivergenceError, ImitationChain, PairChain

VELOCITY = {"prediction_type": "v_prediction", "pair_steps": 3}


def gap(state):
    """Mean square of what is between the clean images of student and teacher, at inputs of the teacher's chain."""
    chain = updates._fit_chain(state, 0)
    batch = chain.draw(state.student, torch.Generator().manual_seed(1))
    with torch.no_grad():
        residual = state.student(batch.x_next, batch.t, batch.condition).mean - batch.end
    return residual.square().mean().item()


@pytest.mark.parametrize("steps", [1, 2, (1, 2)])
def test_the_student_is_brought_to_where_the_teacher_is(make_state, steps):
    settings = {"num_inference_steps": steps, "num_pairs": 0, "train_batch_size": 32}
    assert gap(make_state(**settings)) < 1e-12
    fit = {"prediction_type": "v_prediction", "pair_steps": 100, "pair_learning_rate": 3e-3}
    state = make_state(**settings, **fit)
    before = gap(state)
    updates._regress(state)
    assert gap(state) < 0.2 * before


def test_the_fit_is_to_the_teacher_or_if_there_are_any_to_its_pairs(make_state):
    state = make_state(**VELOCITY)
    assert isinstance(updates._fit_chain(state, 0), ImitationChain)
    state = make_state(**VELOCITY, num_pairs=4)
    assert isinstance(updates._fit_chain(state, 0), PairChain)


def test_a_fit_that_diverges_names_its_rate(make_state):
    state = make_state(**VELOCITY)
    with torch.no_grad():
        state.student.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="the loss of the fit before the updates, of pair_learning_rate=0.0005,"):
        updates._regress(state)


def test_teacher_and_critic_keep_their_prediction(make_state):
    state = make_state(**VELOCITY)
    assert state.student.scheduler.config.prediction_type == "v_prediction"
    assert state.bridge.scheduler.config.prediction_type == "epsilon"
    x, level = torch.randn(3, 1, 8, 8), torch.tensor([700, 300, 20])
    with torch.no_grad():
        assert torch.equal(state.critic(x, level), state.bridge.score(x, level))
    assert not updates.has_other_prediction(make_state())
    assert not updates.has_other_prediction(make_state(prediction_type="epsilon"))


def test_the_saved_pipeline_says_what_its_network_predicts(distil, tmp_path):
    run = distil(tmp_path / "run", **VELOCITY)
    pipeline = HSIVIPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert DDIMScheduler.from_config(pipeline.scheduler.config).config.prediction_type == "v_prediction"
    assert torch.isfinite(pipeline(2, output_type="pt").images).all()


def test_a_run_that_was_stopped_is_not_fitted_again(distil, tmp_path, monkeypatch, differences):
    settings = {**VELOCITY, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = distil(tmp_path / "whole", **settings)
    parts = distil(tmp_path / "parts", **settings)
    shutil.rmtree(parts / "checkpoints" / "checkpoint-4")
    monkeypatch.setattr(updates, "_regress", lambda state: pytest.fail("it was fitted again"))
    distil(parts, **settings, resume_from_checkpoint="latest")
    assert differences(whole, parts) == []


def test_calls_of_the_fit_are_counted(distil, tmp_path):
    alone = {"num_inference_steps": 1, "num_pairs": 0, "critic_updates": 1, "max_train_steps": 2}
    run = distil(tmp_path / "run", **VELOCITY, **alone)
    calls = json.loads((run / "training.json").read_text())["network_calls"]
    # 3 updates of 4 rows by student and teacher; 2 by student, teacher and critic, one answer of which serves both
    assert calls == 3 * 4 * 2 + 2 * 4 * 3


def test_a_run_of_another_prediction_is_no_start(distil, tmp_path):
    run = distil(tmp_path / "run", **VELOCITY)
    with pytest.raises(ValueError, match="has a student of prediction_type 'v_prediction': set it, not 'epsilon'"):
        distil(tmp_path / "next", init_from=str(run))


def test_a_run_goes_on_in_its_prediction_without_a_fit(distil, tmp_path, monkeypatch):
    run = distil(tmp_path / "run", **VELOCITY)
    monkeypatch.setattr(updates, "_regress", lambda state: pytest.fail("it was fitted again"))
    distil(tmp_path / "next", init_from=str(run), **VELOCITY)


def test_a_plan_tells_what_the_fit_costs(make_config):
    config = make_config(**VELOCITY, num_inference_steps=3)
    # 3 updates of 4 rows: a call and a backward pass of the student, and 2 calls of the teacher on average
    assert plan._fit_line(config, "epsilon", call=1.0) == ["before them about 60 s for 3 updates of the layers alone"]
    assert plan._fit_line(config, "v_prediction", call=1.0) == []


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_two_processes_fit_as_one_does_with_two_micro_batches(launch, tmp_path, differences, preset):
    settings = {**VELOCITY, "preset": preset, "critic_updates": 1, "max_train_steps": 2}
    statuses, text = launch(tmp_path / "two", processes=2, **settings)
    assert statuses == [0, 0], text
    assert launch(tmp_path / "one", gradient_accumulation_steps=2, **settings)[0] == [0]
    assert differences(tmp_path / "two", tmp_path / "one") == []
