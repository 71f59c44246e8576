"""A sampler of one call: its layer is fitted to pairs of the teacher's ODE, then the critic learns, then both do."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.distillation import config as recipe
from hsivi_diffusers.distillation import trainer as players
from hsivi_diffusers.distillation.pairs import TeacherPairs
from hsivi_diffusers.vi import Guided, GuidedChain, KullbackLeibler, PairChain, PoolChain

ONE = {"preset": "fast", "num_layers": 1, "ode_pairs": 8, "ode_calls": 2, "ode_steps": 3, "critic_first": 1}


@pytest.fixture
def options(arguments, fresh_accelerator):
    def make(*flags, **settings):
        return recipe.parse_recipe("", arguments("nowhere", *flags, **settings))

    return make


@pytest.fixture
def make_players(options):
    def make(**settings):
        asked, accelerator = options(**{**ONE, **settings}), Accelerator(cpu=True)
        return players.Players(players.load_networks(asked, accelerator), asked, accelerator)

    return make


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


# ----- options -----


def test_fast_has_its_own_settings_for_one_call_and_what_is_given_wins(options):
    one = recipe.flatten(options(preset="fast", num_layers=1, max_train_steps=300))
    ours = {name: value for name, value in recipe.ONE_CALL.items() if name != "critic_updates"}
    assert {name: one[name] for name in ours} == ours
    assert one["critic_updates"] == 2  # of the fixture, as everything that is given
    assert recipe.flatten(options(preset="fast", num_layers=1, ode_pairs=7))["ode_pairs"] == 7
    two = recipe.flatten(options(preset="fast", num_layers=2))
    assert {name: two[name] for name in ("ode_pairs", "critic_first", "start_signal")} == {
        "ode_pairs": 0,
        "critic_first": 0,
        "start_signal": 3.2,
    }
    assert recipe.flatten(options(preset="paper", num_layers=1))["ode_pairs"] == 0


@pytest.mark.parametrize(
    ("named", "start"), [({"start_signal": 3.2}, (3.2, None)), ({"start_noise": 4.0}, (None, 4.0))]
)
def test_a_start_that_is_named_goes_before_that_of_one_call(options, named, start):
    """Also the start that preset `fast` has for several calls."""
    layers = options(preset="fast", num_layers=1, **named).layers
    assert (layers.start_signal, layers.start_noise) == start


def test_a_timestep_that_is_named_is_the_only_start_of_the_record(options):
    layers = options(preset="fast", num_layers=1, start_timestep=300).layers
    assert (layers.start_timestep, layers.start_signal, layers.start_noise) == (300, None, None)


@pytest.mark.parametrize(("updates", "alone"), [(5, 0), (60, 10), (3000, 50)])
def test_of_a_short_run_the_critic_has_less_to_learn_alone(options, updates, alone):
    assert options(preset="fast", num_layers=1, max_train_steps=updates).training.critic_first == alone


def test_a_run_that_goes_on_from_another_takes_no_pairs_unless_they_are_named(options):
    one = options(preset="fast", num_layers=1, init_from="runs/other", max_train_steps=3000)
    assert (one.method.ode_pairs, one.training.critic_first) == (0, 0)
    assert one.training.learning_rate == recipe.ONE_CALL["learning_rate"]
    named = options(preset="fast", num_layers=1, init_from="runs/other", max_train_steps=3000, ode_pairs=7)
    assert named.method.ode_pairs == 7


@pytest.mark.parametrize(("preset", "clips"), [("fast", True), ("paper", False)])
def test_the_layers_clip_pictures_as_the_preset_has_it(make_players, preset, clips):
    assert make_players(preset=preset, ode_pairs=0, ode_calls=8, ode_steps=500).student.clip_pictures is clips


@pytest.mark.parametrize(("shape", "start"), [((1, 8, 8), 440), ((1, 64, 64), 440), ((3, 64, 64), 541)])
def test_one_call_starts_at_a_noise_whatever_the_size_of_the_pictures(options, teacher, shape, start):
    scheduler = players.make_scheduler(load_teacher(str(teacher))[1], options(**ONE).layers, shape)
    assert scheduler.config.layer_timesteps == [start, 0]
    alpha, sigma = scheduler.alpha_sigma(torch.tensor([start - 1, start]), torch.zeros(2, 1, 1, 1))
    assert (sigma / alpha >= 2.5 * shape[0] ** 0.5).flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ode_pairs": -1}, "--ode_pairs -1: give a number from 0 on"),
        ({"ode_weight": -0.1}, "--ode_weight -0.1: give a number from 0 on"),
        ({"ode_coarse": -1.0}, "--ode_coarse -1.0: give a number from 0 on"),
        ({"ode_weight": 0.0, "ode_coarse": 5.0}, "--ode_coarse 5.0 is of the loss that --ode_weight 0 leaves out"),
        ({"ode_calls": 0}, "--ode_calls 0: give a number above 0"),
        ({"ode_steps": 0}, "--ode_steps 0: give a number above 0"),
        ({"ode_learning_rate": 0.0}, "--ode_learning_rate 0.0: give a number above 0"),
        ({"noise_scale_type": "scalar"}, "--noise_scale_type scalar has nothing to learn from pairs"),
        ({"ode_pairs": 0, "ode_calls": 8, "ode_steps": 500, "ode_weight": 1.0}, "--ode_weight 1.0 would not be used"),
        ({"ode_pairs": 0}, "--ode_calls 2 and --ode_steps 3 would not be used: pass --ode_pairs too"),
        ({"critic_first": -1}, "--critic_first -1: give a number of updates from 0 to below the 5"),
        ({"critic_first": 5}, "--critic_first 5: give a number of updates from 0 to below the 5"),
        ({"start_noise": 0.0}, "--start_noise 0.0: give a number above 0; that of preset fast is 2.5"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(distil, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", **{**ONE, "pretrained_teacher_model": "nowhere", **settings})
    assert not (tmp_path / "run").exists()


# ----- the fit to the pairs -----


def test_the_layer_is_fitted_to_the_pairs_first_and_the_optimizer_starts_anew(make_players):
    made = make_players(ode_steps=300, ode_pairs=4)
    before = {name: value.clone() for name, value in made.critic.state_dict().items()}
    batch = made.chains[0].draw(made.layers)

    def misses():
        with torch.no_grad():
            return (made.layers(batch.x_next, batch.t).mean - batch.end).square().mean()

    at_first = misses()
    made._regress()
    assert misses() < at_first / 2
    assert all(torch.equal(value, before[name]) for name, value in made.critic.state_dict().items())
    assert len(made.layer_optimizer.state) == 0
    assert made.layer_optimizer.param_groups[0]["lr"] == 0  # of the first step of the warm-up
    for average, parameter in zip(made.ema.shadow_params, made.student.parameters(), strict=True):
        assert torch.equal(average, parameter)


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_several_layers_are_fitted_to_pairs_which_then_guide_the_first_or_go(make_players, monkeypatch, weight):
    fitted, fit = [], players.fit
    monkeypatch.setattr(players, "fit", lambda *given, **named: fitted.append(given[4]) or fit(*given, **named))
    made = make_players(num_layers=2, ode_steps=300, ode_pairs=4, ode_weight=weight, gradient_accumulation_steps=2)
    t = torch.tensor([0, 1] * 8)
    x_next, end, _ = made._sample_pairs(0, t, torch.Generator().manual_seed(0))

    def misses():
        with torch.no_grad():
            miss = (made.layers(x_next, t).mean - end).square()
            return torch.stack([miss[t == layer].mean() for layer in (0, 1)])

    at_first = misses()
    next(made.updates(0))
    assert (misses() < 0.8 * at_first).all()
    kinds = [[type(chain) for chain in chains] for chains in fitted]
    assert kinds == [[PairChain] * 2, [GuidedChain if weight else PoolChain] * 2]
    assert made.pairs.cache_info().currsize == (2 if weight else 0)


def test_each_shard_has_its_share_of_the_pairs(make_players):
    made = make_players(gradient_accumulation_steps=2, ode_pairs=6)
    draws = [chain.draw(made.layers, torch.Generator().manual_seed(0)) for chain in made.chains]
    assert all(isinstance(chain, GuidedChain) for chain in made.chains)
    seen = [{row.sum().item() for _ in range(20) for row in chain.draw(made.layers).x_next} for chain in made.chains]
    assert [len(each) for each in seen] == [3, 3]
    assert not seen[0] & seen[1]
    assert not torch.equal(draws[0].x_next, draws[1].x_next)


@pytest.mark.parametrize(("weight", "kind"), [(0.0, KullbackLeibler), (0.01, Guided)])
def test_the_pairs_go_on_guiding_the_layer_by_their_weight(make_players, weight, kind):
    made = make_players(ode_weight=weight)
    assert type(players.make_objective(made.options.method, made.bridge)) is kind


def test_the_weight_of_the_pairs_falls_as_the_rate_does(make_players, monkeypatch):
    seen, rates = [], []

    class Recorded(Guided):
        def layer_loss(self, critic, bridge, draw):
            seen.append(self.weight)
            return super().layer_loss(critic, bridge, draw)

    monkeypatch.setattr(players, "Guided", Recorded)
    made = make_players(ode_weight=0.01, critic_first=0, max_train_steps=6, lr_warmup_steps=2, learning_rate=1e-3)
    for _ in made.updates(0):
        rates.append(made.lr_schedulers[0].get_last_lr()[0])
    assert seen == pytest.approx([0.0, *(0.01 * rate / 1e-3 for rate in rates[:-1])])
    assert max(seen) == pytest.approx(0.01)
    assert seen[-1] < 0.002


def test_the_critic_learns_alone_before_the_layer_moves(make_players):
    made = make_players(critic_first=2, max_train_steps=4)
    steps = made.updates(0)
    next(steps)
    layers, critic = ({k: v.clone() for k, v in each.state_dict().items()} for each in (made.layers, made.critic))
    next(steps)
    assert all(torch.equal(value, layers[name]) for name, value in made.layers.state_dict().items())
    assert not all(torch.equal(value, critic[name]) for name, value in made.critic.state_dict().items())
    next(steps)  # of the warm-up, at a rate of 0
    next(steps)
    assert not all(torch.equal(value, layers[name]) for name, value in made.layers.state_dict().items())


@pytest.mark.parametrize("first", [3, 20])
def test_the_first_updates_of_the_layer_are_no_larger_for_the_critic_that_learned_alone(make_players, first):
    """Adam, without a first moment, moves a weight by the rate, of which the second update has a quarter."""
    settings = {"ode_pairs": 0, "ode_calls": 8, "ode_steps": 500, "lr_warmup_steps": 4}
    made = make_players(**settings, critic_first=first, max_train_steps=40)
    steps, before = made.updates(0), [parameter.clone() for parameter in made.student.parameters()]
    for _ in range(first + 2):
        next(steps)
    moved = max((new - old).abs().max().item() for new, old in zip(made.student.parameters(), before, strict=True))
    assert 0 < moved < 1.5 * made.options.training.learning_rate / 4


# ----- whole runs -----


@pytest.mark.parametrize("settings", [{}, {"ode_weight": 0.0}, {"num_layers": 2}], ids=str)
def test_a_run_resumes_to_the_same_bits_and_does_not_fit_the_pairs_again(distil, tmp_path, monkeypatch, settings):
    run = {**ONE, **settings}
    whole = distil(tmp_path / "whole", **run)
    fit, starts = players.fit, []

    def stopping(*given, **named):
        starts.append(named.get("start_step"))
        for step in fit(*given, **named):
            if step.step == 3 and len(starts) == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(players, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "run", **run)
    distil(tmp_path / "run", resume_from_checkpoint="latest", **run)
    assert starts == [None, 0, 2]
    ended, resumed = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)
    calls = [json.loads((run / "training.json").read_text())["network_calls"] for run in (whole, tmp_path / "run")]
    # though the pairs were made twice, if they guide the layers; a pool is filled in a call of 4 rows more
    assert calls[0] == pytest.approx(calls[1], abs=4 * (settings.get("num_layers", 1) - 1))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_before_the_first_update_ends_a_run_that_may_start_again(launch, tmp_path, processes):
    """Between the updates by the pairs, of which nothing is saved."""
    statuses, text = launch(tmp_path / "run", kill={"point": "SIGTERM", "step": 2}, processes=processes, **ONE)
    assert statuses == [75] * processes, text
    assert "stopped before the first update, nothing was saved: --resume_from_checkpoint latest starts anew" in text
    assert not any((tmp_path / "run" / name).exists() for name in ("checkpoints", "pipeline"))
    again = launch(tmp_path / "run", processes=processes, resume_from_checkpoint="latest", **ONE)
    assert again[0] == [0] * processes, again[1]


def test_a_run_counts_the_calls_of_its_pairs_and_makes_a_pipeline_of_one_call(distil, tmp_path):
    run = distil(tmp_path / "run", **ONE)
    calls = json.loads((run / "training.json").read_text())["network_calls"]
    # 8 pairs of 2 calls, 3 updates of 4 rows, and 5 of the layers, with 2 of the critic, which share the first answer.
    assert calls == 8 * 2 + 3 * 4 + 5 * 4 * (1 + 1 + 1 + 2)
    pipeline = HSIVIPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.layer_timesteps == [440, 0]
    assert pipeline(2, output_type="np", return_dict=False)[0].shape == (2, 8, 8, 1)


def test_pairs_of_a_class_conditional_teacher_have_classes(distil, class_teacher, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(players, "TeacherPairs", lambda *given: made.append(TeacherPairs(*given)) or made[0])
    distil(tmp_path / "run", **{**ONE, "ode_pairs": 24}, pretrained_teacher_model=class_teacher)
    assert set(made[0].condition.tolist()) == {0, 1, 2}
    assert len(made[0].condition) == 24


def test_a_plan_tells_what_the_pairs_cost(distil, tmp_path, capsys, fresh_accelerator):
    distil(tmp_path / "run", "--plan", **ONE)
    assert "for 8 pairs of 2 calls of the teacher and 3 updates of the layers by them" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
