import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_diffusers.vi import masses
from hsivi_diffusers.vi.bridges import Bridge
from hsivi_diffusers.vi.chains import draw_marginals
from hsivi_diffusers.vi.diagnosis import diagnose
from hsivi_diffusers.vi.diagnostics import critic_lag, other_objective, stein_ratio, variance_collapse
from hsivi_diffusers.vi.distributions import DiagonalGaussian
from hsivi_diffusers.vi.layers import ConditionalLayers
from hsivi_diffusers.vi.lower_bound import LowerBound
from hsivi_diffusers.vi.masses import drift, lost_modes, wrong_masses
from hsivi_diffusers.vi.objectives import KullbackLeibler, ScoreMatching
from hsivi_diffusers.vi.regression import WithPairs
from hsivi_diffusers.vi.targets import gradient
from scenarios import ExactCritic, GaussianBridge, LinearLayers, linear_layers, matching_bridge
from slow import others_slow


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Given(ConditionalLayers):
    """Layers whose mean and std are a function of their input and their number."""

    def __init__(self, law, num_layers=1):
        super().__init__()
        self.law, self.num_layers = law, num_layers

    def forward(self, x_next, t, condition=None):
        mean, std = self.law(x_next, t)
        return DiagonalGaussian(mean, torch.as_tensor(std).to(mean).expand_as(mean))


def one_layer(modes, std=1.0):
    """Draws from a mixture of equal Gaussians, which of them being told by the angle of x_next in the first plane."""

    def law(x_next, t):
        angle = torch.atan2(x_next[:, 1], x_next[:, 0]) / (2 * torch.pi) + 0.5
        return modes[(angle * len(modes)).long().clamp(max=len(modes) - 1)], std

    return Given(law)


class ScoreBridge(Bridge):
    """One level, of which the score of a density on R^d is known, from a base N(0, I)."""

    num_layers = 1

    def __init__(self, log_prob, dimension):
        self.log_density, self.dimension = log_prob, dimension

    def level(self, t):
        return 0.25 * torch.ones_like(t, dtype=torch.float64)

    def score(self, x, level, condition=None):
        assert bool((level == 0.25).all())
        return gradient(self.log_density, x)

    def sample_base(self, batch_size, generator=None):
        return torch.randn(batch_size, self.dimension, generator=generator, dtype=torch.float64)


class DensityBridge(ScoreBridge):
    def log_prob(self, x, level):
        return self.log_density(x)


def two_modes(gap, dimension=2):
    modes = torch.zeros(2, dimension, dtype=torch.float64)
    modes[0, 0], modes[1, 0] = gap, -gap
    return modes


def mixture_bridge(modes, std=1.0, kind=ScoreBridge):
    return kind(lambda x: (-0.5 * (x[:, None] - modes).square().sum(2) / std**2).logsumexp(1), modes.shape[1])


def draws(layers, bridge, num_draws=2000, seed=0):
    random = seeded(seed)
    return draw_marginals(layers, bridge.sample_base(num_draws, random), random)


def narrowness(layers, bridge, num_draws=2000):
    return variance_collapse(layers, bridge, draws(layers, bridge, num_draws))


def lag(layers, bridge, critic, which=(2, 1, 0), num_draws=2000, seed=0):
    return critic_lag(layers, bridge, critic, draws(layers, bridge, num_draws, seed), which, seeded(seed + 100))


def losses(layers, bridge):
    return lost_modes(bridge, draws(layers, bridge), generator=seeded(1))


def signatures(findings):
    return [finding.signature for finding in findings]


@pytest.mark.parametrize("seed", others_slow(range(2), 0))
def test_nothing_is_found_where_the_layers_match_and_the_critic_is_exact(seed):
    layers = linear_layers()
    assert diagnose(layers, matching_bridge(layers), critic=ExactCritic(layers), generator=seeded(seed)) == []


class ShiftedBridge(GaussianBridge):
    """Of the condition c the mean is larger by that of a chain whose layers add c."""

    def __init__(self, layers):
        super().__init__(*layers.marginals())
        self.shift = torch.zeros(layers.num_layers + 1, dtype=torch.float64)
        for t in reversed(range(layers.num_layers)):
            self.shift[t] = layers.scale[t].item() * self.shift[t + 1] + 1

    def score(self, x, level, condition=None):
        shift = 0 if condition is None else self.shift[level, None] * condition[:, None]
        return super().score(x - shift, level)


@pytest.mark.parametrize(("offset", "found"), [(0, False), (0.8, True)])
def test_a_sampler_is_diagnosed_at_one_condition(offset, found):
    layers = linear_layers()
    bridge = ShiftedBridge(layers)
    bridge.shift = bridge.shift + offset
    at = torch.tensor(2.0, dtype=torch.float64)
    assert bool(diagnose(layers, bridge, condition=at, generator=seeded())) == found
    assert layers.forward.__func__ is LinearLayers.forward


@given(st.floats(0.1, 2), st.floats(0.2, 3), st.floats(-2, 2))
@settings(max_examples=20)
def test_the_stein_ratio_of_gaussians_is_that_of_their_variances(sd_q, sd_p, shift):
    x = shift + sd_q * torch.randn(4000, 3, generator=seeded(), dtype=torch.float64)
    ratio, error = stein_ratio(x, -x / sd_p**2)
    expected = torch.full((3,), (sd_q / sd_p) ** 2, dtype=torch.float64)
    assert bool(((ratio - expected).abs() < 5 * error).all())


def test_the_stein_ratio_of_correlated_gaussians_is_the_diagonal_of_the_covariance_times_the_precision():
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    precision = torch.tensor([[2.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    x = torch.randn(20000, 2, generator=seeded(), dtype=torch.float64) @ root.T
    ratio, error = stein_ratio(x, -x @ precision)
    assert bool(((ratio - (root @ root.T @ precision).diagonal()).abs() < 4 * error).all())


@pytest.mark.parametrize(
    ("ratio", "found"), [(0.3, "under_dispersed"), (0.6, "under_dispersed"), (1.0, None), (2.25, "over_dispersed")]
)
def test_a_sampler_that_is_too_narrow_or_too_wide_is_found_by_the_ratio_of_the_variances(ratio, found):
    layers = LinearLayers(scale=[0.8, 0.5], shift=[0.3, 1.0], std=[0.4, 0.6])
    mean, variance = layers.marginals()
    findings = narrowness(layers, GaussianBridge(mean.detach()[:-1], variance.detach()[:-1] / ratio), 5000)
    assert [(finding.signature, finding.layer) for finding in findings] == ([(found, 0)] if found else [])
    for finding in findings:
        assert finding.value == pytest.approx(ratio, rel=0.05)
        assert "in 3 of 3 coordinates" in finding.message


def test_a_layer_without_noise_has_collapsed():
    layers = LinearLayers(scale=[0.8, 0.5, -0.7], shift=[0.3, -0.5, 1.0], std=[0.4, 1e-3, 0.9])
    (finding,) = narrowness(layers, matching_bridge(layers))
    assert (finding.signature, finding.layer) == ("variance_collapse", 1)
    spread = float(layers.marginals()[1][1].detach().sqrt())
    assert finding.value == pytest.approx(1e-3 / spread, rel=0.1)
    assert "layer 1 is deterministic in 3 of 3 coordinates" in finding.message


def scaled(critic, factor=1.0, shift=0.0):
    return lambda x, level, condition, t: factor * critic(x, level, condition, t) + shift


# E[s . (s - s*)] / E|s|^2 = (a - 1) / a and 1 + E[(x - E x) . s] / d = 1 - a for s = a s*; a shift of 1 is 1 and 0.
@pytest.mark.parametrize(
    ("change", "which", "lags"), [((0.5, 0.0), (2, 1, 0), 1.0), ((1.5, 0.0), (2, 1, 0), 0.5), ((1.0, 1.0), [2], None)]
)
def test_a_scaled_or_shifted_critic_lags_by_the_closed_form(change, which, lags):
    layers = linear_layers()
    found = lag(layers, matching_bridge(layers), scaled(ExactCritic(layers), *change), which, num_draws=5000)
    assert [(finding.signature, finding.layer) for finding in found] == [("critic_lag", t) for t in which]
    lags = lags or 1 / (1 + 1 / float(layers.marginals()[1][2].detach()))
    for finding in found:
        assert finding.value == pytest.approx(lags, rel=0.1)


def test_a_sign_within_its_error_is_no_finding():
    layers = linear_layers()
    exact, bridge = ExactCritic(layers), matching_bridge(layers)
    found = [len(lag(layers, bridge, exact, num_draws=50, seed=seed)) for seed in range(20)]
    assert sum(found) <= 2
    assert len(lag(layers, bridge, scaled(exact, 1.2), num_draws=8000)) == 3


@pytest.mark.parametrize(
    ("dimension", "gap", "std"), others_slow([(2, 3.0, 0.1), (30, 8.0, 1.0), (2, 10.0, 1.0)], (2, 10.0, 1.0))
)
def test_a_mode_that_is_never_visited_is_found(dimension, gap, std):
    modes = two_modes(gap, dimension)
    (finding,) = losses(one_layer(modes[:1], std), mixture_bridge(modes, std))
    assert finding.signature == "lost_modes"
    assert finding.value == pytest.approx(0.5, abs=0.2)
    place = float(finding.message.split("x = [")[1].split(",")[0])
    assert place == pytest.approx(-gap, abs=4 * std)
    assert losses(one_layer(modes, std), mixture_bridge(modes, std)) == []


def test_a_funnel_has_no_lost_modes():
    def law(x_next, t):
        v, z = 3 * x_next[:, :1], x_next[:, 1:]
        return torch.cat([v, (v / 2).exp() * z], 1), 1e-6

    def log_prob(x):
        v = x[:, 0]
        return -v.square() / 18 - 2 * v - 0.5 * x[:, 1:].square().sum(1) * (-v).exp()

    assert losses(Given(law), ScoreBridge(log_prob, 5)) == []


@pytest.mark.parametrize(("reach", "expected"), [(600.0, ["lost_modes"]), (0.0, [])])
def test_a_mode_beyond_the_base_is_found_from_an_upper_layer_alone(reach, expected):
    def law(x_next, t):
        """Half of x_1 lie at `reach`, all of x_0 at 0."""
        mean = torch.zeros_like(x_next)
        mean[:, 0] = reach * ((t == 1) & (x_next[:, 1] > 0))
        return mean, 1.0

    bridge = mixture_bridge(torch.tensor([[0.0, 0.0], [600.0, 0.0]], dtype=torch.float64))
    assert signatures(losses(Given(law, num_layers=2), bridge)) == expected


@pytest.mark.parametrize(("std", "found"), [(1e-3, False), (1e-5, True)])
def test_a_layer_as_narrow_as_its_target_has_not_collapsed(std, found):
    """Both coordinates near the first of x_next: a thin law around the diagonal of the plane."""
    width, layers = 1e-3 * 2**0.5, Given(lambda x_next, t: (x_next[:, :1].expand(-1, 2), std))
    target = ScoreBridge(lambda x: -0.5 * x[:, 0].square() - 0.5 * ((x[:, 1] - x[:, 0]) / width).square(), 2)
    assert ("variance_collapse" in signatures(narrowness(layers, target))) == found


@pytest.mark.parametrize(
    ("shift", "bridge", "message"),
    [
        (math.nan, GaussianBridge([0.0], [1.0]), "numbers of x_0 are not finite: the sampler diverged"),
        (800.0, ScoreBridge(lambda x: -x.exp().sum(1), 3), "score is not finite at draws of x_0: the sampler div"),
        (400.0, ScoreBridge(lambda x: -x.exp().sum(1), 3), "score is too large .* to be squared: the sampler div"),
    ],
)
def test_a_sampler_that_diverged_is_refused(shift, bridge, message):
    with pytest.raises(ValueError, match=message):
        diagnose(LinearLayers(scale=[0.0], shift=[shift], std=[0.1]), bridge)


def banana(std=1.5, width=0.4, reach=math.inf):
    """x_1 ~ N(0, std^2) cut off at `reach` std, x_2 = x_1^2 / 2 + noise of the std `width`; and its density."""

    def law(x_next, t):
        first = std * x_next[:, :1].clamp(-reach, reach)
        return torch.cat([first, first.square() / 2], 1), torch.tensor([0.02, width])

    def log_prob(x):
        return -0.5 * (x[:, 0] / std).square() - 0.5 * ((x[:, 1] - x[:, 0].square() / 2) / width).square()

    return Given(law), ScoreBridge(log_prob, 2)


@pytest.mark.slow
def test_a_banana_without_its_ends_drifts_along_its_ridge():
    """Its sd is 1.27 instead of 1.64 across its base, as that of a fit of 4,000 steps is."""
    found = diagnose(*banana(reach=1.9), generator=seeded())
    assert signatures(found)[-1] == "drift"
    assert found[-1].value < 0.8


@pytest.mark.slow
def test_a_whole_banana_does_not_drift():
    assert diagnose(*banana(), generator=seeded()) == []


def test_a_distribution_of_torch_that_takes_no_empty_batch_is_diagnosed(monkeypatch):
    monkeypatch.setattr(masses, "NUM_STEPS", 60)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2).double())
    known = diagnose(one_layer(torch.zeros(1, 2).double()), DensityBridge(normal.log_prob, 2), generator=seeded())
    assert (known, len(known.unchecked)) == ([], 1)


def test_remedies_depend_on_the_objective():
    modes, objective = two_modes(4.0), WithPairs(KullbackLeibler(), 0.1)
    found = diagnose(one_layer(modes[:1], std=0.5), mixture_bridge(modes), objective=objective, generator=seeded())
    assert {"lost_modes", "under_dispersed", "drift"} <= set(signatures(found))
    assert all("give the critic more updates, 3 or 5, or train by LB" in finding.message for finding in found)
    assert other_objective(KullbackLeibler()) == other_objective(objective)
    assert other_objective(ScoreMatching()) == "train by LB or KL instead of SM"
    assert other_objective(LowerBound()) == "give LB a larger batch, or train by KL with several critic updates"
    assert other_objective(None) == "try another objective"


@pytest.mark.parametrize(("share", "found"), [(0.5, []), (0.75, ["wrong_masses"])])
def test_modes_of_wrong_mass_are_found_by_their_weights(share, found):
    """Of two modes far apart, which no chain crosses between: the share of the first is 1/2."""
    modes = two_modes(8.0)

    def law(x_next, t):
        first = torch.distributions.Normal(0.0, 1.0).cdf(x_next[:, :1]) < share
        return torch.where(first, modes[:1], modes[1:]), 1.0

    bridge = mixture_bridge(modes, kind=DensityBridge)
    findings, why = wrong_masses(Given(law), bridge, draws(Given(law), bridge))
    assert (signatures(findings), why) == (found, None)
    assert all(finding.value == pytest.approx(share - 0.5, abs=0.05) for finding in findings)
    assert drift(bridge, draws(Given(law), bridge, 1000), generator=seeded(100)) == []


def test_what_was_not_checked_is_told(monkeypatch):
    monkeypatch.setattr(masses, "NUM_STEPS", 60)
    diagnosis = diagnose(one_layer(two_modes(4.0)), mixture_bridge(two_modes(4.0)), generator=seeded())
    assert diagnosis.unchecked[-1] == "the masses of modes: only the score of the target is known"
    assert str(diagnosis).splitlines()[0] == "no sign of a bad fit was found"
    assert "not checked: modes that attract no start within 20 times the spread of the base" in str(diagnosis)
    other, layers = GaussianBridge([0.0], [1.0]), LinearLayers(scale=[0.0], shift=[4.0], std=[1.0])
    assert "importance weights use" in wrong_masses(layers, other, draws(layers, other))[1]
