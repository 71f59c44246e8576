import pytest
import torch

from hsivi_diffusers.vi import KullbackLeibler, LayerDraw, ScoreMatching, draw_layer, make_chain
from scenarios import DIMENSION, ExactCritic, GaussianBridge, LinearCritic, linear_layers, matching_bridge


def make_draw(layers, bridge, size=64, **options):
    random = torch.Generator().manual_seed(0)
    batch = make_chain("simulate", bridge.sample_base, layers.num_layers, size).draw(layers, random)
    q = layers(batch.x_next, batch.t)
    return draw_layer(q, batch.t, bridge, generator=random, **options)


def shifted(bridge, by=0.5):
    return GaussianBridge(bridge.mean + by, bridge.variance * 1.3)


def test_score_matching_loss_is_zero_for_every_sample_when_layers_match_and_the_critic_is_exact():
    layers = linear_layers()
    bridge = matching_bridge(layers)
    loss = ScoreMatching().layer_loss(ExactCritic(layers), bridge, make_draw(layers, bridge))
    assert loss.shape == (64,)
    assert torch.equal(loss, torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize("objective", [ScoreMatching(), ScoreMatching(alpha=1.0), KullbackLeibler()])
def test_no_gradient_at_the_truth(objective):
    layers = linear_layers()
    bridge = matching_bridge(layers)
    objective.layer_loss(ExactCritic(layers), bridge, make_draw(layers, bridge)).mean().backward()
    assert torch.equal(layers.shift.grad, torch.zeros(3, dtype=torch.float64))


def test_score_matching_loss_is_the_fisher_divergence_in_the_mean():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge, size=200_000)
    critic = ExactCritic(layers)
    loss = ScoreMatching().layer_loss(critic, bridge, draw).mean()
    v = bridge.score(draw.x, draw.level) - critic(draw.x, draw.level)
    torch.testing.assert_close(loss, 0.5 * v.square().sum(1).mean(), rtol=0.02, atol=0)


def test_alpha_takes_off_its_share_of_the_square():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw, critic = make_draw(layers, bridge), ExactCritic(layers)
    half, whole = (ScoreMatching(alpha=alpha).layer_loss(critic, bridge, draw) for alpha in (0.5, 1.0))
    v = bridge.score(draw.x, draw.level) - critic(draw.x, draw.level)
    torch.testing.assert_close(half - whole, 0.5 * v.square().sum(1))


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
    gradient = torch.autograd.grad(loss, [layers.shift, layers.scale])
    expected = torch.autograd.grad(exact_kl(layers, bridge)[2], [layers.shift, layers.scale])
    for got, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(got[2], wanted[2], rtol=0.05, atol=0.02)


def test_kl_and_sm_gradients_point_the_same_way_on_a_gaussian():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge, size=20_000)
    gradients = []
    for objective in (KullbackLeibler(), ScoreMatching()):
        loss = objective.layer_loss(ExactCritic(layers), bridge, draw).mean()
        gradients.append(torch.autograd.grad(loss, layers.shift, retain_graph=True)[0])
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95
    assert (gradients[0] < 0).all()  # the bridge lies above: both want a larger shift
    assert (gradients[1] < 0).all()


def test_the_critic_loss_is_smallest_at_the_marginal_score():
    layers = linear_layers()
    bridge = matching_bridge(layers)
    critic = LinearCritic(3)
    objective = ScoreMatching()
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=50, line_search_fn="strong_wolfe")
    draw = make_draw(layers, bridge, size=100_000).detach()

    def closure():
        optimizer.zero_grad()
        loss = objective.critic_loss(critic, draw).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    mean, variance = (moment[:-1] for moment in layers.marginals())
    torch.testing.assert_close(critic.slope, -1 / variance, rtol=0.03, atol=0)
    torch.testing.assert_close(critic.intercept, mean / variance, rtol=0.1, atol=0.03)


def test_neither_player_moves_the_other():
    layers, critic = linear_layers(), LinearCritic(3)
    bridge = shifted(matching_bridge(layers))
    draw = make_draw(layers, bridge)
    ScoreMatching().critic_loss(critic, draw.detach()).mean().backward()
    assert layers.shift.grad is None
    assert critic.slope.grad is not None
    critic.zero_grad()
    KullbackLeibler().layer_loss(critic, bridge, draw).mean().backward()
    assert critic.slope.grad is None
    assert layers.shift.grad is not None


def test_weights_multiply_rows_and_normalising_divides_by_the_distance():
    layers = linear_layers()
    bridge = shifted(matching_bridge(layers))
    draw, critic = make_draw(layers, bridge), LinearCritic(3)

    def weight(level):
        return 1.0 + level

    for kind in (ScoreMatching, KullbackLeibler):
        plain, weighted = kind(), kind(layer_weight=weight, critic_weight=weight)
        factor = 1.0 + draw.level
        torch.testing.assert_close(
            weighted.layer_loss(critic, bridge, draw), factor * plain.layer_loss(critic, bridge, draw)
        )
        torch.testing.assert_close(weighted.critic_loss(critic, draw), factor * plain.critic_loss(critic, draw))
        distance = (bridge.score(draw.x, draw.level) - draw.layer_score).abs().mean(1)
        torch.testing.assert_close(
            kind(normalise=True).layer_loss(critic, bridge, draw), plain.layer_loss(critic, bridge, draw) / distance
        )


def test_a_draw_knows_its_own_score_and_level():
    layers = linear_layers()
    bridge = matching_bridge(layers)
    draw = make_draw(layers, bridge)
    assert isinstance(draw, LayerDraw)
    torch.testing.assert_close(draw.layer_score, -(draw.x - draw.q.mean) / draw.q.std**2)
    assert set(draw.level.tolist()) == {0, 1, 2}


def test_unknown_scoring_is_refused():
    layers = linear_layers()
    with pytest.raises(ValueError, match="scoring='all' is unknown: choose 'own' or 'random'"):
        make_draw(layers, matching_bridge(layers), scoring="all")
