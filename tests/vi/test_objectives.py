import math

import pytest
import torch

from hsivi_diffusers.vi.bridges import GeometricBridge
from hsivi_diffusers.vi.distributions import DiagonalGaussian
from hsivi_diffusers.vi.lower_bound import LowerBound
from hsivi_diffusers.vi.objectives import KullbackLeibler, LayerDraw, ScoreMatching, draw_layer
from hsivi_diffusers.vi.pools import make_chain
from hsivi_diffusers.vi.regression import ALONE_WEIGHT, Regression, WithPairs
from hsivi_diffusers.vi.targets import ScoreTarget
from scenarios import DIMENSION, ExactCritic, GaussianBridge, LinearCritic, LinearLayers, linear_layers, matching_bridge
from slow import others_slow


def make_draw(layers, bridge, size=64, **options):
    random = torch.Generator().manual_seed(0)
    batch = make_chain("simulate", bridge.sample_base, layers.num_layers, size).draw(layers, random)
    q = layers(batch.x_next, batch.t)
    return draw_layer(q, batch.t, bridge, generator=random, **options)


def shifted(bridge, by=0.5):
    return GaussianBridge(bridge.mean + by, bridge.variance * 1.3)


@pytest.mark.parametrize("objective", [ScoreMatching(), KullbackLeibler()])
def test_loss_and_gradient_are_zero_row_by_row_at_the_truth(objective):
    layers, bridge = linear_layers(), matching_bridge(linear_layers())
    loss = objective.layer_loss(ExactCritic(layers), bridge, make_draw(layers, bridge))
    assert torch.equal(loss, torch.zeros(64, dtype=torch.float64))
    loss.mean().backward()
    for parameter in layers.parameters():
        assert torch.equal(parameter.grad, torch.zeros(3, dtype=torch.float64))


def gradients(loss, layers):
    return torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True)


def exact_kl(layers, bridge):
    """mean over t of KL(q_t || p_t), per coordinate times their number."""
    mean, variance = (moment[:-1] for moment in layers.marginals())
    ratio = variance / bridge.variance
    kl = 0.5 * (ratio - 1 - ratio.log() + (mean - bridge.mean).square() / bridge.variance)
    return DIMENSION * kl


def test_kl_gradient_is_that_of_the_closed_form():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    size = 200_000
    x_next = bridge.sample_base(size, torch.Generator().manual_seed(1))
    t = torch.full((size,), 2)  # the layer below the base: its input does not depend on the parameters
    draw = draw_layer(layers(x_next, t), t, bridge, generator=torch.Generator().manual_seed(2))
    loss = KullbackLeibler().layer_loss(ExactCritic(layers), bridge, draw).mean()
    for got, wanted in zip(*(gradients(of, layers) for of in (loss, exact_kl(layers, bridge)[2])), strict=True):
        torch.testing.assert_close(got[2], wanted[2], rtol=0.05, atol=0.02)


def test_the_critic_loss_is_smallest_at_the_marginal_score():
    layers, critic = linear_layers(), LinearCritic(3)
    draw = make_draw(layers, matching_bridge(layers), size=100_000).detach()
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = ScoreMatching().critic_loss(critic, draw).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    mean, variance = (moment[:-1] for moment in layers.marginals())
    torch.testing.assert_close(critic.slope, -1 / variance, rtol=0.03, atol=0)
    torch.testing.assert_close(critic.intercept, mean / variance, rtol=0.1, atol=0.03)


def test_weights_multiply_rows():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw, critic = make_draw(layers, bridge), LinearCritic(3)

    def weight(level):
        return 1.0 + level

    for kind in (ScoreMatching, KullbackLeibler):
        for got, plain in (
            (kind(weight).layer_loss(critic, bridge, draw), kind().layer_loss(critic, bridge, draw)),
            (kind(weight).critic_loss(critic, draw), kind().critic_loss(critic, draw)),
        ):
            torch.testing.assert_close(got, weight(draw.level) * plain)


@pytest.mark.parametrize("t", range(3))
@pytest.mark.parametrize("name", ["scale", "shift", "std"])
@pytest.mark.parametrize("by", [-0.15, 0.15])
def test_score_matching_grows_by_half_the_fisher_divergence_whichever_way_a_parameter_leaves_the_truth(t, name, by):
    bridge, layers = matching_bridge(linear_layers()), linear_layers()
    with torch.no_grad():
        getattr(layers, name)[t] += by
    rows = ScoreMatching().layer_loss(ExactCritic(layers), bridge, make_draw(layers, bridge, size=40_000))
    loss, error = rows.mean(), float(rows.detach().std()) / 200  # the root of 40,000
    mean, variance = (moment[:-1] for moment in layers.marginals())
    slope, offset = 1 / variance - 1 / bridge.variance, bridge.mean / bridge.variance - mean / variance
    fisher = DIMENSION * (slope.square() * variance + (slope * mean + offset).square()).mean()  # v = slope x + offset
    assert loss > 4 * error
    torch.testing.assert_close(loss, 0.5 * fisher, rtol=0, atol=4 * error)


def test_both_players_of_sm_play_one_game():
    """The layers' loss is at its largest at the critic that is best for its own loss, whose gradient is its."""
    layers, critic = linear_layers(), LinearCritic(3)
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge, size=200).detach()
    losses = [ScoreMatching().layer_loss(critic, bridge, draw), -ScoreMatching().critic_loss(critic, draw)]
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), list(critic.parameters())) for loss in losses))


def test_kl_has_the_value_of_half_the_square_of_the_gap_and_the_gradient_of_x_times_the_gap():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw, critic = make_draw(layers, bridge), LinearCritic(3)
    gap = (critic(draw.x, draw.level) - bridge.score(draw.x, draw.level)).detach()
    loss = KullbackLeibler().layer_loss(critic, bridge, draw)
    torch.testing.assert_close(loss, 0.5 * gap.square().sum(1))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), draw.x)[0], gap)


# ----- pairs -----


@pytest.mark.parametrize("scoring", ["own", "random"])
def test_a_draw_knows_by_how_much_the_layers_mean_misses_wherever_it_is_scored(scoring):
    layers = linear_layers()
    bridge = matching_bridge(layers)
    end = torch.randn(64, DIMENSION, dtype=torch.float64)
    if scoring == "random":
        bridge.sample_level = lambda t, generator: bridge.level(t)
        bridge.place = lambda q, t, level, noise, x_next, generator: (q.detach(), noise)
    draw = make_draw(layers, bridge, scoring=scoring, end=end)
    batch = make_chain("simulate", bridge.sample_base, 3, 64).draw(layers, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw.residual, layers(batch.x_next, batch.t).mean - end)
    assert draw.residual.requires_grad
    assert not draw.detach().residual.requires_grad


def test_a_row_without_a_pair_has_no_regression():
    q = DiagonalGaussian(torch.tensor([[1.0], [2.0]], requires_grad=True), torch.ones(2, 1))
    end = torch.tensor([[torch.nan], [0.5]])
    draw = draw_layer(q, torch.zeros(2, dtype=torch.long), matching_bridge(linear_layers()), end=end)
    assert Regression().layer_loss(no_critic, None, draw).tolist() == [0.0, 1.5**2 / 2]
    loss = WithPairs(Constant(), 2.0).layer_loss(no_critic, None, draw)
    assert loss.tolist() == [2.0, 2 + 2 * 1.5**2 / 2]
    (gradient,) = torch.autograd.grad(loss.sum(), q.mean)
    assert gradient.tolist() == [[0.0], [3.0]]


def test_a_network_that_answers_with_nan_is_seen_in_its_pairs():
    q, t = DiagonalGaussian(torch.tensor([[torch.nan], [2.0]]), torch.ones(2, 1)), torch.zeros(2, dtype=torch.long)
    draw = draw_layer(q, t, matching_bridge(linear_layers()), end=torch.full((2, 1), 0.5))
    assert WithPairs(Constant(), 2.0).layer_loss(no_critic, None, draw).isnan().tolist() == [True, False]


def test_a_loss_of_residuals_may_be_given():
    layers = linear_layers()
    draw = make_draw(layers, matching_bridge(layers), end=torch.zeros(64, DIMENSION, dtype=torch.float64))
    expected = draw.residual.abs().sum(1)
    loss = lambda residual, t: residual.abs().sum(1)  # noqa: E731
    torch.testing.assert_close(Regression(loss).layer_loss(no_critic, None, draw), expected)
    torch.testing.assert_close(WithPairs(Constant(), 0.3, loss).layer_loss(no_critic, None, draw), 2 + 0.3 * expected)


@pytest.mark.parametrize("objective", [ScoreMatching(), KullbackLeibler()])
def test_the_loss_of_pairs_is_added_to_that_of_the_layers_and_leaves_the_critics(objective):
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge, end=torch.ones(64, DIMENSION, dtype=torch.float64))
    critic, with_pairs = LinearCritic(3), WithPairs(objective, 0.3)
    expected = objective.layer_loss(critic, bridge, draw) + 0.3 * Regression().layer_loss(no_critic, None, draw)
    torch.testing.assert_close(with_pairs.layer_loss(critic, bridge, draw), expected)
    of_critic = (each.critic_loss(critic, draw.detach()) for each in (with_pairs, objective))
    torch.testing.assert_close(*of_critic)
    assert with_pairs.critic_gradient == objective.critic_gradient


class Constant(KullbackLeibler):
    """An objective whose loss is 2."""

    def layer_loss(self, critic, bridge, draw):
        return torch.full((len(draw.residual),), 2.0, dtype=draw.residual.dtype)


# ----- the lower bound -----


def no_critic(*_):
    raise AssertionError("the lower bound asks no critic")


def bound(draw, bridge, **options):
    return LowerBound(**options).layer_loss(no_critic, bridge, draw)


def rows_of(draw, rows):
    q = DiagonalGaussian(draw.q.mean[rows], draw.q.std[rows])
    return LayerDraw(q, draw.x[rows], draw.level[rows], draw.t[rows])


def draw_at(layers, bridge, t, size, seed=0):
    """A draw of one layer, whose inputs have the exact marginal."""
    random = torch.Generator().manual_seed(seed)
    mean, variance = (moment[t + 1].detach() for moment in layers.marginals())
    x_next = mean + variance.sqrt() * torch.randn(size, DIMENSION, generator=random, dtype=torch.float64)
    rows = torch.full((size,), t)
    return draw_layer(layers(x_next, rows), rows, bridge, generator=random)


def test_the_bound_is_zero_row_by_row_where_layers_match_and_do_not_look_at_their_input():
    layers = LinearLayers(scale=[0.0, 0.0, 0.0], shift=[0.3, -0.5, 1.0], std=[0.4, 0.6, 0.9])
    bridge = matching_bridge(layers)
    loss = bound(make_draw(layers, bridge), bridge)
    assert loss.shape == (64,)
    torch.testing.assert_close(loss, torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", others_slow(range(3), 1))
def test_the_bound_falls_with_the_number_of_extra_draws_from_kl_and_the_mutual_information_to_kl(t):
    layers, size = linear_layers(), 1200
    bridge = shifted(matching_bridge(layers))
    kl = exact_kl(layers, bridge)[t].detach()
    information = 0.5 * DIMENSION * (layers.marginals()[1][t].detach() / layers.std[t] ** 2).log()
    draw = draw_at(layers, bridge, t, size).detach()
    rows = [draw.q.log_prob(draw.x) - bridge.log_prob(draw.x, draw.level)]  # no extra draw
    for of in (2, 15, 120, size):
        rows.append(torch.cat([bound(rows_of(draw, part), bridge) for part in torch.arange(size).split(of)]))
    error = 4 * float(rows[0].std()) / size**0.5
    means = [float(loss.mean()) for loss in rows]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[1] > 0.1
    assert min(means) > kl - error
    torch.testing.assert_close(means[0], float(kl + information), rtol=0, atol=error)
    torch.testing.assert_close(means[-1], float(kl), rtol=0, atol=error + 0.05)


def test_the_bound_of_a_batch_is_that_of_a_plain_double_loop():
    layers, size = linear_layers(), 7
    bridge = shifted(matching_bridge(layers))
    draw = draw_at(layers, bridge, 1, size)
    laws = [DiagonalGaussian(draw.q.mean[j : j + 1], draw.q.std[j : j + 1]) for j in range(size)]
    mixed = [torch.cat([law.log_prob(draw.x[i : i + 1]) for law in laws]).logsumexp(0) for i in range(size)]
    expected = torch.stack(mixed) - math.log(size) - bridge.log_prob(draw.x, draw.level)
    loss = bound(draw, bridge)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(gradients(value.sum(), layers) for value in (loss, expected)))


def test_rows_are_mixed_with_rows_of_their_own_level_alone():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge)
    loss = bound(draw, bridge)
    for level in range(3):
        of = draw.level == level
        torch.testing.assert_close(loss[of], bound(rows_of(draw, of), bridge))


def test_the_surrogate_has_the_gradient_of_the_log_density():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge)
    of = [gradients(bound(draw, bridge, surrogate=surrogate).mean(), layers) for surrogate in (False, True)]
    torch.testing.assert_close(*of)
    assert all(bool((each != 0).all()) for each in of[0])


def test_the_surrogate_needs_a_score_alone():
    bridge = GeometricBridge(ScoreTarget(lambda x: -x, 2), 2)
    q = DiagonalGaussian(torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2))
    draw = draw_layer(q, torch.zeros(4, dtype=torch.long), bridge)
    bound(draw, bridge, surrogate=True).sum().backward()
    assert q.mean.grad is not None
    with pytest.raises(NotImplementedError, match="ScoreTarget has a score and no log-density"):
        bound(draw, bridge)


def test_layers_with_pairs_alone_have_no_other_loss():
    """And the others the objective's, with the weight of the pairs beside it."""
    layers = linear_layers()
    bridge, t, x = matching_bridge(layers), torch.tensor([2, 0, 2, 1]), torch.randn(4, DIMENSION, dtype=torch.float64)
    end = torch.where(t[:, None] > 0, torch.ones_like(x), torch.nan)
    draw = draw_layer(layers(x, t), t, bridge, end=end, generator=torch.Generator().manual_seed(0))
    critic, kl = ExactCritic(layers), KullbackLeibler()
    usual, pairs = kl.layer_loss(critic, bridge, draw), 0.5 * (layers(x, t).mean - 1).square().sum(1)
    expected = torch.stack([ALONE_WEIGHT * pairs[0], usual[1], ALONE_WEIGHT * pairs[2], usual[3] + 0.3 * pairs[3]])
    torch.testing.assert_close(WithPairs(kl, 0.3, alone=[2]).layer_loss(critic, bridge, draw), expected)
    loss = WithPairs(KullbackLeibler(), 0.3, alone=[2]).layer_loss(critic, bridge, draw)
    slopes = torch.autograd.grad(loss.sum(), layers.scale, retain_graph=True)[0]
    (of_pairs,) = torch.autograd.grad(ALONE_WEIGHT * pairs[[0, 2]].sum(), layers.scale)
    torch.testing.assert_close(slopes[2], of_pairs[2])


@pytest.mark.parametrize(("t", "scored"), [([2, 0, 2, 1], [0, 1]), ([1, 0], [1, 0]), ([2, 2], [2, 2])])
def test_teacher_and_critic_are_asked_for_the_rows_of_other_layers_alone(t, scored):
    """Unless there are none: in a sharded run every process takes part in each call."""
    layers, t, asked = linear_layers(), torch.tensor(t), []
    bridge, x = matching_bridge(layers), torch.randn(len(t), DIMENSION, dtype=torch.float64)

    class Asked(ExactCritic):
        def forward(self, x, level, condition, t):
            asked.append([*zip(condition.tolist(), t.tolist(), strict=True)])
            return super().forward(x, level, condition, t)

    q = DiagonalGaussian(layers(x, t).mean, torch.full((), 0.5, dtype=torch.float64))
    draw = draw_layer(q, t, bridge, end=torch.ones_like(x), condition=10 * t)
    objective = WithPairs(KullbackLeibler(), 0.3, alone=[2])
    loss = objective.layer_loss(Asked(layers), bridge, draw)
    of_critic = objective.critic_loss(Asked(layers), objective.scored(draw))
    assert asked == [[(10 * each, each) for each in scored]] * 2
    assert (loss.shape, of_critic.shape) == (t.shape, (len(scored),))
    loss.sum().backward()
    assert layers.scale.grad.isfinite().all()


def test_an_objective_with_pairs_may_have_another_within():
    layers, t = linear_layers(), torch.tensor([2, 0, 1, 0])
    bridge, x = matching_bridge(layers), torch.randn(4, DIMENSION, dtype=torch.float64)
    draw = draw_layer(layers(x, t), t, bridge, end=torch.ones_like(x))
    inner = WithPairs(KullbackLeibler(), 0.3, alone=[1])
    objective = WithPairs(inner, 0.2, alone=[2])
    assert objective.scored(draw).t.tolist() == [0, 0]
    shared = ExactCritic(layers)(objective.scored(draw).x, objective.scored(draw).level)
    loss = objective.layer_loss(lambda *_: shared, bridge, draw)
    of_pairs = Regression().layer_loss(no_critic, None, draw)
    of_inner = inner.layer_loss(ExactCritic(layers), bridge, draw)
    torch.testing.assert_close(loss[1:], (of_inner + 0.2 * of_pairs)[1:])
    torch.testing.assert_close(loss[0], ALONE_WEIGHT * of_pairs[0])


def refused(objective, **options):
    """The loss of an objective that cannot have one for this draw; each row has a level of its own."""
    layers = linear_layers()
    bridge, t = matching_bridge(layers), torch.arange(3)
    q = layers(torch.zeros(3, DIMENSION, dtype=torch.float64), t)
    objective.layer_loss(ExactCritic(layers), bridge, draw_layer(q, t, bridge, **options))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: refused(Regression(), scoring="all"), "scoring='all' is unknown: choose 'own' or 'random'"),
        (lambda: refused(Regression()), "Regression takes its inputs from a PairChain, WithPairs from"),
        (lambda: refused(WithPairs(KullbackLeibler(), 0.3)), "Regression takes its inputs from a PairChain"),
        (lambda: refused(LowerBound()), 'each of the 3 rows has a level of its own, .*use scoring="own"'),
        (lambda: refused(LowerBound(), condition=torch.zeros(3)), "LowerBound .* takes no conditions"),
        *(
            (lambda weight=weight: WithPairs(KullbackLeibler(), weight), "give a number > 0, or take the objective")
            for weight in (0.0, -1.0, math.nan)
        ),
    ],
)
def test_what_an_objective_cannot_use_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
