import itertools
import json
import math

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from hsivi_diffusers.distillation.student import label_layers
from hsivi_diffusers.teachers.denoisers import num_classes, signal_timestep
from hsivi_diffusers.teachers.ode import use_grid
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from gaussian_teacher import MEAN, STD, GaussianTeacher
from hsivi_diffusers import (
    HSIVINoiseScale,
    HSIVIPipeline,
    HSIVIScheduler,
    TeacherBridge,
    UNetCritic,
    UNetLayers,
    load_teacher,
)
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.networks import make_scheduler
from hsivi_diffusers.distillation.pairs import TeacherPairs, image_loss, pair_levels
from hsivi_diffusers.teachers.configs import read_configs
from hsivi_diffusers.vi import DiagonalGaussian, KullbackLeibler, ScoreMatching, draw_layer
from hsivi_diffusers.vi.regression import half_square
from tiny_unet import make_unet

GRID = [440, 220, 10]


@pytest.fixture
def bridge(unet):
    return TeacherBridge(unet, HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0))


def test_the_bridge_score_is_minus_noise_over_sigma(unet, bridge):
    x, level = torch.randn(3, 1, 8, 8), torch.tensor([10, 220, 700])
    sigma = (1 - DDPMScheduler().alphas_cumprod[level]).sqrt().reshape(3, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(bridge.score(x, level), -unet(x, level).sample / sigma)


def test_the_critic_starts_as_the_teacher(unet, bridge):
    critic = UNetCritic(unet, bridge.scheduler)
    x, level = torch.randn(3, 1, 8, 8), torch.tensor([10, 220, 700])
    assert torch.equal(critic(x, level), bridge.score(x, level))


@pytest.mark.parametrize("classes", [None, 3])
def test_a_critic_that_is_told_the_layer_starts_as_the_unet_for_each(classes):
    unet = make_unet(num_class_embeds=classes).eval()
    labelled = label_layers(unet, 4)
    critic = UNetCritic(labelled, HSIVIScheduler(), num_layers=4)
    x, timestep, t = torch.randn(4, 1, 8, 8), torch.tensor([10, 220, 700, 999]), torch.tensor([0, 1, 3, 2])
    condition = None if classes is None else torch.tensor([2, 0, 1, 1])
    plain = UNetCritic(unet, HSIVIScheduler())(x, timestep, condition)
    torch.testing.assert_close(critic(x, timestep, condition, t), plain)
    with torch.no_grad():
        labelled.class_embedding.weight[3 if classes is None else 4 * 1 + 3] += 1
    told = critic(x, timestep, condition, t)
    assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(told, plain, strict=True)] == [True, True, False, True]


def test_what_is_no_class_number_leaves_no_place_for_the_layer():
    unet = make_unet(class_embed_type="timestep")
    with pytest.raises(
        ValueError, match="class_embed_type='timestep' of the unet leaves no place .* train one number of steps"
    ):
        label_layers(unet, 2)


def test_a_critic_that_tells_layers_apart_needs_the_layer():
    critic = UNetCritic(label_layers(make_unet(), 2), HSIVIScheduler(), num_layers=2)
    with pytest.raises(ValueError, match="t is missing: this critic tells 2 layers apart"):
        critic(torch.randn(1, 1, 8, 8), torch.tensor([10]))


def test_layers_are_the_transition_that_step_makes(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    layers = UNetLayers(unet, scheduler)
    assert layers.num_layers == 2
    x_next, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        q = layers(x_next, torch.ones(4, dtype=torch.long))
        stepped = scheduler.step(unet(x_next, torch.full((4,), 440)).sample, 440, x_next, variance_noise=noise)
    assert torch.equal(q.rsample(noise), stepped.prev_sample)


def test_layers_use_the_learned_noise_scale(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale_type="per_pixel", noise_eta=1.0)
    noise_scale = HSIVINoiseScale(sample_shape=(1, 8, 8))
    layers = UNetLayers(unet, scheduler, noise_scale)
    q = layers(torch.randn(4, 1, 8, 8), torch.ones(4, dtype=torch.long))
    q.rsample(torch.ones(4, 1, 8, 8)).sum().backward()
    torch.testing.assert_close(noise_scale.log_scale.grad, 4 * q.std.detach().mean() * torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("grids", [[440, 220, 10], [[440, 10], [440, 220, 10]]])
def test_last_layers_are_clipped_in_value_and_not_in_gradient(unet, grids):
    """Each grid has a last layer: of one grid layer 0, of a first of T = 1 and a second of T = 2 layers 0 and 1."""
    scheduler = HSIVIScheduler(layer_timesteps=grids, noise_eta=0.7)
    x, t = 3 * torch.randn(6, 1, 8, 8), torch.arange(6) % sum(scheduler.depths)
    plain, clipped = (UNetLayers(unet, scheduler, clip_images=clip)(x, t) for clip in (False, True))
    is_last = t < len(scheduler.depths)
    assert plain.mean[is_last].abs().max() > 1
    torch.testing.assert_close(clipped.mean[is_last], plain.mean[is_last].clamp(-1, 1))
    assert torch.equal(clipped.mean[~is_last], plain.mean[~is_last])
    assert torch.equal(clipped.std, plain.std)
    weight = torch.randn(6, 1, 8, 8)
    gradients = [torch.autograd.grad((weight * q.mean).sum(), list(unet.parameters())) for q in (plain, clipped)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_that_start_at_pure_noise_have_finite_values_and_gradients(unet):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = HSIVIScheduler(layer_timesteps=[999, 500, 0], noise_eta=1.0, **schedule)
    q = UNetLayers(unet, scheduler)(torch.randn(2, 1, 8, 8), torch.ones(2, dtype=torch.long))
    assert q.mean.isfinite().all()
    assert (q.std.isfinite() & (q.std > 0)).all()
    q.rsample(torch.randn(2, 1, 8, 8)).square().sum().backward()
    gradients = [parameter.grad for parameter in unet.parameters()]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_levels_of_the_bridge_are_the_grid_and_the_clock(bridge):
    assert bridge.level(torch.tensor([0, 1])).tolist() == [10, 220]
    assert bridge.sample_base(5, torch.Generator().manual_seed(0)).shape == (5, 1, 8, 8)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 16, 64)])
@given(signal=st.floats(1e-3, 1e3))
def test_the_signal_is_the_first_that_is_as_low_as_asked_for(shape, signal):
    schedule = HSIVIScheduler()
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    signals = (math.prod(shape) * snr).sqrt().tolist()
    found = signal_timestep(schedule, shape, signal)
    assert found == 999 or signals[found] <= signal * (1 + 1e-6)
    assert found == 0 or signals[found - 1] >= signal * (1 - 1e-6)


def test_a_student_of_a_rectified_flow_starts_at_pure_noise():
    schedule = HSIVIScheduler(prediction_type="flow_prediction", shift=3.0)
    for config in (HSIVIConfig(num_inference_steps=4), HSIVIConfig(num_inference_steps=1)):
        student = make_scheduler(schedule, config, (1, 8, 8))
        assert (student.timesteps[0], student.layers.grid[-1]) == (1000.0, 0)
    make_scheduler(schedule, HSIVIConfig(start_timestep=999), (1, 8, 8))
    for start in ({"start_timestep": 800}, {"start_signal": 5.0}, {"start_noise": 2.0}):
        with pytest.raises(ValueError, match="a student of a rectified flow starts at 999, pure noise"):
            make_scheduler(schedule, HSIVIConfig(**start), (1, 8, 8))


def test_the_end_of_a_clock_without_any_signal_is_left_out():
    schedule = HSIVIScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[999] == 0 < schedule.alphas_cumprod[998]
    assert signal_timestep(schedule, (3, 8, 8), 1e-6) == 998


def test_layers_are_diffused_to_higher_levels_and_to_their_own_stay_as_they_are(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_eta=0.7)
    bridge, t, noise = TeacherBridge(unet, scheduler), torch.tensor([1, 0]), torch.randn(2, 1, 8, 8)
    q = UNetLayers(unet, scheduler)(torch.randn(2, 1, 8, 8), t).detach()
    own, kept = bridge.place(q, t, bridge.level(t), noise)
    assert kept is noise
    torch.testing.assert_close(own.mean, q.mean)
    torch.testing.assert_close(own.std, q.std, rtol=1e-3, atol=1e-4)
    level = torch.tensor([300, 300])
    moved, _ = bridge.place(q, t, level, noise)
    ratio = (scheduler.alphas_cumprod[level] / scheduler.alphas_cumprod[bridge.level(t)]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(moved.mean, ratio.sqrt() * q.mean)
    torch.testing.assert_close(moved.std**2, ratio * q.std**2 + 1 - ratio, rtol=1e-3, atol=1e-4)


def test_random_levels_of_a_layer_lie_between_its_ends_and_of_the_first_above_too(bridge):
    for t, (low, high) in enumerate([(10, 219), (220, 800)]):
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


def test_layers_without_noise_are_scored_above_their_output(unet):
    bridge = TeacherBridge(unet, HSIVIScheduler(layer_timesteps=[440, 12, 10], noise_eta=0.0))
    for t, (low, high) in enumerate([(11, 11), (13, 800)]):
        levels = bridge.sample_level(torch.full((4000,), t), torch.Generator().manual_seed(0))
        assert (levels.min() - low, levels.max() <= high) == (0, True)
        q = UNetLayers(unet, bridge.scheduler)(torch.randn(2, 1, 8, 8), torch.tensor([t, t]))
        law, _ = bridge.place(q, torch.tensor([t, t]), levels[:2], torch.randn(2, 1, 8, 8))
        assert float(q.std.max()) == 0 < float(law.std.min())
    bridge = TeacherBridge(unet, HSIVIScheduler(layer_timesteps=[440, 11, 10], noise_eta=0.0))
    with pytest.raises(ValueError, match="noise_eta=0 needs a level between the ends of each layer: take fewer steps"):
        bridge.sample_level(torch.tensor([0]))


def test_weights_are_powers_of_sigma(bridge):
    level = torch.tensor([5, 800])
    abar = DDPMScheduler().alphas_cumprod[level]
    torch.testing.assert_close(bridge.weight(sigma_power=4)(level), (1 - abar) ** 2)


def test_score_matching_reaches_the_student_through_frozen_networks(unet, bridge):
    student = UNetLayers(make_unet(), bridge.scheduler)
    critic = UNetCritic(make_unet(), bridge.scheduler).requires_grad_(False)
    t = torch.tensor([0, 1])
    draw = draw_layer(student(torch.randn(2, 1, 8, 8), t), t, bridge)
    ScoreMatching().layer_loss(critic, bridge, draw).sum().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert any(bool(parameter.grad.abs().sum() > 0) for parameter in student.parameters())


def test_conditions_reach_teacher_student_and_critic():
    unet = make_unet(num_class_embeds=3).eval()
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 0])
    one, two = torch.tensor([0, 1]), torch.tensor([0, 2])
    for player in (TeacherBridge(unet, scheduler).score, UNetCritic(unet, scheduler)):
        first, second = player(x, t, one), player(x, t, two)
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])
    layers = UNetLayers(unet, scheduler)
    assert not torch.equal(layers(x, t, one).mean[1], layers(x, t, two).mean[1])


def test_bad_bridges_are_refused(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    with pytest.raises(ValueError, match=r"level_range=\(5, 1000\): give two timesteps in order, from 0 to 999"):
        TeacherBridge(unet, scheduler, level_range=(5, 1000))
    high = TeacherBridge(unet, HSIVIScheduler(layer_timesteps=[900, 600, 0]), level_range=(5, 500))
    with pytest.raises(ValueError, match="ends at timestep 600, above the random levels up to 500: start the grid"):
        high.sample_level(torch.tensor([0]))
    late = TeacherBridge(unet, HSIVIScheduler(layer_timesteps=GRID), level_range=(220, 800))
    with pytest.raises(ValueError, match="random levels start at 220, above the levels of the last layer"):
        late.sample_level(torch.tensor([0]))
    for grids in ([800, 400, -1], [[440, 0], [800, 400, -1]]):
        with pytest.raises(ValueError, match="the grid ends at -1"):
            TeacherBridge(unet, HSIVIScheduler(layer_timesteps=grids))
    with pytest.raises(
        ValueError, match="kernel='renoise' of the scheduler is for sampling: make one with kernel 'ddim'"
    ):
        TeacherBridge(unet, HSIVIScheduler(layer_timesteps=GRID, kernel="renoise"))


# ----- several grids -----

GRIDS = [[440, 330, 220, 110, 0], [500, 0], [440, 220, 10]]  # for 4, 1 and 2 steps


def test_levels_and_layers_are_counted_over_all_grids(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS)
    bridge, layers = TeacherBridge(unet, scheduler), UNetLayers(unet, scheduler)
    assert bridge.num_layers == layers.num_layers == 7
    assert bridge.level(torch.arange(7)).tolist() == [0, 10, 220, 0, 110, 220, 330]


def test_random_levels_of_a_layer_lie_within_its_grid(unet):
    bridge = TeacherBridge(unet, HSIVIScheduler(layer_timesteps=GRIDS, noise_eta=1.0), level_range=(5, 800))
    t = torch.arange(7).repeat(2000)
    levels = bridge.sample_level(t, torch.Generator().manual_seed(0))
    ranges = [(5, 800), (10, 219), (220, 800), (5, 109), (110, 219), (220, 329), (330, 800)]
    for layer, (low, high) in enumerate(ranges):
        own = levels[t == layer]
        assert own.min() >= low
        assert own.max() <= high
        assert own.float().mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low))


def test_a_layer_of_several_grids_is_that_of_its_grid_alone(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS, noise_eta=1.0, noise_scale=0.7)
    layers, t = UNetLayers(unet, scheduler), torch.arange(7)
    x_next, noise = torch.randn(2, 7, 1, 8, 8)
    with torch.no_grad():
        x = layers(x_next, t).rsample(noise)
        for grid, rows in zip(scheduler.trained_grids, t.split(scheduler.depths), strict=True):
            alone = HSIVIScheduler(layer_timesteps=grid, noise_eta=1.0, noise_scale=0.7)
            own = torch.arange(len(rows))
            torch.testing.assert_close(x[rows], UNetLayers(unet, alone)(x_next[rows], own).rsample(noise[rows]))


@pytest.mark.parametrize("scoring", ["own", "random", "between"])
@pytest.mark.parametrize("learned", ["config", "per_pixel"])
@pytest.mark.parametrize("objective", [ScoreMatching(), KullbackLeibler()], ids=["SM", "KL"])
def test_every_layer_of_several_grids_has_a_gradient(unet, scoring, learned, objective):
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS, noise_eta=1.0, noise_scale_type=learned)
    scale = {"config": None, "per_pixel": HSIVINoiseScale(sample_shape=(1, 8, 8))}
    bridge = TeacherBridge(unet, scheduler, between_share=0.5 if scoring == "between" else 0.0)
    student = UNetLayers(make_unet(), scheduler, scale[learned])
    critic = UNetCritic(make_unet(), scheduler).requires_grad_(False)
    for layer in range(7):
        t = torch.full((2,), layer)
        x_next = torch.randn(2, 1, 8, 8)
        random = torch.Generator().manual_seed(layer)
        draw = draw_layer(
            student(x_next, t),
            t,
            bridge,
            x_next=x_next,
            scoring="own" if scoring == "own" else "random",
            generator=random,
        )
        student.zero_grad()
        objective.layer_loss(critic, bridge, draw).sum().backward()
        gradients = [parameter.grad for parameter in student.parameters()]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


# ----- loading -----


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler_class"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_a_teacher_is_loaded_with_its_schedule(unet, tmp_path, pipeline_class, scheduler_class):
    scheduler = scheduler_class(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline_class(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    loaded, schedule = load_teacher(str(tmp_path))
    assert schedule.config.prediction_type == "v_prediction"
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))


def test_a_missing_folder_is_told_before_the_hub_is_asked(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: give a folder or repo id"):
        load_teacher(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is not a folder"):
        load_teacher("./nothing")


def test_a_mistyped_folder_is_refused_with_the_one_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "digits_ddpm").mkdir()
    monkeypatch.chdir(tmp_path)
    for load in (load_teacher, lambda name: read_configs(name, None)):
        with pytest.raises(ValueError, match="'digit_ddpm' is no folder here.*; did you mean digits_ddpm\\?"):
            load("digit_ddpm")


def test_a_repo_that_cannot_be_reached_is_told():
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder here, and was not loaded from the Hub"):
        load_teacher("nobody/nothing")


def test_an_empty_folder_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match=f"teacher '{tmp_path}' cannot be loaded"):
        load_teacher(str(tmp_path))


def test_a_damaged_teacher_is_refused(teacher_folder):
    weights = teacher_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(teacher_folder))


def test_a_teacher_of_a_rectified_flow_is_loaded_unless_its_levels_depend_on_the_image(unet, tmp_path):
    for name, options in (("static", {"shift": 3.0}), ("dynamic", {"use_dynamic_shifting": True})):
        DDPMPipeline(unet=unet, scheduler=FlowMatchEulerDiscreteScheduler(**options)).save_pretrained(tmp_path / name)
    _, schedule = load_teacher(str(tmp_path / "static"))
    assert (schedule.is_flow, schedule.config.shift) == (True, 3.0)
    with pytest.raises(ValueError, match="its FlowMatchEulerDiscreteScheduler has use_dynamic_shifting, so its noise"):
        load_teacher(str(tmp_path / "dynamic"))


@pytest.mark.parametrize(
    ("scheduler", "left_out"),
    [
        (DDPMScheduler(), {"beta_start", "trained_betas", "beta_end", "beta_schedule"}),
        (FlowMatchEulerDiscreteScheduler(), {"shift", "use_dynamic_shifting"}),
        (DPMSolverMultistepScheduler(), {"prediction_type", "use_flow_sigmas", "num_train_timesteps"}),
    ],
    ids=["betas", "flow", "solver"],
)
def test_a_config_that_leaves_defaults_out_is_read_as_diffusers_reads_it(teacher_folder, scheduler, left_out):
    named = {"scheduler": ["diffusers", type(scheduler).__name__], "feature_extractor": []}
    for file, change in (("model_index.json", named), ("unet/config.json", {})):
        content = {**json.loads((teacher_folder / file).read_text()), **change}
        content.pop("out_channels" if "unet" in file else "", None)
        (teacher_folder / file).write_text(json.dumps(content))
    config = {name: value for name, value in scheduler.config.items() if name not in left_out}
    (teacher_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="takes 1 channels and returns 3"):  # the default of a UNet2DModel
        load_teacher(str(teacher_folder))
    unet = teacher_folder / "unet" / "config.json"
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "out_channels": 1}))
    assert len(load_teacher(str(teacher_folder))[1]) == 1000


def test_another_kind_of_unet_is_refused(tmp_path):
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unet of type UNet2DConditionModel, a UNet2DModel is needed"):
        load_teacher(str(tmp_path))


def test_a_teacher_of_zero_terminal_snr_is_loaded_unless_it_predicts_noise(unet, tmp_path):
    for prediction_type in ("v_prediction", "epsilon"):
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / prediction_type)
    _, schedule = load_teacher(str(tmp_path / "v_prediction"))
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert schedule.alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="rescale_betas_zero_snr goes with prediction_type 'v_prediction' or 'sample'"):
        load_teacher(str(tmp_path / "epsilon"))


def test_a_schedule_that_cannot_be_rebuilt_is_refused(unet, tmp_path):
    DDPMPipeline(unet=unet, scheduler=CogVideoXDDIMScheduler(snr_shift_scale=3.0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="noise levels of its CogVideoXDDIMScheduler cannot be rebuilt from its betas"):
        load_teacher(str(tmp_path))


def test_a_latent_teacher_is_refused(unet, tmp_path):
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, num_vq_embeddings=8)
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LDMPipeline with vqvae"):
        load_teacher(str(tmp_path))


def test_a_distilled_sampler_is_no_teacher(unet, tmp_path):
    HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(layer_timesteps=GRID)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a sampler that was distilled: give the teacher it had"):
        load_teacher(str(tmp_path))


def test_a_unet_and_a_scheduler_that_disagree_are_refused(tmp_path):
    for name, options, message in (
        ("channels", {"out_channels": 3}, "takes 1 channels and returns 3"),
        ("clock", {"num_train_timesteps": 500}, "made for 500 timesteps, the scheduler counts 1000"),
        ("time", {"class_embed_type": "timestep"}, "class_embed_type='timestep' and num_class_embeds=None of the unet"),
        ("vector", {"class_embed_type": "identity", "num_class_embeds": 4}, "takes what is no class label: give a te"),
    ):
        path = tmp_path / name
        DDPMPipeline(unet=make_unet(**options), scheduler=DDPMScheduler()).save_pretrained(path)
        with pytest.raises(ValueError, match=message):
            load_teacher(str(path))
    unet = make_unet(class_embed_type="timestep", num_class_embeds=4)
    assert num_classes(load_teacher(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))[0]) == 4


@pytest.fixture
def between(unet):
    """A bridge whose rows below the first layer are all scored between the ends of the layer."""
    return TeacherBridge(unet, HSIVIScheduler(layer_timesteps=GRID, noise_eta=0.7), between_share=1.0)


def test_between_its_ends_a_layer_is_scored_where_one_that_ends_there_would_draw(unet, between):
    scheduler, t, level = between.scheduler, torch.tensor([0, 0, 0]), torch.tensor([10, 150, 219])
    x_next, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        model_output = unet(x_next, torch.full((3,), 220)).sample
        law, kept = between.place(UNetLayers(unet, scheduler)(x_next, t), t, level, noise, x_next)
    mean, std = scheduler.transition(model_output, torch.full((3,), 220), x_next, prev_level=level)
    torch.testing.assert_close(law.rsample(kept), mean + std * noise, rtol=1e-4, atol=1e-4)
    x0, _ = scheduler.predict(model_output, torch.full((3,), 220), x_next)
    alpha, sigma = scheduler.alpha_sigma(level, x0)
    torch.testing.assert_close(law.mean, alpha * x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.std, sigma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_layers_of_several_grids_are_scored_between_their_own_ends(unet, prediction_type):
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS, noise_eta=1.0, prediction_type=prediction_type)
    bridge, layers = TeacherBridge(unet, scheduler, between_share=1.0), UNetLayers(unet, scheduler)
    t = torch.tensor([1, 3, 4, 5])  # below the first of each grid
    tau, x_next, noise = scheduler.input_level(t), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    timestep = (scheduler.output_level(t) + tau) // 2
    with torch.no_grad():
        model_output = unet(x_next, tau).sample
        law, kept = bridge.place(layers(x_next, t), t, timestep, noise, x_next)
    mean, std = scheduler.transition(model_output, tau, x_next, prev_level=timestep)
    torch.testing.assert_close(law.rsample(kept), mean + std * noise, rtol=1e-4, atol=1e-4)


def test_only_the_clean_picture_of_a_draw_between_has_a_gradient(between):
    t, level, shape = torch.zeros(2, dtype=torch.long), torch.tensor([60, 180]), (2, 1, 8, 8)
    x0 = torch.randn(shape, requires_grad=True)
    x_next = torch.randn(shape)
    scheduler, tau = between.scheduler, torch.full((2,), 220)
    alpha, sigma = scheduler.alpha_sigma(tau, x0)
    model_output = (x_next - alpha * x0) / sigma
    mean, std = scheduler.transition(model_output, tau, x_next)
    law, kept = between.place(DiagonalGaussian(mean, std), t, level, torch.randn(shape), x_next)
    (gradient,) = torch.autograd.grad(law.rsample(kept).sum(), x0)
    torch.testing.assert_close(gradient, scheduler.alpha_sigma(level, x0)[0].expand(shape), rtol=1e-4, atol=1e-5)


def test_the_first_layer_and_levels_above_an_input_are_scored_as_at_random_levels(unet, between):
    t, level = torch.tensor([1, 1, 0]), torch.tensor([230, 700, 300])
    x_next, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    q = UNetLayers(unet, between.scheduler)(x_next, t).detach()
    law, kept = between.place(q, t, level, noise, x_next)
    fresh, _ = TeacherBridge(unet, between.scheduler).place(q, t, level, noise)
    torch.testing.assert_close(law.mean, fresh.mean)
    torch.testing.assert_close(law.std, fresh.std.expand_as(law.std))
    assert torch.equal(kept, noise)


def test_between_two_ends_of_a_true_layer_are_draws_of_the_bridge(unet):
    """Data N(0, 1/4), a layer that draws x0 from the data given its input: x_s is N(0, alpha_s^2 / 4 + sigma_s^2)."""
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0)
    bridge = TeacherBridge(unet, scheduler, between_share=1.0)
    random = torch.Generator().manual_seed(0)
    shape, tau = (4000, 1, 8, 8), torch.full((4000,), 220)
    x0, eps, z = (torch.randn(shape, generator=random) for _ in range(3))
    alpha, sigma = scheduler.alpha_sigma(tau, x0)
    x_next = alpha * 0.5 * x0 + sigma * eps  # x0 and eps given x_next are as likely as any other pair
    t, level = torch.zeros(4000, dtype=torch.long), torch.full((4000,), 120)
    mean, std = scheduler.transition(eps, tau, x_next)
    law, kept = bridge.place(DiagonalGaussian(mean, std), t, level, z, x_next)
    x = law.rsample(kept)
    alpha_s, sigma_s = (value[0].item() for value in scheduler.alpha_sigma(level, x))
    variance = alpha_s**2 / 4 + sigma_s**2
    assert x.var().item() == pytest.approx(variance, rel=0.01)
    score = law.score(x)  # its mean given x is the score of the marginal, -x / variance
    assert (score * x).mean().item() == pytest.approx(-1, rel=0.01)


def test_a_share_of_the_rows_is_scored_between(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0)
    bridge = TeacherBridge(unet, scheduler, between_share=0.3)
    t, shape = torch.zeros(1000, dtype=torch.long), (1000, 1, 8, 8)
    x_next, noise = torch.randn(shape), torch.randn(shape)
    q = DiagonalGaussian(torch.randn(shape), torch.ones(1000, 1, 1, 1))
    _, kept = bridge.place(q, t, torch.full((1000,), 100), noise, x_next, torch.Generator().manual_seed(0))
    assert (kept != noise).flatten(1).any(1).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_rows_that_keep_to_their_input_need_it(between):
    q, t = DiagonalGaussian(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 1, 1)), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="between_share=1.0 needs the input of the layers: give x_next"):
        draw_layer(q, t, between, scoring="random")


def test_the_coarse_part_of_an_image_counts_more_and_the_rest_as_before():
    """On 8x8 pixels its fields have 2x2: what is constant there is coarse, what has mean 0 in each is not."""
    fields = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    coarse = fields.repeat_interleave(2, -1).repeat_interleave(2, -2)
    fine = torch.randn(2, 3, 8, 4, dtype=torch.float64).repeat_interleave(2, -1)
    fine[..., 1::2] *= -1
    expected = 0.5 * (8 * coarse.square() + fine.square()).sum((1, 2, 3))
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0)
    t = torch.tensor([0, 1])
    ends = scheduler.input_level(t), fine, scheduler.output_level(t)
    share = scheduler.layers.coefficients(*ends).image_share
    torch.testing.assert_close(image_loss(scheduler, 7.0)(share * (coarse + fine), t), expected)
    torch.testing.assert_close(image_loss(scheduler)(share * fine, t), half_square(fine))


def test_the_loss_of_pairs_is_in_image_units_whatever_the_layer():
    """A clean image that is off by d in each value costs d^2/2 a value, for each layer of grids of 1, 2 and 4 steps."""
    scheduler = HSIVIScheduler(layer_timesteps=[[440, 0], [440, 220, 0], [440, 330, 220, 110, 0]], noise_eta=1.0)
    t = torch.arange(7)
    x, x0 = torch.randn(2, 7, 1, 8, 8)
    layer = scheduler.layers.coefficients(scheduler.input_level(t), x, scheduler.output_level(t))
    mean, moved = (layer.mean(clean, layer.noise_in(x, clean)) for clean in (x0, x0 + 0.1))
    torch.testing.assert_close(image_loss(scheduler)(moved - mean, t), torch.full((7,), 0.32), rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.invert(mean, x)[0], x0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescaled": True}]
)
@pytest.mark.parametrize("classes", [None, 3])
def test_pairs_are_noise_and_what_diffusers_solver_makes_of_it(settings, classes):
    unet = make_unet(num_class_embeds=classes).eval()
    if settings == {"rescaled": True}:
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config = DDPMScheduler(**settings).config
    noise, condition = torch.randn(5, 1, 8, 8), None if classes is None else torch.tensor([0, 1, 2, 0, 1])
    grid = HSIVIScheduler.from_config(config, layer_timesteps=[440, 0])
    pairs = TeacherPairs(unet, grid, noise, condition, num_calls=3, batch_size=2)
    solver, x = use_grid(UniPCMultistepScheduler.from_config(config), pair_levels(grid, 3)), noise
    solver.set_timesteps(3)
    for timestep in solver.timesteps:
        with torch.no_grad():
            x = solver.step(unet(x, timestep, class_labels=condition).sample, timestep, x).prev_sample
    torch.testing.assert_close(pairs.end, x.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert not pairs.end.requires_grad


@pytest.mark.parametrize(
    "clock",
    [
        *({"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2")),
        *({"prediction_type": "flow_prediction", "shift": shift} for shift in (1.0, 3.0, 25.0)),
        *({"prediction_type": "flow_prediction", "num_train_timesteps": size, "shift": 3.0} for size in (50, 100)),
    ],
    ids=str,
)
def test_pairs_follow_the_ode_on_every_clock(clock):
    """Of N(0.3, 0.4^2) in each pixel, whose ODE leads to 0.3 + 0.4 x_T; on the linear clock "leading" has .044."""
    schedule = HSIVIScheduler(**clock, layer_timesteps=[44, 0])
    noise = torch.randn(20, 1, 8, 8).clamp(-1.7, 1.7)
    pairs = TeacherPairs(GaussianTeacher(schedule), schedule, noise)
    assert (pairs.end - MEAN - STD * noise).square().mean().sqrt() < 0.03


def test_the_grid_of_pairs_is_strict_and_ends_near_the_data_on_any_clock():
    for clock, size in (("linear", 1000), ("squaredcos_cap_v2", 1000), ("linear", 50)):
        schedule = HSIVIScheduler(beta_schedule=clock, num_train_timesteps=size)
        for calls in (1, 2, 15, size // 2):
            grid = pair_levels(schedule, calls)
            assert len(grid) == calls
            assert all(high > low for high, low in itertools.pairwise(grid))
            assert grid[0] >= 0.99 * size - 1
            assert calls == 1 or grid[-1] == size // 100
    with pytest.raises(ValueError, match="51 network calls: give from 1 to 50"):
        pair_levels(schedule, 51)


@given(size=st.integers(1, 1000), share=st.floats(0, 1), shift=st.floats(0.01, 100))
def test_the_grid_of_pairs_of_a_flow_is_strict_and_on_its_clock(size, share, shift):
    schedule = HSIVIScheduler(prediction_type="flow_prediction", num_train_timesteps=size, shift=shift)
    grid = pair_levels(schedule, 1 + int(share * (size - size // 100 - 1)))
    assert all(high > low for high, low in itertools.pairwise(grid))
    assert size > grid[0] >= grid[-1] >= 0


def test_pairs_of_a_schedule_that_the_solver_has_no_name_for_have_its_betas(unet):
    grid = HSIVIScheduler(beta_schedule="sigmoid", layer_timesteps=[440, 0])
    pairs = TeacherPairs(unet, grid, torch.randn(2, 1, 8, 8), num_calls=1)
    (only,) = pair_levels(grid, 1)
    alpha, sigma = grid.alpha_sigma(torch.tensor([only, only]), pairs.noise)
    with torch.no_grad():
        clean = (pairs.noise - sigma * unet(pairs.noise, only).sample) / alpha
    torch.testing.assert_close(pairs.end, clean.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_pairs_of_a_teacher_that_predicts_a_variance_are_those_of_its_mean():
    unet = make_unet(in_channels=3, out_channels=6).eval()
    noise = torch.randn(2, 3, 8, 8)
    pairs = TeacherPairs(unet, HSIVIScheduler(layer_timesteps=[440, 0]), noise, num_calls=3)
    whole = unet.forward
    unet.forward = lambda *given, **named: UNet2DOutput(sample=whole(*given, **named).sample[:, :3])
    mean = TeacherPairs(unet, HSIVIScheduler(layer_timesteps=[440, 0]), noise, num_calls=3)
    assert torch.equal(pairs.end, mean.end)
    assert pairs.end.shape == noise.shape


def test_pairs_are_drawn_as_pairs(unet):
    noise, condition = torch.randn(6, 1, 8, 8), None
    pairs = TeacherPairs(unet, HSIVIScheduler(layer_timesteps=[440, 0], noise_eta=1.0), noise, condition, num_calls=2)
    x, end, label = pairs.sample(torch.zeros(50, dtype=torch.long), torch.Generator().manual_seed(0))
    places = [(noise == row).flatten(1).all(1).nonzero().item() for row in x]
    assert set(places) == set(range(6))
    torch.testing.assert_close(end, pairs.end[places], atol=1e-3, rtol=0)  # alpha is nearly 1 there
    assert label is None


def test_pairs_of_a_teacher_that_draws_no_numbers_are_refused():
    unet = make_unet()
    next(unet.parameters()).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="6 of 6 pairs end in numbers that are not finite: .* take bf16"):
        TeacherPairs(unet, HSIVIScheduler(layer_timesteps=[700, 0]), torch.randn(6, 1, 8, 8), num_calls=2)


@pytest.mark.parametrize("noise_eta", [0.2, 1.0])
def test_pairs_of_several_layers_lead_each_to_its_picture(noise_eta):
    """The first layer from the noise of the pair, the others from its picture, diffused to their input."""
    grid = HSIVIScheduler(layer_timesteps=[700, 300, 0], noise_eta=noise_eta)
    unet = make_unet(num_class_embeds=6).eval()
    pairs = TeacherPairs(unet, grid, torch.randn(6, 1, 8, 8), torch.arange(6), num_calls=2)
    t = torch.arange(400) % 2
    x, end, place = pairs.sample(t, torch.Generator().manual_seed(0))
    clean, first = pairs.end[place], t == 1
    assert torch.equal(x[first], pairs.noise[place[first]])
    alpha, sigma = grid.alpha_sigma(grid.input_level(t), x)
    noise = ((x - alpha * clean) / sigma)[~first]
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    x0, _ = grid.layers.coefficients(grid.input_level(t), x, grid.output_level(t)).invert(end, x)
    torch.testing.assert_close(x0, clean, atol=1e-4, rtol=1e-4)
    # what a network that answers with the picture would have for its mean
    told = HSIVIScheduler.from_config(grid.config, prediction_type="sample", clip_sample=False)
    mean, _ = told.transition(clean, grid.input_level(t), x)
    torch.testing.assert_close(end, mean, atol=1e-5, rtol=1e-4)
