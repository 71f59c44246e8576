import copy

import pytest
import torch

from hsivi_diffusers.vi import DivergenceError, KullbackLeibler, ScoreMatching, fit, joint, make_chain
from hsivi_diffusers.vi.fitting import step_generator
from scenarios import GaussianBridge, LinearCritic, linear_layers, matching_bridge


class Game:
    """Layers, critic, optimizers and a pool, to be fitted to a bridge."""

    def __init__(self, bridge, source="pool", size=64, lr=0.01):
        self.bridge, self.layers, self.critic = bridge, linear_layers(), LinearCritic(3)
        self.chain = make_chain(source, bridge.sample_base, 3, size)
        self.layer_optimizer = torch.optim.Adam(self.layers.parameters(), lr=lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=5 * lr)

    def fit(self, objective, steps, **options):
        return fit(
            self.layers,
            self.critic,
            self.bridge,
            objective,
            self.chain,
            options.pop("curriculum", joint(3, steps)),
            layer_optimizer=self.layer_optimizer,
            critic_optimizer=self.critic_optimizer,
            **options,
        )


def target():
    """Marginals of other linear layers with the same std, so that a perfect fit exists."""
    layers = linear_layers()
    with torch.no_grad():
        layers.scale += torch.tensor([0.2, 0.4, -0.3])
        layers.shift += torch.tensor([-0.4, 0.3, 0.5])
    return matching_bridge(layers)


@pytest.mark.parametrize("objective", [ScoreMatching(), ScoreMatching(alpha=1.0), KullbackLeibler()])
@pytest.mark.parametrize("source", ["pool", "simulate"])
def test_layers_reach_the_bridge(objective, source):
    game = Game(target(), source)
    for _ in game.fit(objective, 900, critic_updates=2):
        for optimizer in (game.layer_optimizer, game.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= 0.996
    mean, variance = (moment[:-1] for moment in game.layers.marginals())
    torch.testing.assert_close(mean, game.bridge.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(variance, game.bridge.variance, rtol=0.12, atol=0)


def test_a_step_tells_what_was_trained():
    game = Game(target())
    steps = list(game.fit(ScoreMatching(), 3))
    assert [step.step for step in steps] == [0, 1, 2]
    for step in steps:
        for update in (step.layers, step.critic):
            assert update.t.shape == update.loss.shape == (64,)
            assert not update.loss.requires_grad
            assert update.grad_norm is None


def test_one_call_of_the_layers_for_each_critic_update_and_none_for_simulation():
    game = Game(target())
    steps = game.fit(KullbackLeibler(), 5, critic_updates=3)
    next(steps)
    first = game.layers.calls
    list(steps)
    assert game.layers.calls - first == 4 * 3


def test_a_resumed_run_repeats_one_that_was_never_stopped():
    whole, halves = Game(target()), Game(target())
    list(whole.fit(KullbackLeibler(), 10, seed=3))
    list(halves.fit(KullbackLeibler(), 10, seed=3, curriculum=joint(3, 4)))
    resumed = Game(target())
    for name in ("layers", "critic", "layer_optimizer", "critic_optimizer", "chain"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(halves, name).state_dict()))
    list(resumed.fit(KullbackLeibler(), 10, seed=3, start_step=4))
    for got, wanted in zip(resumed.layers.parameters(), whole.layers.parameters(), strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(resumed.critic.parameters(), whole.critic.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_seed_rank_and_step_each_change_the_draws():
    draws = {
        float(torch.rand(1, generator=step_generator(*key))) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(draws) == 4
    assert torch.rand(1, generator=step_generator(5, 6, 7)) == torch.rand(1, generator=step_generator(5, 6, 7))


def test_beta_zero_leaves_a_layer_alone():
    game = Game(target())
    before = game.layers.shift.detach().clone()
    list(game.fit(KullbackLeibler(), 5, curriculum=joint(3, 5, beta=[1, 0, 1])))
    assert game.layers.shift[1] == before[1]
    assert game.layers.shift[0] != before[0]


def test_the_callers_backward_is_used_for_both_players():
    game, seen = Game(target()), []

    def backward(loss):
        seen.append(loss.item())
        loss.backward()

    list(game.fit(ScoreMatching(), 2, critic_updates=2, backward=backward))
    assert len(seen) == 2 * (1 + 2)


def test_nan_stops_before_it_touches_a_parameter():
    bridge = target()
    game = Game(bridge)
    for step in (steps := game.fit(ScoreMatching(), 10)):
        if step.step == 3:
            before = copy.deepcopy(game.layers.state_dict())
            game.bridge.mean[1] = float("nan")
            with pytest.raises(DivergenceError, match="layers is not finite at step 4.*lower learning rate") as info:
                next(steps)
            break
    assert info.value.step == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in game.layers.state_dict().items())
    assert all(parameter.requires_grad for parameter in game.critic.parameters())


def test_the_critic_needs_an_update():
    with pytest.raises(ValueError, match="critic_updates=0"):
        next(Game(GaussianBridge([0.0] * 3, [1.0] * 3)).fit(ScoreMatching(), 1, critic_updates=0))
