"""A sampler of one step: its layer is fitted to pairs of the teacher's ODE, then the critic learns, then both do."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.distillation import networks, plan, state, updates
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.pairs import TeacherPairs
from hsivi_diffusers.vi import KullbackLeibler, PairChain, PairMixingChain, PoolChain, WithPairs

ONE = {"preset": "one_call", "num_inference_steps": 1, "num_pairs": 8, "pair_steps": 3}
ONE["critic_first"] = 1
FIT = {"num_pairs": 4, "pair_steps": 80}


@pytest.fixture
def make_one(make_state):
    """Makes the TrainingState of a run of one step that has made no update yet; options by keyword."""
    return lambda **settings: make_state(**{**ONE, **settings})


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


# ----- options -----


@pytest.mark.parametrize(("preset", "clips"), [("one_call", True), ("paper", False)])
def test_the_student_clips_images_as_the_preset_has_it(make_one, preset, clips):
    assert make_one(preset=preset, num_pairs=0, pair_steps=500).student.clip_images is clips


@pytest.mark.parametrize(("shape", "start"), [((1, 8, 8), 440), ((1, 64, 64), 440), ((3, 64, 64), 541)])
def test_one_step_starts_at_a_noise_whatever_the_size_of_the_images(teacher, shape, start):
    scheduler = networks.make_scheduler(load_teacher(str(teacher))[1], HSIVIConfig(num_inference_steps=1), shape)
    assert scheduler.config.layer_timesteps == [start, 0]
    alpha, sigma = scheduler.alpha_sigma(torch.tensor([start - 1, start]), torch.zeros(2, 1, 1, 1))
    assert (sigma / alpha >= 2.5 * shape[0] ** 0.5).flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": -1}, "num_pairs=-1: give a number from 0 on"),
        ({"pair_weight": -0.1}, "pair_weight=-0.1: give a number from 0 on"),
        ({"pair_steps": 0}, "pair_steps=0: give a number above 0"),
        ({"noise_scale_type": "per_pixel"}, "noise_scale_type='per_pixel' has nothing to learn from pairs"),
        ({"num_pairs": 0, "pair_steps": 500, "pair_weight": 1.0}, "pair_weight=1.0 has no effect"),
        ({"num_pairs": 0}, "pair_steps=3 has no effect without pairs: set num_pairs, say 6400"),
        ({"critic_first": -1}, "critic_first=-1: give a number of updates from 0 to below max_train_steps=5"),
        ({"critic_first": 5}, "critic_first=5: give a number of updates from 0 to below max_train_steps=5"),
        ({"start_noise": 0.0}, "start_noise=0.0: give a number above 0, or leave it out"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(distil, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", **{**ONE, "pretrained_teacher_model": "nowhere", **settings})
    assert not (tmp_path / "run").exists()


# ----- the fit to the pairs -----


def test_the_layer_is_fitted_to_the_pairs_first_and_the_optimizer_starts_over(make_one, monkeypatch):
    monkeypatch.setattr(updates, "PAIR_LEARNING_RATE", 2e-3)
    made = make_one(**FIT)
    before = {name: value.clone() for name, value in made.critic.state_dict().items()}
    batch = made.chains[0].draw(made.layers)

    def distance():
        with torch.no_grad():
            return (made.layers(batch.x_next, batch.t).mean - batch.end).square().mean()

    at_first = distance()
    updates._regress(made)
    assert distance() < at_first / 2
    assert all(torch.equal(value, before[name]) for name, value in made.critic.state_dict().items())
    assert len(made.layer_optimizer.state) == 0
    assert made.layer_optimizer.param_groups[0]["lr"] == 0  # of the first step of the warm-up
    for average, parameter in zip(made.ema.shadow_params, made.student.parameters(), strict=True):
        assert torch.equal(average, parameter)


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_several_layers_are_fitted_to_pairs_which_then_guide_the_first_or_go(make_one, monkeypatch, weight):
    monkeypatch.setattr(updates, "PAIR_LEARNING_RATE", 2e-3)
    fitted, fit = [], updates.fit
    monkeypatch.setattr(updates, "fit", lambda *given, **named: fitted.append(given[4]) or fit(*given, **named))
    steps = FIT["pair_steps"] if weight else 2
    settings = {**FIT, "pair_steps": steps, "pair_weight": weight}
    made = make_one(num_inference_steps=2, gradient_accumulation_steps=2, **settings)
    t = torch.tensor([0, 1] * 8)
    x_next, end, _ = made.sample_pairs(0, t, torch.Generator().manual_seed(0))

    def distance():
        with torch.no_grad():
            squared = (made.layers(x_next, t).mean - end).square()
            return torch.stack([squared[t == layer].mean() for layer in (0, 1)])

    at_first = distance()
    next(updates.run_updates(made, 0))
    assert not weight or (distance() < 0.8 * at_first).all()
    kinds = [[type(chain) for chain in chains] for chains in fitted]
    assert kinds == [[PairChain] * 2, [PairMixingChain if weight else PoolChain] * 2]
    assert made.pairs.cache_info().currsize == (2 if weight else 0)


def test_each_micro_batch_has_its_share_of_the_pairs(make_one):
    made = make_one(gradient_accumulation_steps=2, num_pairs=6)
    draws = [chain.draw(made.layers, torch.Generator().manual_seed(0)) for chain in made.chains]
    assert all(isinstance(chain, PairMixingChain) for chain in made.chains)
    seen = [{row.sum().item() for _ in range(20) for row in chain.draw(made.layers).x_next} for chain in made.chains]
    assert [len(each) for each in seen] == [3, 3]
    assert not seen[0] & seen[1]
    assert not torch.equal(draws[0].x_next, draws[1].x_next)


@pytest.mark.parametrize(("weight", "kind"), [(0.0, KullbackLeibler), (0.01, WithPairs)])
def test_the_pairs_go_on_guiding_the_layer_by_their_weight(make_one, weight, kind):
    made = make_one(pair_weight=weight)
    assert type(updates.make_objective(made.config, made.bridge)) is kind


def test_the_weight_of_the_pairs_falls_as_the_rate_does(make_one, monkeypatch):
    seen, rates = [], []

    class Recorded(WithPairs):
        def layer_loss(self, critic, bridge, draw):
            seen.append(self.weight)
            return super().layer_loss(critic, bridge, draw)

    monkeypatch.setattr(updates, "WithPairs", Recorded)
    made = make_one(pair_weight=0.01, critic_first=0, max_train_steps=6, lr_warmup_steps=2, learning_rate=1e-3)
    for _ in updates.run_updates(made, 0):
        rates.append(made.lr_schedulers[0].get_last_lr()[0])
    assert seen == pytest.approx([0.0, *(0.01 * rate / 1e-3 for rate in rates[:-1])])
    assert max(seen) == pytest.approx(0.01)
    assert seen[-1] < 0.002


def test_the_critic_learns_alone_before_the_layer_moves(make_one):
    made = make_one(critic_first=2, max_train_steps=4)
    steps = updates.run_updates(made, 0)
    next(steps)
    layers, critic = ({k: v.clone() for k, v in each.state_dict().items()} for each in (made.layers, made.critic))
    next(steps)
    assert all(torch.equal(value, layers[name]) for name, value in made.layers.state_dict().items())
    assert not all(torch.equal(value, critic[name]) for name, value in made.critic.state_dict().items())
    next(steps)  # of the warm-up, at a rate of 0
    next(steps)
    assert not all(torch.equal(value, layers[name]) for name, value in made.layers.state_dict().items())


@pytest.mark.parametrize("first", [3, 12])
def test_the_first_updates_of_the_layer_are_no_larger_for_the_critic_that_learned_alone(make_one, first):
    """Adam, without a first moment, moves a weight by the rate, of which the second update has a quarter."""
    settings = {"num_pairs": 0, "pair_steps": 500, "lr_warmup_steps": 4}
    made = make_one(**settings, critic_first=first, max_train_steps=40)
    steps, before = updates.run_updates(made, 0), [parameter.clone() for parameter in made.student.parameters()]
    for _ in range(first + 2):
        next(steps)
    moved = max((new - old).abs().max().item() for new, old in zip(made.student.parameters(), before, strict=True))
    assert 0 < moved < 1.5 * made.config.learning_rate / 4


# ----- whole runs -----


@pytest.mark.parametrize("settings", [{"pair_weight": 0.0}, {"num_inference_steps": 2}], ids=str)
def test_a_run_resumes_to_the_same_bits_and_does_not_fit_the_pairs_again(distil, tmp_path, monkeypatch, settings):
    run = {**ONE, **settings}
    whole = distil(tmp_path / "whole", **run)
    fit, starts = updates.fit, []

    def stopping(*given, **named):
        starts.append(named.get("start_step"))
        for step in fit(*given, **named):
            if step.step == 3 and len(starts) == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(updates, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "run", **run)
    distil(tmp_path / "run", resume_from_checkpoint="latest", **run)
    assert starts == [None, 0, 2]
    ended, resumed = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)
    calls = [json.loads((run / "training.json").read_text())["network_calls"] for run in (whole, tmp_path / "run")]
    # though the pairs were made twice, if they guide the layers; a pool is filled in a call of 4 rows more
    assert calls[0] == pytest.approx(calls[1], abs=4 * (settings.get("num_inference_steps", 1) - 1))


def test_sigterm_before_the_first_update_ends_a_run_that_may_start_again(launch, tmp_path):
    """Between the updates by the pairs, of which nothing is saved; both processes end."""
    statuses, text = launch(tmp_path / "run", kill={"point": "SIGTERM", "step": 2}, processes=2, **ONE)
    assert statuses == [75, 75], text
    assert (
        "stopped before the first update, nothing was saved: start again with --resume_from_checkpoint latest" in text
    )
    assert not any((tmp_path / "run" / name).exists() for name in ("checkpoints", "pipeline"))
    again = launch(tmp_path / "run", processes=2, resume_from_checkpoint="latest", **ONE)
    assert again[0] == [0, 0], again[1]


def test_a_run_counts_the_calls_of_its_pairs_and_makes_a_pipeline_of_one_call(distil, tmp_path):
    run = distil(tmp_path / "run", **ONE)
    calls = json.loads((run / "training.json").read_text())["network_calls"]
    # 8 pairs of 15 calls, 3 updates of 4 rows, and 5 of the layers, with 2 of the critic, which share the first answer.
    assert calls == 8 * 15 + 3 * 4 + 5 * 4 * (1 + 1 + 1 + 2)
    pipeline = HSIVIPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.layer_timesteps == [440, 0]
    assert pipeline(2, output_type="np", return_dict=False)[0].shape == (2, 8, 8, 1)


def test_pairs_of_a_class_conditional_teacher_have_classes(distil, class_teacher, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        state, "TeacherPairs", lambda *given, **named: made.append(TeacherPairs(*given, **named)) or made[0]
    )
    distil(tmp_path / "run", **{**ONE, "num_pairs": 24}, pretrained_teacher_model=class_teacher)
    assert set(made[0].condition.tolist()) == {0, 1, 2}
    assert len(made[0].condition) == 24


def test_a_plan_tells_what_the_pairs_cost(make_config, teacher):
    config = make_config(**ONE)
    (line,) = plan._fit_line(config, (8 * 15, 3 * 4), seconds=1.0)
    # A backward pass is two calls: 8 pairs of 15 calls, and 3 updates of 4 rows
    assert line == ("before them about 3 min for 8 pairs in 120 calls of the teacher and 3 updates of the layers alone")
