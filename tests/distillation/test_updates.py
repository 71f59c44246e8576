"""The updates of a run: the fit to pairs, then critic and layers by their objective."""

from functools import partial

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from hsivi_diffusers import HSIVIConfig
from hsivi_diffusers.distillation import updates
from hsivi_diffusers.distillation.updates import check_objective, make_objective, run_updates
from hsivi_diffusers.vi import (
    DivergenceError,
    KullbackLeibler,
    PairChain,
    PairMixingChain,
    PoolChain,
    Regression,
    ScoreMatching,
    WithPairs,
)

ONE = {"preset": "one_call", "num_inference_steps": 1, "num_pairs": 4, "critic_first": 1}


@pytest.fixture
def make_one(make_state, monkeypatch):
    """Makes the TrainingState of a run of one step, which is fitted to pairs in few updates."""

    def make(pair_steps=3, **settings):
        monkeypatch.setattr(updates, "PAIR_STEPS", pair_steps)
        return make_state(**{**ONE, **settings})

    return make


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("objective", "kind", "power"), [("SM", ScoreMatching, 2), ("KL", KullbackLeibler, 1)])
def test_the_weights_are_those_in_score_units(make_state, objective, kind, power):
    made = make_state(objective=objective, scoring="random")
    level = torch.tensor([0, 300, 800])
    variance = 1 - made.bridge.scheduler.alphas_cumprod[level]
    of_config = make_objective(made.config, made.bridge)
    assert type(of_config) is kind
    torch.testing.assert_close(of_config.level_weight(level), variance**power)


@pytest.mark.parametrize(
    ("objective", "settings", "accepted"),
    [
        (None, {}, True),
        (KullbackLeibler(), {}, True),
        (KullbackLeibler(), {"noise_eta": 0.0}, True),
        (ScoreMatching(), {"scoring": "random"}, True),
        (ScoreMatching(), {}, False),
        (ScoreMatching(), {"scoring": "random", "noise_eta": 0.0}, False),
    ],
)
def test_an_objective_of_the_user_is_refused_where_it_would_be_biased(objective, settings, accepted):
    if accepted:
        check_objective(objective, HSIVIConfig(**settings))
        return
    with pytest.raises(ValueError, match=r"objective=ScoreMatching\(...\) takes a gradient through the critic, which"):
        check_objective(objective, HSIVIConfig(**settings))


def test_the_layer_is_fitted_to_the_pairs_first_and_the_optimizer_starts_over(make_one, monkeypatch):
    monkeypatch.setattr(updates, "PAIR_LEARNING_RATE", 5e-3)
    made = make_one(pair_steps=30)
    before, t = copies(made.critic), torch.zeros(20, dtype=torch.long)
    x_next, end, _ = made.sample_pairs(0, t, None)

    def distance():
        with torch.no_grad():
            return (made.layers(x_next, t).mean - end).square().mean()

    at_first = distance()
    updates._regress(made)
    assert distance() < at_first / 2
    assert all(torch.equal(value, before[name]) for name, value in made.critic.state_dict().items())
    assert len(made.layer_optimizer.state) == 0
    assert made.layer_optimizer.param_groups[0]["lr"] == 0  # of the first step of the warm-up
    for average, parameter in zip(made.ema.shadow_params, made.student.parameters(), strict=True):
        assert torch.equal(average, parameter)


@pytest.fixture
def make_two(make_one):
    """The same of two layers and two batches."""
    return partial(make_one, num_inference_steps=2, gradient_accumulation_steps=2)


def test_several_layers_have_pairs_of_the_first(make_two, make_one, monkeypatch):
    fitted, fit = [], updates.fit
    monkeypatch.setattr(updates, "fit", lambda *given, **named: fitted.append(given[3:5]) or fit(*given, **named))
    made = make_two()
    next(run_updates(made, 0))
    assert [[type(chain) for chain in chains] for _, chains in fitted] == [[PairChain] * 2, [PairMixingChain] * 2]
    objective = fitted[1][0]
    assert (type(objective), type(objective.objective)) == (WithPairs, KullbackLeibler)
    assert objective.alone.tolist() == []  # of two steps
    batch = made.chains[0].draw(made.layers, torch.Generator().manual_seed(0))
    assert batch.end[batch.t == 1].isfinite().all()
    assert batch.end[batch.t == 0].isnan().all()
    assert type(make_one(num_pairs=0).chains[0]) is PoolChain


def test_one_and_two_steps_keep_their_objective_beside_the_pairs(make_one, monkeypatch):
    seen, fit = [], updates.fit
    monkeypatch.setattr(updates, "fit", lambda *given, **named: seen.append(given[3]) or fit(*given, **named))
    next(run_updates(make_one(num_inference_steps=[1, 2, 4]), 0))
    next(run_updates(make_one(), 0))
    assert [each.alone.tolist() for each in seen if isinstance(each, WithPairs)] == [[6], []]


@pytest.mark.parametrize(("steps", "fits"), [(1, 1), (2, 1), (4, 0), ([1, 4], 1), ([3, 4], 0)])
def test_layers_are_fitted_before_the_updates_where_pairs_lead_to_images(make_one, monkeypatch, steps, fits):
    seen, fit = [], updates.fit
    monkeypatch.setattr(updates, "fit", lambda *given, **named: seen.append(type(given[3])) or fit(*given, **named))
    made = make_one(num_inference_steps=steps, critic_first=0)
    next(run_updates(made, 0))
    assert seen == [Regression] * fits + [WithPairs]
    assert updates.fit_calls(made)[1] == fits * updates.PAIR_STEPS * made.rows


def test_the_weight_of_the_pairs_falls_as_the_rate_does(make_one, monkeypatch):
    seen, rates, usual = [], [], updates.PAIR_WEIGHT

    class Recorded(WithPairs):
        def layer_loss(self, critic, bridge, draw):
            seen.append(self.weight)
            return super().layer_loss(critic, bridge, draw)

    monkeypatch.setattr(updates, "WithPairs", Recorded)
    made = make_one(critic_first=0, max_train_steps=6, lr_warmup_steps=2, learning_rate=1e-3)
    for _ in run_updates(made, 0):
        rates.append(made.lr_schedulers[0].get_last_lr()[0])
    assert seen == pytest.approx([0.0, *(usual * rate / 1e-3 for rate in rates[:-1])])
    assert max(seen) == pytest.approx(usual)
    assert seen[-1] < 0.2 * usual


def test_the_critic_learns_alone_before_the_layer_moves(make_one):
    made = make_one(critic_first=2, max_train_steps=4)
    steps = run_updates(made, 0)
    next(steps)
    layers, critic = copies(made.layers), copies(made.critic)
    next(steps)
    assert all(torch.equal(value, layers[name]) for name, value in made.layers.state_dict().items())
    assert not all(torch.equal(value, critic[name]) for name, value in made.critic.state_dict().items())
    next(steps)  # of the warm-up, at a rate of 0
    next(steps)
    assert not all(torch.equal(value, layers[name]) for name, value in made.layers.state_dict().items())


def test_the_first_updates_of_the_layer_are_no_larger_for_the_critic_that_learned_alone(make_one):
    """Adam, without a first moment, moves a weight by the rate, of which the second update has a quarter."""
    made = make_one(num_pairs=0, lr_warmup_steps=4, critic_first=3, max_train_steps=40)
    steps, before = run_updates(made, 0), [parameter.clone() for parameter in made.student.parameters()]
    for _ in range(5):
        next(steps)
    moved = max((new - old).abs().max().item() for new, old in zip(made.student.parameters(), before, strict=True))
    assert 0 < moved < 1.5 * made.config.learning_rate / 4


def test_gradients_that_always_overflow_end_the_run(make_state, monkeypatch):
    """As under fp16, where a step with an overflow is skipped."""
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: True))
    monkeypatch.setattr(updates, "MAX_OVERFLOWS", 4)
    made, steps = make_state(), []
    with pytest.raises(DivergenceError, match="the gradient is not finite at step 3"):
        steps.extend(step.step for step in run_updates(made, 0))
    assert made.lr_schedulers[0].last_epoch == 0


def test_a_fit_to_pairs_that_diverges_says_so(make_one, monkeypatch):
    monkeypatch.setattr(updates, "PAIR_LEARNING_RATE", float("inf"))
    with pytest.raises(DivergenceError, match="the loss of the fit to the pairs is not finite"):
        next(run_updates(make_one(), 0))
