import copy
import io
import re
import sys

import pytest
import torch
from torch.distributions import constraints

from hsivi_diffusers.vi import inference as inference_module
from hsivi_diffusers.vi.bridges import Bridge, DiffusionBridge, GeometricBridge
from hsivi_diffusers.vi.curricula import Plateau
from hsivi_diffusers.vi.distributions import DiagonalGaussian
from hsivi_diffusers.vi.importance import effective_sample_size, pareto_k
from hsivi_diffusers.vi.inference import Inference
from hsivi_diffusers.vi.layers import ConditionalLayers, IndependentLayers, SharedLayers
from hsivi_diffusers.vi.lower_bound import LowerBound
from hsivi_diffusers.vi.networks import GaussianMLP, ScoreMLP
from hsivi_diffusers.vi.objectives import KullbackLeibler
from hsivi_diffusers.vi.parameters import NamedTarget
from hsivi_diffusers.vi.targets import LogProbTarget, ScoreTarget
from slow import others_slow
from training.benchmarks.inference.targets.plane import GaussianMixture

MEAN = torch.tensor([1.0, -0.5])
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
OBJECTIVES = ("LB", "SM", "KL")
TRAININGS = ("sequential", "joint")

each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
each_training = pytest.mark.parametrize("training", TRAININGS)


def gaussian():
    return GaussianMixture(MEAN[None], COVARIANCE[None])


def gaussian_score(x):
    return (MEAN - x) @ torch.linalg.inv(COVARIANCE)


def tiny(objective="LB", training="sequential", of=None, **options):
    """A fit of six steps."""
    options = {"num_steps": 6, "batch_size": 16, "width": 8, "depth": 1, **options}
    return Inference(of or GeometricBridge(gaussian(), 2), objective, training, **options)


def parameters(inference):
    modules = filter(None, (inference.layers, inference.critic))
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def equal(one, other):
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def run_to(inference, step):
    """Leaves the loop after the step of that number."""
    for done in inference.steps():
        if done.step == step:
            return inference
    raise AssertionError("the run was over before")


# ----- it fits -----


@each_objective
@each_training
@pytest.mark.parametrize("kind", [GeometricBridge, DiffusionBridge])
def test_every_objective_runs_in_every_order_on_every_bridge(objective, training, kind):
    inference = tiny(objective, training, kind(gaussian(), 3), critic_updates=2)
    before = parameters(inference)
    steps = list(inference.steps())
    assert [step.step for step in steps] == list(range(6))
    assert inference.next_step == 6
    assert all(bool(step.layers.loss.isfinite().all()) for step in steps)
    assert all(step.layers.grad_norm > 0 for step in steps)
    assert not any(a.equal(b) for a, b in zip(before[-2:], parameters(inference)[-2:], strict=True))
    assert (inference.critic is None) == (objective == "LB")
    x = inference.sample(100)
    assert x.shape == (100, 2)
    assert bool(x.isfinite().all())
    assert list(inference.steps()) == []


@pytest.mark.parametrize(
    ("bridge", "objective", "training", "steps"),
    [
        pytest.param(GeometricBridge(gaussian(), 2), "SM", "joint", 500, marks=pytest.mark.slow),
        (DiffusionBridge(gaussian(), 2), "KL", "joint", 400),
        pytest.param(
            *(GeometricBridge(ScoreTarget(gaussian_score, 2), 2), LowerBound(surrogate=True), "sequential", 300),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_moments_of_a_gaussian_are_found(bridge, objective, training, steps):
    inference = Inference(bridge, objective, training, num_steps=steps, batch_size=128, width=16, depth=2)
    inference.run()
    x = inference.sample(20_000)
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.12)
    torch.testing.assert_close(torch.cov(x.T), COVARIANCE, rtol=0, atol=0.15)


# ----- the order of training -----


@each_objective
def test_with_one_layer_both_orders_are_one_bit_for_bit(objective):
    layers, bridge = IndependentLayers([GaussianMLP(2, width=8)]), GeometricBridge(gaussian(), 1)
    fits = [
        tiny(objective, training, bridge, layers=copy.deepcopy(layers), num_steps=10, critic_updates=2)
        for training in TRAININGS
    ]
    losses = [[step.layers.loss for step in fit.steps()] for fit in fits]
    assert equal(*losses)
    assert equal(*map(parameters, fits))
    assert not equal(parameters(fits[0])[:1], [next(layers.parameters())])


@pytest.mark.parametrize(("training", "length"), [("sequential", 10), ("joint", 20)])
def test_the_rate_falls_to_a_twentieth_in_each_stage(training, length):
    inference = tiny(training=training, num_steps=20, learning_rate=0.01)
    rates = []
    original = inference.layer_optimizer.step
    group = inference.layer_optimizer.param_groups[0]
    inference.layer_optimizer.step = lambda: (rates.append(group["lr"]), original())
    inference.run()
    for stage in range(20 // length):
        of = rates[stage * length : (stage + 1) * length]
        assert of[0] == 0.01
        assert of == sorted(of, reverse=True)
        assert of[length // 2] == pytest.approx(0.00525)
        assert 0.0005 < of[-1] < 0.001


def test_the_gradients_of_both_players_are_clipped(monkeypatch):
    monkeypatch.setattr(inference_module, "MAX_GRAD_NORM", 1e-3)
    inference = tiny("KL")
    seen = []
    players = [(inference.layers, inference.layer_optimizer), (inference.critic, inference.critic_optimizer)]
    for player, optimizer in players:

        def step(player=player, original=optimizer.step):
            gradients = [parameter.grad.flatten() for parameter in player.parameters() if parameter.grad is not None]
            seen.append(float(torch.cat(gradients).norm()))
            original()

        optimizer.step = step
    for done in inference.steps():
        assert min(done.layers.grad_norm, done.critic.grad_norm) > 1e-2
    assert seen == pytest.approx([1e-3] * 12, rel=0.01)


# ----- seeds and resuming -----


@each_objective
@each_training
def test_one_seed_is_one_fit_and_leaves_the_global_random_state_alone(objective, training):
    fits = []
    for seed, of_torch in ((3, 0), (3, 99), (4, 0)):
        torch.manual_seed(of_torch)
        state = torch.get_rng_state()
        fits.append(tiny(objective, training, seed=seed))
        fits[-1].run()
        fits[-1].sample(5)
        assert torch.equal(torch.get_rng_state(), state)
    assert equal(parameters(fits[0]), parameters(fits[1]))
    assert not equal(parameters(fits[0]), parameters(fits[2]))


@each_objective
@pytest.mark.parametrize(
    ("training", "stop"),
    others_slow(
        [("sequential", 0), ("sequential", 2), ("sequential", 4), ("joint", 2)], ("sequential", 2), ("joint", 2)
    ),
)
def test_a_resumed_fit_repeats_one_that_was_never_stopped(objective, training, stop, tmp_path):
    """Its loop may be left and gone on with, and its state taken from a file or from memory, where it stays."""
    whole, begun, *fresh = (tiny(objective, training, plateau=short_plateau(window=2, patience=9)) for _ in range(4))
    whole.run()
    state = run_to(begun, stop).state_dict()
    torch.save(state, tmp_path / "state.pt")
    begun.run()
    assert equal(parameters(begun), parameters(whole))
    for resumed, of in zip((*fresh, begun), (torch.load(tmp_path / "state.pt"), state, state), strict=True):
        resumed.load_state_dict(of)
        assert resumed.next_step == stop + 1
        resumed.run()
        assert equal(parameters(resumed), parameters(whole))
        assert torch.equal(resumed.sample(10), whole.sample(10))


# ----- draws -----


def test_draws_of_all_layers_are_from_one_chain():
    inference = tiny(of=GeometricBridge(gaussian(), 3))
    draws = inference.marginals(7, seed=2)
    assert [x.shape for x in draws] == [(7, 2)] * 4
    assert torch.equal(draws[0], inference.sample(7, seed=2))
    assert torch.equal(draws[3], inference.bridge.sample_base(7, torch.Generator().manual_seed(2)))
    assert not torch.equal(draws[0], inference.sample(7, seed=3))
    assert not any(x.requires_grad for x in draws)


# ----- what else a fit tells -----


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_run_shows_its_progress_from_where_it_was_left(progress, monkeypatch):
    monkeypatch.setattr(sys, "stderr", written := Terminal())
    inference = run_to(tiny(training="sequential"), 3)
    assert written.getvalue() == ""
    inference.run(progress)
    assert inference.next_step == 6
    assert ("4/6 " in written.getvalue(), "6/6 " in written.getvalue()) == (progress, progress)


def test_the_density_of_a_fit_is_estimated_from_other_inputs_than_those_of_its_draws():
    layers = IndependentLayers([GaussianMLP(2, width=8, initial_std=0.5)])
    inference = tiny(of=GeometricBridge(gaussian(), 1), layers=layers)
    torch.nn.init.zeros_(layers.networks[0].network.last.weight)
    x = inference.sample(300, seed=1)
    exact = torch.distributions.Normal(0.0, 1.25**0.5).log_prob(x).sum(1)  # x_1 + 0.5 noise
    torch.testing.assert_close(inference.log_prob(x, 20_000, seed=1), exact, rtol=0, atol=0.3)
    assert torch.equal(inference.log_prob(x, 300, seed=1), inference.log_prob(x, 300, seed=1))
    gaps = torch.stack([inference.log_prob(x, 300, seed=seed) - exact for seed in range(20)]).mean(1)
    assert float(gaps.max()) < 0  # a lower bound, also with the seed and the number of the draws


def named():
    def log_prob(of):
        return -0.5 * of["theta"].square().sum(1) - of["tau"]

    return NamedTarget(log_prob, {"theta": (constraints.real, (3,)), "tau": constraints.positive})


def test_draws_of_named_parameters_become_a_dataset_with_the_state_of_the_weights():
    pytest.importorskip("arviz")
    target = named()
    inference = tiny(of=GeometricBridge(target, 2))
    x, data = inference.sample(40, seed=3), inference.to_arviz(40, seed=3)
    for name, value in target.constrain(x).items():
        assert torch.equal(torch.tensor(data.posterior[name].values[0]), value)
    statistics = {name: torch.tensor(value.values[0]) for name, value in data.sample_stats.items()}
    assert statistics.keys() == {"lp", "log_q"}
    torch.testing.assert_close(statistics["lp"], target.log_prob(x))
    assert torch.equal(statistics["log_q"], inference.log_prob(x, seed=3))
    weights = statistics["lp"] - statistics["log_q"]
    assert data.sample_stats.attrs["pareto_k"] == pytest.approx(pareto_k(weights))
    assert data.sample_stats.attrs["importance_ess"] == pytest.approx(effective_sample_size(weights))


def test_variables_may_be_of_the_users_own_and_a_score_alone_gives_no_statistics():
    pytest.importorskip("arviz")
    inference = tiny("KL", of=GeometricBridge(ScoreTarget(gaussian_score, 2), 2))
    x = inference.sample(30)
    assert torch.equal(torch.tensor(inference.to_arviz(30).posterior["x"].values[0]), x)
    data = inference.to_arviz(30, constrain=lambda x: {"sum": x.sum(1)})
    assert list(data.posterior) == ["sum"]
    assert torch.equal(torch.tensor(data.posterior["sum"].values[0]), x.sum(1))
    assert data.groups() == ["posterior"]


def test_a_density_with_weights_of_its_own_is_handed_over_and_too_few_draws_are_refused():
    pytest.importorskip("arviz")
    scale = torch.nn.Parameter(torch.ones(2))
    target = LogProbTarget(lambda x: -0.5 * (x * scale).square().sum(1), 2)
    inference = tiny(of=GeometricBridge(target, 2))
    assert inference.to_arviz(30).sample_stats["lp"].shape == (1, 30)
    with pytest.raises(ValueError, match="size=24: give 25 draws or more"):
        inference.to_arviz(24)


# ----- plateaus -----


class Falling(GeometricBridge):
    """A far target, whose upper levels have a log-density that is greater by a large constant."""

    def __init__(self):
        super().__init__(GaussianMixture(torch.full((1, 2), 40.0), torch.eye(2)[None]), 2)

    def log_prob(self, x, level):
        return super().log_prob(x, level) + 1e5 * (level > 0)


def short_plateau(window, patience):
    plateau = Plateau()
    plateau.window, plateau.patience = window, patience
    return plateau


def test_a_plateau_ends_each_stage_early():
    inference = tiny(num_steps=2000, plateau=short_plateau(window=5, patience=2), learning_rate=1e-9)
    steps = [step.step for step in inference.steps()]
    assert len(steps) < 400
    assert 1000 in steps
    assert inference.next_step == 2000


def test_a_plateau_ends_no_stage_whose_loss_falls_and_does_not_compare_it_with_the_one_before():
    plateau = short_plateau(window=8, patience=2)
    inference = tiny(of=Falling(), num_steps=80, batch_size=256, learning_rate=0.05, plateau=plateau)
    run_to(inference, 39)
    assert plateau.state_dict() == short_plateau(window=8, patience=2).state_dict()
    assert [step.step for step in inference.steps()] == list(range(40, 80))


# ----- parts of the user's own -----


class Shift(ConditionalLayers):
    """N(x_next + shift_t, std_t^2), written by a user."""

    def __init__(self, num_layers):
        super().__init__()
        self.num_layers = num_layers
        self.shift = torch.nn.Parameter(torch.zeros(num_layers, 2))
        self.log_std = torch.nn.Parameter(torch.zeros(num_layers, 2))

    def forward(self, x_next, t, condition=None):
        return DiagonalGaussian(x_next + self.shift[t], self.log_std[t].exp())


class Ladder(Bridge):
    """N(3 (T - t) / T, (T - t) I) at layer t, written by a user."""

    def __init__(self, num_layers):
        self.num_layers = num_layers

    def _moments(self, level):
        above = self.num_layers - level[:, None].float()
        return 3 * above / self.num_layers, 1 + above

    def log_prob(self, x, level):
        mean, variance = self._moments(level)
        return -0.5 * ((x - mean).square() / variance).sum(1)

    def score(self, x, level, condition=None):
        mean, variance = self._moments(level)
        return (mean - x) / variance

    def sample_base(self, batch_size, generator=None):
        return torch.randn(batch_size, 2, generator=generator)


@pytest.mark.parametrize("objective", [LowerBound(), pytest.param(KullbackLeibler(), marks=pytest.mark.slow)])
def test_layers_a_critic_and_a_bridge_of_the_users_own_are_fitted(objective):
    layers, critic = Shift(2), None if isinstance(objective, LowerBound) else ScoreMLP(2, width=16, depth=2)
    options = {"num_steps": 250, "batch_size": 128, "critic_updates": 2, "learning_rate": 0.03}
    inference = Inference(Ladder(2), objective, "joint", layers=layers, critic=critic, **options)
    inference.run()
    assert inference.layers is layers
    assert inference.critic is critic
    torch.testing.assert_close(layers.shift.detach(), torch.full((2, 2), 1.5), rtol=0, atol=0.2)
    torch.testing.assert_close(layers.log_std.detach().exp(), torch.ones(2, 2), rtol=0, atol=0.15)


# ----- refusals -----


def half_plane(x):
    return torch.where(x[:, 0] > 0, -x.square().sum(1), -torch.inf)


def in_numpy(x):
    return -x.square().sum(1).detach().numpy()


def of(log_prob):
    return GeometricBridge(LogProbTarget(log_prob, 2), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "elbo"}, "objective='elbo' is unknown: choose LB, SM, KL, or give an Objective"),
        ({"training": "parallel"}, "training='parallel' is unknown: choose 'sequential' or 'joint'"),
        ({"num_steps": 1}, "num_steps=1: give at least one update for each of the 2 layers"),
        ({"batch_size": 1}, "batch_size=1: give 2 rows or more"),
        ({"critic": ScoreMLP(2)}, "LowerBound has no critic: leave it out"),
        ({"layers": SharedLayers(GaussianMLP(2, num_layers=2), 2)}, 'cannot be trained one after the other.*"joint"'),
        ({"of": of(half_plane)}, "the target's log-density is not finite at 1.. of 256 draws of the base"),
        ({"of": of(in_numpy)}, "log_prob returned a ndarray: write it in torch, and return a tensor"),
        ({"layers": Shift(3)}, "layers has 3 layers, and the bridge 2"),
        ({"objective": LowerBound(surrogate=True), "plateau": Plateau()}, "a plateau needs a loss that can be compar"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda fit: fit.sample(-3), "size=-3: give a number of draws from 0 on"),
        (lambda fit: fit.log_prob(torch.zeros(4, 3)), r"x has the shape (4, 3): give draws of shape (N, 2), a tensor"),
        (lambda fit: fit.log_prob({"x": torch.zeros(4, 2)}), "x has the type dict: give draws of shape (N, 2)"),
    ],
)
def test_what_a_fit_cannot_answer_is_refused_in_one_line(act, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        act(tiny())


def test_a_fit_looks_at_the_critic_where_it_still_knows_the_layer(monkeypatch):
    seen = []
    monkeypatch.setattr(inference_module, "diagnose", lambda *_, critic_layers, **__: seen.append(critic_layers) or [])
    for training in ("sequential", "joint"):
        assert tiny("KL", training).diagnose() == []
    assert seen == [[0], None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["settings"].update(learning_rate=1e-3), r"another fit \(learning_rate: 0.001 -> None\)"),
        (lambda state: state.clear(), "another fit"),
        (lambda state: state.pop("critic_optimizer"), "the state has no critic_optimizer: give what state_dict"),
    ],
)
def test_the_state_of_another_fit_is_refused_before_anything_is_loaded(change, message):
    inference, other = tiny("KL"), tiny("KL")
    inference.run()
    before, state = parameters(other), inference.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert equal(before, parameters(other))
