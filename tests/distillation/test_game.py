"""Layers, critic and bridge: what a teacher is to the core."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.overrides import TorchFunctionMode

from hsivi_diffusers import HSIVINoiseScale, HSIVIScheduler, StudentCritic, StudentLayers, TeacherBridge
from hsivi_diffusers.distillation.game import label_layers
from hsivi_diffusers.teachers.pixels import Pixels
from hsivi_diffusers.vi import DiagonalGaussian, KullbackLeibler, ScoreMatching, draw_layer
from tiny_unet import make_unet

GRID = [440, 220, 10]
GRIDS = [[440, 330, 220, 110, 0], [500, 0], [440, 220, 10]]  # for 4, 1 and 2 steps


def teacher_of(unet):
    return Pixels.of(SimpleNamespace(unet=unet), HSIVIScheduler())


def bridge_of(unet, grid=GRID, *, level_range=(5, 800), between_share=0.0, **settings):
    settings = {"noise_eta": 1.0, **settings}
    return TeacherBridge(teacher_of(unet), HSIVIScheduler(layer_timesteps=grid, **settings), level_range, between_share)


def layers_of(bridge, unet=None, noise_scale=None, clip=False):
    return StudentLayers(unet or bridge.teacher.network, bridge.teacher, bridge.scheduler, noise_scale, clip)


def critic_of(bridge, unet=None):
    return StudentCritic(unet or bridge.teacher.network, bridge.teacher, bridge.scheduler)


@pytest.fixture
def bridge(unet):
    return bridge_of(unet)


# ----- critic and score -----


def test_the_score_is_minus_noise_over_sigma_and_the_critic_starts_as_it(unet, bridge):
    x, level = torch.randn(3, 1, 8, 8), torch.tensor([10, 220, 700])
    sigma = (1 - DDPMScheduler().alphas_cumprod[level]).sqrt().reshape(3, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(bridge.score(x, level), -unet(x, level).sample / sigma)
    assert torch.equal(critic_of(bridge)(x, level), bridge.score(x, level))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_formed_in_full_precision(unet, bridge, dtype):
    """1/sigma is 100 at timestep 0: what is lost is the network's rounding alone."""
    level, x = torch.arange(6), torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        full = critic_of(bridge)(x, level)
        half = critic_of(bridge, unet.to(dtype))(x, level)
        noise = unet(x.to(dtype), level).sample.float()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, -noise / bridge.scheduler.alpha_sigma(level, x)[1])
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("classes", [None, 3])
def test_a_critic_with_labels_of_layers_starts_as_the_unet_for_each(classes):
    unet = make_unet(num_class_embeds=classes).eval()
    teacher, schedule = teacher_of(unet), HSIVIScheduler()
    labelled = label_layers(teacher, unet, 4)
    critic = StudentCritic(labelled, teacher, schedule, num_layers=4)
    x, timestep, t = torch.randn(4, 1, 8, 8), torch.tensor([10, 220, 700, 999]), torch.tensor([0, 1, 3, 2])
    condition = None if classes is None else torch.tensor([2, 0, 1, 1])
    plain = StudentCritic(unet, teacher, schedule)(x, timestep, condition)
    torch.testing.assert_close(critic(x, timestep, condition, t), plain)
    with torch.no_grad():
        labelled.class_embedding.weight[3 if classes is None else 4 * 1 + 3] += 1
    moved = critic(x, timestep, condition, t)
    assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(moved, plain, strict=True)] == [True, True, False, True]
    with pytest.raises(ValueError, match="t is missing: this critic has 4 layers"):
        critic(x, timestep, condition)


def test_a_time_as_class_leaves_no_embedding_for_the_layer():
    unet = make_unet(class_embed_type="timestep")
    with pytest.raises(ValueError, match="class_embed_type='timestep', so it has no free class embedding for"):
        label_layers(teacher_of(unet), unet, 2)


def test_conditions_reach_teacher_student_and_critic():
    bridge = bridge_of(make_unet(num_class_embeds=3).eval())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 0])
    layers = layers_of(bridge)
    for player in (bridge.score, critic_of(bridge), lambda *given: layers(*given).mean):
        first, second = player(x, t, torch.tensor([0, 1])), player(x, t, torch.tensor([0, 2]))
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])


# ----- layers -----


def test_layers_are_the_transition_that_step_makes(unet):
    bridge = bridge_of(unet, noise_eta=0.2)
    layers, scheduler = layers_of(bridge), bridge.scheduler
    assert layers.num_layers == 2
    x_next, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        q = layers(x_next, torch.ones(4, dtype=torch.long))
        stepped = scheduler.step(unet(x_next, torch.full((4,), 440)).sample, 440, x_next, variance_noise=noise)
    assert torch.equal(q.rsample(noise), stepped.prev_sample)


def test_layers_use_the_learned_noise_scale(unet):
    noise_scale = HSIVINoiseScale(sample_shape=(1, 8, 8))
    layers = layers_of(bridge_of(unet, noise_scale_type="per_pixel"), noise_scale=noise_scale)
    q = layers(torch.randn(4, 1, 8, 8), torch.ones(4, dtype=torch.long))
    q.rsample(torch.ones(4, 1, 8, 8)).sum().backward()
    torch.testing.assert_close(noise_scale.log_scale.grad, 4 * q.std.detach().mean() * torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("grids", [[440, 220, 10], [[440, 10], [440, 220, 10]]])
def test_last_layers_are_clipped_in_value_and_not_in_gradient(unet, grids):
    """Each grid has a last layer: of one grid layer 0, of a first of T = 1 and a second of T = 2 layers 0 and 1."""
    bridge = bridge_of(unet, grids, noise_eta=0.7)
    depths = bridge.scheduler.depths
    x, t = 3 * torch.randn(6, 1, 8, 8), torch.arange(6) % sum(depths)
    plain, clipped = (layers_of(bridge, make_unet(), clip=clip) for clip in (False, True))
    clipped.network = plain.network
    parameters = list(plain.network.parameters())
    plain, clipped = plain(x, t), clipped(x, t)
    is_last = t < len(depths)
    assert plain.mean[is_last].abs().max() > 1
    torch.testing.assert_close(clipped.mean[is_last], plain.mean[is_last].clamp(-1, 1))
    assert torch.equal(clipped.mean[~is_last], plain.mean[~is_last])
    assert torch.equal(clipped.std, plain.std)
    weight = torch.randn(6, 1, 8, 8)
    gradients = [torch.autograd.grad((weight * q.mean).sum(), parameters) for q in (plain, clipped)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def check_gradients(parameters):
    gradients = [parameter.grad for parameter in parameters]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_layers_that_start_at_pure_noise_have_finite_values_and_gradients(unet):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = HSIVIScheduler(layer_timesteps=[999, 500, 0], noise_eta=1.0, **schedule)
    q = StudentLayers(unet, teacher_of(unet), scheduler)(torch.randn(2, 1, 8, 8), torch.ones(2, dtype=torch.long))
    assert q.mean.isfinite().all()
    assert (q.std.isfinite() & (q.std > 0)).all()
    q.rsample(torch.randn(2, 1, 8, 8)).square().sum().backward()
    check_gradients(unet.parameters())


def test_a_layer_of_several_grids_is_that_of_its_grid_alone(unet):
    bridge = bridge_of(unet, GRIDS, noise_scale=0.7)
    layers, t = layers_of(bridge), torch.arange(7)
    assert bridge.num_layers == layers.num_layers == 7
    assert bridge.level(t).tolist() == [0, 10, 220, 0, 110, 220, 330]
    x_next, noise = torch.randn(2, 7, 1, 8, 8)
    with torch.no_grad():
        x = layers(x_next, t).rsample(noise)
        for grid, rows in zip(bridge.scheduler.trained_grids, t.split(bridge.scheduler.depths), strict=True):
            alone = layers_of(bridge_of(unet, grid, noise_scale=0.7))
            torch.testing.assert_close(x[rows], alone(x_next[rows], torch.arange(len(rows))).rsample(noise[rows]))


@pytest.mark.parametrize(
    ("scoring", "learned", "objective"),
    [
        ("own", "per_pixel", ScoreMatching()),
        pytest.param("own", "config", KullbackLeibler(), marks=pytest.mark.slow),
        ("random", "config", ScoreMatching()),
        pytest.param("random", "per_pixel", KullbackLeibler(), marks=pytest.mark.slow),
        pytest.param("between", "config", KullbackLeibler(), marks=pytest.mark.slow),
        ("between", "per_pixel", KullbackLeibler()),
    ],
)
def test_every_layer_of_several_grids_has_a_gradient_and_the_teacher_has_none(unet, scoring, learned, objective):
    bridge = bridge_of(unet, GRIDS, between_share=0.5 * (scoring == "between"), noise_scale_type=learned)
    scale = None if learned == "config" else HSIVINoiseScale(sample_shape=(1, 8, 8))
    student, critic = layers_of(bridge, make_unet(), scale), critic_of(bridge, make_unet()).requires_grad_(False)
    for layer in range(7):
        t, x_next = torch.full((2,), layer), torch.randn(2, 1, 8, 8)
        given = {"scoring": "own" if scoring == "own" else "random", "generator": torch.Generator().manual_seed(layer)}
        draw = draw_layer(student(x_next, t), t, bridge, x_next=x_next, **given)
        student.zero_grad()
        objective.layer_loss(critic, bridge, draw).sum().backward()
        check_gradients(student.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


# ----- levels -----


@pytest.mark.parametrize(
    ("grid", "noise_eta", "ranges"),
    [
        (GRID, 1.0, [(10, 219), (220, 800)]),
        ([440, 12, 10], 0.0, [(11, 11), (13, 800)]),  # outputs without noise have no score: from above them
        (GRIDS, 1.0, [(5, 800), (10, 219), (220, 800), (5, 109), (110, 219), (220, 329), (330, 800)]),
    ],
)
def test_random_levels_of_a_layer_lie_between_its_ends_and_of_the_first_above_too(unet, grid, noise_eta, ranges):
    bridge = bridge_of(unet, grid, noise_eta=noise_eta)
    for t, (low, high) in enumerate(ranges):
        levels = bridge.sample_level(torch.full((4000,), t), torch.Generator().manual_seed(0))
        assert low <= levels.min() < low + 5
        assert high - 5 < levels.max() <= high
        assert levels.float().mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_random_levels_move_no_double_to_an_apple_gpu(bridge):
    """Here a tensor on the CPU that calls itself one of MPS. The draws are those of a seed as ever."""

    class OnMPS(torch.Tensor):
        device = torch.device("mps")

    class NoDoubles(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to and args[1] == OnMPS.device:
                assert args[0].dtype != torch.float64
                return args[0]
            return func(*args, **(kwargs or {}))

    t = torch.tensor([0, 1, 1, 0])
    with NoDoubles():
        levels = bridge.sample_level(t.as_subclass(OnMPS), torch.Generator().manual_seed(0))
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, size = torch.tensor([10, 220])[t], torch.tensor([210, 581])[t]
    assert torch.equal(levels.as_subclass(torch.Tensor), low + (uniform * size).long())


@pytest.mark.parametrize(
    ("grid", "settings", "message"),
    [
        (GRID, {"level_range": (5, 1000)}, r"level_range=\(5, 1000\): give two timesteps in order, from 0 to 999"),
        ([900, 600, 0], {"level_range": (5, 500)}, "a layer ends at timestep 600, above 500, .* a lower start"),
        (GRID, {"level_range": (220, 800)}, "starts at timestep 220, .* drawn from 220 on: .* level_min below 220"),
        ([800, 400, -1], {}, "the grid ends at -1"),
        ([[440, 0], [800, 400, -1]], {}, "the grid ends at -1"),
        (GRID, {"kernel": "renoise"}, "kernel='renoise' of the scheduler is for sampling: make one with kernel 'ddim'"),
        ([440, 11, 10], {"noise_eta": 0.0}, "noise_eta=0 needs a level between the ends of each layer: take fewer"),
    ],
)
def test_bridges_that_cannot_score_a_layer_are_refused(unet, grid, settings, message):
    with pytest.raises(ValueError, match=message):
        bridge_of(unet, grid, **settings).check_levels()


def test_weights_are_powers_of_sigma(bridge):
    level = torch.tensor([5, 800])
    abar = DDPMScheduler().alphas_cumprod[level]
    torch.testing.assert_close(bridge.weight(sigma_power=4)(level), (1 - abar) ** 2)


# ----- laws at other levels -----


def test_layers_are_diffused_to_higher_levels_and_to_their_own_stay_as_they_are(unet):
    bridge, t, noise = bridge_of(unet, noise_eta=0.7), torch.tensor([1, 0]), torch.randn(2, 1, 8, 8)
    q = layers_of(bridge)(torch.randn(2, 1, 8, 8), t).detach()
    own, kept = bridge.place(q, t, bridge.level(t), noise)
    assert kept is noise
    torch.testing.assert_close(own.mean, q.mean)
    torch.testing.assert_close(own.std, q.std, rtol=1e-3, atol=1e-4)
    level, abar = torch.tensor([300, 300]), bridge.scheduler.alphas_cumprod
    moved, _ = bridge.place(q, t, level, noise)
    ratio = (abar[level] / abar[bridge.level(t)]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(moved.mean, ratio.sqrt() * q.mean)
    torch.testing.assert_close(moved.std**2, ratio * q.std**2 + 1 - ratio, rtol=1e-3, atol=1e-4)
    still = layers_of(bridge_of(unet, noise_eta=0.0))(torch.randn(2, 1, 8, 8), t)
    law, _ = bridge_of(unet, noise_eta=0.0).place(still, t, level, noise)
    assert float(still.std.max()) == 0 < float(law.std.min())


@pytest.fixture
def between(unet):
    """A bridge whose rows below the first layer are all scored between the ends of the layer."""
    return bridge_of(unet, noise_eta=0.7, between_share=1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("grid", "t"), [(GRID, [0, 0, 0]), (GRIDS, [1, 3, 4, 5])])
def test_between_its_ends_a_layer_is_scored_where_one_that_ends_there_would_draw(unet, grid, t, prediction_type):
    bridge = bridge_of(unet, grid, noise_eta=0.7, between_share=1.0, prediction_type=prediction_type)
    scheduler, t = bridge.scheduler, torch.tensor(t)
    low, tau = scheduler.output_level(t), scheduler.input_level(t)
    x_next, noise = torch.randn(2, len(t), 1, 8, 8)
    for level in (low, (low + tau) // 2, tau - 1):
        with torch.no_grad():
            model_output = unet(x_next, tau).sample
            law, kept = bridge.place(layers_of(bridge)(x_next, t), t, level, noise, x_next)
        mean, std = scheduler.transition(model_output, tau, x_next, prev_level=level)
        torch.testing.assert_close(law.rsample(kept), mean + std * noise, rtol=1e-4, atol=1e-4)
        x0, _ = scheduler.predict(model_output, tau, x_next)
        alpha, sigma = scheduler.alpha_sigma(level, x0)
        torch.testing.assert_close(law.mean, alpha * x0, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(law.std, sigma)


def test_only_the_clean_image_of_a_draw_between_has_a_gradient(between):
    t, level, shape = torch.zeros(2, dtype=torch.long), torch.tensor([60, 180]), (2, 1, 8, 8)
    x0, x_next = torch.randn(shape, requires_grad=True), torch.randn(shape)
    scheduler, tau = between.scheduler, torch.full((2,), 220)
    alpha, sigma = scheduler.alpha_sigma(tau, x0)
    mean, std = scheduler.transition((x_next - alpha * x0) / sigma, tau, x_next)
    law, kept = between.place(DiagonalGaussian(mean, std), t, level, torch.randn(shape), x_next)
    (gradient,) = torch.autograd.grad(law.rsample(kept).sum(), x0)
    torch.testing.assert_close(gradient, scheduler.alpha_sigma(level, x0)[0].expand(shape), rtol=1e-4, atol=1e-5)


def test_the_first_layer_and_levels_above_an_input_are_scored_as_at_random_levels(unet, between):
    t, level = torch.tensor([1, 1, 0]), torch.tensor([230, 700, 300])
    x_next, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    q = layers_of(between)(x_next, t).detach()
    law, kept = between.place(q, t, level, noise, x_next)
    fresh, _ = bridge_of(unet, noise_eta=0.7).place(q, t, level, noise)
    torch.testing.assert_close(law.mean, fresh.mean)
    torch.testing.assert_close(law.std, fresh.std.expand_as(law.std))
    assert torch.equal(kept, noise)


def test_between_two_ends_of_a_true_layer_are_draws_of_the_bridge(unet):
    """Data N(0, 1/4), a layer that draws x0 from the data given its input: x_s is N(0, alpha_s^2 / 4 + sigma_s^2)."""
    bridge = bridge_of(unet, between_share=1.0)
    scheduler, random = bridge.scheduler, torch.Generator().manual_seed(0)
    shape, tau = (4000, 1, 8, 8), torch.full((4000,), 220)
    x0, eps, z = (torch.randn(shape, generator=random) for _ in range(3))
    alpha, sigma = scheduler.alpha_sigma(tau, x0)
    x_next = alpha * 0.5 * x0 + sigma * eps  # x0 and eps given x_next are as likely as any other pair
    t, level = torch.zeros(4000, dtype=torch.long), torch.full((4000,), 120)
    law, kept = bridge.place(DiagonalGaussian(*scheduler.transition(eps, tau, x_next)), t, level, z, x_next)
    x = law.rsample(kept)
    alpha_s, sigma_s = (value[0].item() for value in scheduler.alpha_sigma(level, x))
    assert x.var().item() == pytest.approx(alpha_s**2 / 4 + sigma_s**2, rel=0.01)
    score = law.score(x)  # its mean given x is the score of the marginal, -x / variance
    assert (score * x).mean().item() == pytest.approx(-1, rel=0.01)


def test_a_share_of_the_rows_is_scored_between_and_needs_the_input(unet):
    bridge, shape = bridge_of(unet, between_share=0.3), (1000, 1, 8, 8)
    t, x_next, noise = torch.zeros(1000, dtype=torch.long), torch.randn(shape), torch.randn(shape)
    q = DiagonalGaussian(torch.randn(shape), torch.ones(1000, 1, 1, 1))
    level = torch.full((1000,), 100)
    _, kept = bridge.place(q, t, level, noise, x_next, torch.Generator().manual_seed(0))
    assert (kept != noise).flatten(1).any(1).float().mean().item() == pytest.approx(0.3, abs=0.05)
    with pytest.raises(ValueError, match="between_share=0.3 needs the input of the layers: give x_next"):
        bridge.place(q, t, level, noise)
