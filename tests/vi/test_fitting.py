import copy
from contextlib import contextmanager

import pytest
import torch

from hsivi_diffusers.vi.curricula import joint, sequential
from hsivi_diffusers.vi.distributions import DiagonalGaussian
from hsivi_diffusers.vi.fitting import DivergenceError, fit, step_generator
from hsivi_diffusers.vi.lower_bound import LowerBound
from hsivi_diffusers.vi.objectives import KullbackLeibler, ScoreMatching
from hsivi_diffusers.vi.pools import CohortChain, FrozenPoolChain, make_chain
from hsivi_diffusers.vi.regression import PairChain, PairMixingChain, Regression, WithPairs
from scenarios import (
    DIMENSION,
    GaussianBridge,
    LinearCritic,
    LinearLayers,
    independent_layers,
    linear_layers,
    marginals_of,
    matching_bridge,
)


class Game:
    """Layers, critic, optimizers and a pool, to be fitted to a bridge."""

    def __init__(self, bridge, source="pool", size=64, lr=0.01):
        self.bridge, self.layers, self.critic = bridge, linear_layers(), LinearCritic(3)
        self.chain = make_chain(source, bridge.sample_base, 3, size)
        self.layer_optimizer = torch.optim.Adam(self.layers.parameters(), lr=lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=5 * lr)

    def fit(self, objective, steps, **options):
        game = self.layers, self.critic, self.bridge, objective, self.chain, options.pop("curriculum", joint(3, steps))
        return fit(*game, layer_optimizer=self.layer_optimizer, critic_optimizer=self.critic_optimizer, **options)


def target():
    """Marginals of other linear layers with the same std, so that a perfect fit exists."""
    layers = linear_layers()
    with torch.no_grad():
        layers.scale += torch.tensor([0.2, 0.4, -0.3])
        layers.shift += torch.tensor([-0.4, 0.3, 0.5])
    return matching_bridge(layers)


@pytest.mark.parametrize(
    ("objective", "source"),
    [(ScoreMatching(), "pool"), pytest.param(KullbackLeibler(), "simulate", marks=pytest.mark.slow)],
)
def test_layers_reach_the_bridge(objective, source):
    game = Game(target(), source, lr=0.025)
    for _ in game.fit(objective, 300, critic_updates=2):
        for optimizer in (game.layer_optimizer, game.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= 0.988
    mean, variance = (moment[:-1] for moment in game.layers.marginals())
    torch.testing.assert_close(mean, game.bridge.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(variance, game.bridge.variance, rtol=0.12, atol=0)


def test_one_call_of_the_layers_for_each_critic_update_and_none_for_simulation():
    game = Game(target())
    steps = game.fit(KullbackLeibler(), 5, critic_updates=3)
    next(steps)
    first = game.layers.calls
    list(steps)
    assert game.layers.calls - first == 4 * 3


def test_seed_rank_and_step_each_change_the_draws():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1)]
    assert len({float(torch.rand(1, generator=step_generator(*key))) for key in keys}) == 4


def test_nan_stops_before_it_touches_a_parameter():
    bridge = target()
    game = Game(bridge)
    for step in (steps := game.fit(ScoreMatching(), 10)):
        if step.step == 3:
            before = copy.deepcopy(game.layers.state_dict())
            game.bridge.mean[1] = float("nan")
            with pytest.raises(DivergenceError, match="layers is not finite at step 4.*more critic updates") as info:
                next(steps)
            break
    assert info.value.step == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in game.layers.state_dict().items())
    assert all(parameter.requires_grad for parameter in game.critic.parameters())


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


def shards_of(game, number, source="pool"):
    game.chain = [make_chain(source, game.bridge.sample_base, 3, 64) for _ in range(number)]
    return game


def gradients(game, objective, **options):
    """What the optimizers are given in one step: of the layers, and of the critic in its last update."""
    seen = []

    def keep(parameters):
        seen.append([parameter.grad.clone() for parameter in parameters])
        return torch.zeros(())

    next(game.fit(objective, 1, clip_grad_norm=keep, **options))
    return seen[0] + seen[-1]


@pytest.mark.parametrize("objective", [KullbackLeibler(), ScoreMatching()])
@pytest.mark.parametrize(("source", "shards"), [("pool", 2), ("simulate", 1)])
def test_an_update_is_the_mean_over_the_shards_of_all_ranks(objective, source, shards):
    bridge = target()
    together = gradients(shards_of(Game(bridge), 3 * shards, source), objective)
    ranks = [gradients(shards_of(Game(bridge), shards, source), objective, rank=rank) for rank in range(3)]
    for got, *each in zip(together, *ranks, strict=True):
        torch.testing.assert_close(got, torch.stack(each).mean(0))


@pytest.mark.parametrize(
    ("objective", "shards", "calls"),
    [(KullbackLeibler(), 1, 1), (SeenThrough(), 1, 2), (ScoreMatching(), 1, 2), (KullbackLeibler(), 2, 4)],
)
def test_one_shard_shares_the_critics_answer_where_no_gradient_passes_through_it(objective, shards, calls):
    game = shards_of(Game(target()), shards)
    game.critic = Counting(game.critic)
    list(game.fit(objective, 3))
    assert game.critic.calls == 3 * calls


def test_sharing_the_answer_changes_no_bit():
    seen = []
    for objective in (KullbackLeibler(), SeenThrough()):
        game = Game(target())
        steps = list(game.fit(objective, 6, critic_updates=3))
        losses = [player.loss for step in steps for player in (step.layers, step.critic)]
        seen.append([*losses, *game.layers.parameters(), *game.critic.parameters()])
    assert all(shared.equal(apart) for shared, apart in zip(*seen, strict=True))


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
    wanted = [player if event == "player" else event for player in ("layers", "critic", "critic") for event in update]
    assert events == wanted


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


def test_the_norm_of_layers_that_wait_for_the_critic_is_not_taken():
    """Under fp16 it would take the loss scale from the gradients of both players, and that of the critic again."""
    game, seen = Game(target()), []

    def clip_grad_norm(parameters):
        seen.append(next(iter(parameters)))
        return torch.zeros(())

    steps = game.fit(KullbackLeibler(), 2, curriculum=joint(3, 2, critic_first=1), clip_grad_norm=clip_grad_norm)
    first, _ = next(steps), next(steps)
    critic, layers = (next(iter(module.parameters())) for module in (game.critic, game.layers))
    assert [each is critic for each in seen] == [True, False, True]
    assert seen[1] is layers
    assert first.layers.grad_norm is None


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


# ----- without a critic, and layer by layer -----


class Alone:
    """Independent layers to be fitted without a critic; their bridge has a perfect fit."""

    def __init__(self, chain=FrozenPoolChain, size=64, lr=0.02, num_states=60_000):
        self.layers = independent_layers()
        best = LinearLayers(scale=[1.0, 0.9, -1.0], shift=[-0.1, -0.2, 1.5], std=[0.9, 0.9, 0.9])
        self.bridge = matching_bridge(best)
        self.chain = chain(self.bridge.sample_base, 3, size)
        self.chain.num_states = num_states
        self.optimizer = torch.optim.Adam(self.layers.parameters(), lr=lr)

    def fit(self, curriculum, **options):
        critic, objective = options.pop("critic", None), options.pop("objective", LowerBound())
        game = self.layers, critic, self.bridge, objective, self.chain, curriculum
        return fit(*game, layer_optimizer=self.optimizer, **options)


@pytest.mark.parametrize(
    ("chain", "curriculum"),
    [(FrozenPoolChain, sequential(3, 100)), pytest.param(CohortChain, joint(3, 450), marks=pytest.mark.slow)],
)
def test_the_lower_bound_brings_layers_to_the_bridge_without_a_critic(chain, curriculum):
    game = Alone(chain, 128, num_states=5000)
    length = curriculum[0].num_steps
    for step in game.fit(curriculum):
        for group in game.optimizer.param_groups:
            group["lr"] = 0.03 * (1.02 - (step.next_step % length) / length)
    mean, variance = (moment[:-1] for moment in marginals_of(game.layers))
    torch.testing.assert_close(mean.detach(), game.bridge.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(variance.detach(), game.bridge.variance, rtol=0.12, atol=0)


def test_a_step_without_a_critic_has_no_rows_of_one():
    for step in Alone().fit(sequential(3, 1)):
        assert step.layers.t.tolist() == [2 - step.step] * 64
        assert step.layers.loss.shape == (64,)
        assert step.critic.t.shape == step.critic.loss.shape == (0,)
        assert step.critic.grad_norm is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": KullbackLeibler()}, "KullbackLeibler needs a critic and a critic_optimizer; LowerBound and"),
        ({"objective": ScoreMatching(), "critic": LinearCritic(3)}, "ScoreMatching needs a critic and a critic_opt"),
        ({"critic_updates": 0}, "critic_updates=0: the critic needs at least 1 update"),
    ],
)
def test_a_fit_without_what_its_objective_needs_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        next(Alone().fit(sequential(3, 1), **options))


@pytest.mark.parametrize("objective", [LowerBound(), KullbackLeibler()])
def test_layer_by_layer_moves_the_one_that_learns_and_no_bit_of_the_others(objective):
    game, critic = Alone(), LinearCritic(3)
    options = {"critic": critic, "critic_optimizer": torch.optim.Adam(critic.parameters())}
    before = copy.deepcopy(game.layers.state_dict())
    for step in game.fit(sequential(3, 4), objective=objective, **options):
        learning = 2 - step.step // 4
        for name, tensor in game.layers.state_dict().items():
            if f"networks.{learning}." in name:
                assert not tensor.equal(before[name])
            else:
                assert tensor.equal(before[name])
        before = copy.deepcopy(game.layers.state_dict())


def test_a_stage_ends_where_the_caller_says_and_numbers_stay():
    asked = []

    def stop_stage(step):
        asked.append(step.step)
        return step.step in (4, 12, 25)

    steps = list(Alone().fit(sequential(3, 10), stop_stage=stop_stage))
    assert [step.step for step in steps] == [0, 1, 2, 3, 4, 10, 11, 12, 20, 21, 22, 23, 24, 25]
    assert [step.next_step for step in steps] == [1, 2, 3, 4, 10, 11, 12, 20, 21, 22, 23, 24, 25, 30]
    assert asked == [step.step for step in steps]
    assert [int(step.layers.t[0]) for step in steps] == [2] * 5 + [1] * 3 + [0] * 6


@pytest.mark.parametrize("left_at", [3, 4, 11, 12])
def test_a_run_resumed_after_a_stopped_stage_repeats_one_that_went_on(left_at):
    def stop_stage(step):
        return step.step in (4, 12)

    whole, begun = Alone(num_states=100), Alone(num_states=100)
    list(whole.fit(sequential(3, 10), stop_stage=stop_stage))
    for step in begun.fit(sequential(3, 10), stop_stage=stop_stage):
        if step.step == left_at:
            break
    resumed = Alone(num_states=100)
    for name in ("layers", "optimizer", "chain"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(begun, name).state_dict()))
    list(resumed.fit(sequential(3, 10), stop_stage=stop_stage, start_step=step.next_step))
    assert all(
        one.equal(other) for one, other in zip(resumed.layers.parameters(), whole.layers.parameters(), strict=True)
    )


def test_pairs_of_a_linear_map_are_fitted_exactly_without_a_critic():
    def sample_pairs(t, generator):
        x = torch.randn(len(t), 3, generator=generator, dtype=torch.float64)
        return x, 0.7 * x - 0.2, None

    layers = LinearLayers([0.1], [0.3], [0.5])
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.05)
    bridge, chain = GaussianBridge([0.0], [1.0]), PairChain(sample_pairs, 1, 32)
    *_, last = fit(layers, None, bridge, Regression(), chain, joint(1, 300), layer_optimizer=optimizer)
    assert layers.scale.item() == pytest.approx(0.7, abs=1e-6)
    assert layers.shift.item() == pytest.approx(-0.2, abs=1e-6)
    assert last.critic.loss.shape == (0,)


@pytest.mark.parametrize(("alone", "critic_rows"), [([], {0, 1, 2}), ([2], {0, 1})])
def test_layers_with_pairs_alone_have_no_critic(alone, critic_rows):
    def sample_pairs(t, generator):
        x = torch.randn(len(t), DIMENSION, generator=generator, dtype=torch.float64)
        return x, 0.7 * x - 0.2, None

    game = Game(target())
    game.chain = PairMixingChain(game.chain, sample_pairs)
    for step in game.fit(WithPairs(KullbackLeibler(), 0.1, alone=alone), 4, critic_updates=2):
        assert set(step.layers.t.tolist()) == {0, 1, 2}
        assert set(step.critic.t.tolist()) == critic_rows
        assert step.critic.loss.shape == step.critic.t.shape


def test_where_the_critic_learns_alone_the_layers_stay_as_they_are_to_the_bit():
    game = Game(target())
    layers, critic = (copy.deepcopy(module.state_dict()) for module in (game.layers, game.critic))
    for step in game.fit(KullbackLeibler(), 0, curriculum=joint(3, 6, critic_first=4)):
        assert not any(critic[name].equal(value) for name, value in game.critic.state_dict().items())
        assert {layers[name].equal(value) for name, value in game.layers.state_dict().items()} == {step.step < 4}


class RootCritic(LinearCritic):
    """Finite, with a gradient that is not: that of sqrt at 0."""

    def forward(self, x, level, condition=None, t=None):
        return super().forward(x, level) + (0 * self.slope.sum()).sqrt()


@pytest.mark.parametrize("clip", [None, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 1.0)])
@pytest.mark.parametrize("player", ["critic", "layers"])
def test_a_gradient_that_is_not_finite_moves_no_parameter(player, clip):
    game = Game(target())
    if player == "critic":
        game.critic = RootCritic(3)
        game.critic_optimizer = torch.optim.Adam(game.critic.parameters())
    else:
        game.layers.register_parameter("root", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
        game.layers.register_forward_hook(lambda layer, _, q: DiagonalGaussian(q.mean + layer.root.abs().sqrt(), q.std))
        game.layer_optimizer = torch.optim.Adam(game.layers.parameters())
    before = [each.detach().clone() for each in getattr(game, player).parameters()]
    with pytest.raises(DivergenceError, match=f"the gradient of the {player} is not finite at step 0"):
        next(game.fit(KullbackLeibler(), 1, clip_grad_norm=clip))
    assert all(one.equal(other) for one, other in zip(before, getattr(game, player).parameters(), strict=True))


def test_an_optimizer_that_skips_overflows_decides_for_itself():
    game = Game(target())
    game.critic = RootCritic(3)
    game.critic_optimizer = torch.optim.SGD(game.critic.parameters(), lr=0.0)
    assert next(game.fit(KullbackLeibler(), 1, skips_overflows=True)).step == 0
