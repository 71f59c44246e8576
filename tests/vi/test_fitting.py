import copy
from contextlib import contextmanager

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


# ----- shards -----


class SeenThrough(KullbackLeibler):
    """The same loss, for which the critic is asked apart."""

    critic_gradient = True


class Counting(torch.nn.Module):
    """Counts the calls of a critic."""

    def __init__(self, critic):
        super().__init__()
        self.critic, self.calls = critic, 0

    def forward(self, *given):
        self.calls += 1
        return self.critic(*given)


def shards_of(game, number, source="pool", size=64):
    game.chain = [make_chain(source, game.bridge.sample_base, 3, size) for _ in range(number)]
    return game


def trained(game):
    return [*game.layers.parameters(), *game.critic.parameters()]


def gradients(game, objective, **options):
    """What the optimizers are given in one step: of the layers, and of the critic in its last update."""
    seen = []

    def keep(parameters):
        seen.append([parameter.grad.clone() for parameter in parameters])
        return torch.zeros(())

    next(game.fit(objective, 1, clip_grad_norm=keep, **options))
    return seen[0] + seen[-1]


@pytest.mark.parametrize("objective", [KullbackLeibler(), ScoreMatching()])
@pytest.mark.parametrize("source", ["pool", "simulate"])
def test_an_update_is_the_mean_over_the_shards(objective, source):
    bridge = target()
    together = gradients(shards_of(Game(bridge), 3, source), objective)
    alone = [gradients(Game(bridge, source), objective, rank=rank) for rank in range(3)]
    for got, *each in zip(together, *alone, strict=True):
        torch.testing.assert_close(got, torch.stack(each).mean(0))


def test_shards_of_two_ranks_are_those_of_one():
    bridge = target()
    whole = gradients(shards_of(Game(bridge), 4), KullbackLeibler())
    halves = [gradients(shards_of(Game(bridge), 2), KullbackLeibler(), rank=rank) for rank in (0, 1)]
    for got, one, other in zip(whole, *halves, strict=True):
        torch.testing.assert_close(got, (one + other) / 2)


def test_a_step_tells_the_rows_of_all_shards_in_order():
    game = shards_of(Game(target()), 2)
    step = next(game.fit(ScoreMatching(), 1))
    rows = [next(Game(target()).fit(ScoreMatching(), 1, rank=rank)) for rank in (0, 1)]
    for name in ("t", "loss"):
        for player in ("layers", "critic"):
            each = [getattr(getattr(row, player), name) for row in rows]
            assert getattr(getattr(step, player), name).equal(torch.cat(each))


@pytest.mark.parametrize(
    ("objective", "shards", "calls"),
    [(KullbackLeibler(), 1, 1), (SeenThrough(), 1, 2), (ScoreMatching(), 1, 2), (KullbackLeibler(), 2, 4)],
)
def test_one_shard_shares_the_critics_answer_where_no_gradient_passes_through_it(objective, shards, calls):
    game = shards_of(Game(target()), shards)
    game.critic = Counting(game.critic)
    list(game.fit(objective, 3))
    assert game.critic.calls == 3 * calls


@pytest.mark.parametrize("critic_updates", [1, 3])
def test_sharing_the_answer_changes_no_bit(critic_updates):
    shared, apart = Game(target()), Game(target())
    steps = [
        list(game.fit(objective, 6, critic_updates=critic_updates))
        for game, objective in ((shared, KullbackLeibler()), (apart, SeenThrough()))
    ]
    for got, wanted in zip(trained(shared), trained(apart), strict=True):
        assert got.equal(wanted)
    for got, wanted in zip(*steps, strict=True):
        assert got.layers.loss.equal(wanted.layers.loss)
        assert got.critic.loss.equal(wanted.critic.loss)


def test_gradients_stay_in_the_process_for_all_shards_but_the_last():
    game, events = shards_of(Game(target()), 3), []

    @contextmanager
    def no_sync(module):
        events.append("layers" if module is game.layers else "critic")
        yield
        events.append("end")

    def backward(loss):
        events.append("backward")
        loss.backward()

    next(game.fit(KullbackLeibler(), 1, critic_updates=2, no_sync=no_sync, backward=backward))
    update = [*["player", "backward", "end"] * 2, "backward"]
    players = ["layers", "critic", "critic"]
    assert events == [player if event == "player" else event for player in players for event in update]


def test_the_norm_is_taken_once_an_update_and_told():
    game, seen = shards_of(Game(target()), 2), []

    def clip_grad_norm(parameters):
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        seen.append(norm)
        return norm

    step = next(game.fit(KullbackLeibler(), 1, critic_updates=3, clip_grad_norm=clip_grad_norm))
    assert len(seen) == 1 + 3
    assert (step.layers.grad_norm, step.critic.grad_norm) == (seen[0], seen[-1])
    assert seen[0] > 0.1


def test_a_list_without_chains_is_refused():
    game = shards_of(Game(target()), 0)
    with pytest.raises(ValueError, match=r"chain=\[\]: give a chain, or one for each shard"):
        next(game.fit(KullbackLeibler(), 1))


@pytest.mark.parametrize("objective", [KullbackLeibler(), ScoreMatching()])
def test_a_frozen_parameter_of_the_critic_stays_frozen(objective):
    game = Game(target())
    game.critic.slope.requires_grad_(False)
    before = game.critic.slope.clone()
    list(game.fit(objective, 3))
    assert game.critic.slope.equal(before)
    assert not game.critic.slope.requires_grad
    assert game.critic.intercept.requires_grad


@pytest.mark.parametrize("objective", [KullbackLeibler(), ScoreMatching()])
def test_the_layers_loss_leaves_no_gradient_to_the_critic(objective):
    game, seen = shards_of(Game(target()), 2), []

    def backward(loss):
        loss.backward()
        seen.append(game.critic.slope.grad)

    next(game.fit(objective, 1, backward=backward))
    assert seen[:2] == [None, None]
    assert seen[2] is not None
