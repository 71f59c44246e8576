"""What diffusers asks of every scheduler: saving, converting, shapes, types, and no state of its own."""

import copy
import inspect
import json
import pickle
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_diffusers import HSIVIScheduler, HSIVISchedulerOutput, scheduling_hsivi
from slow import others_slow

SHAPE = (4, 3, 8, 8)
GRID = [800, 512, 288, 128, 32, 0]
SCALES = [0.5, 0.6, 0.7, 0.8, 0.9]
GRIDS = [[440, 330, 220, 110, 0], [500, 0], [440, 220, 10]]  # for 4, 1 and 2 steps
LATENT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMED = {**LATENT_BETAS, "timestep_spacing": "trailing", "clip_sample": True, "set_alpha_to_one": False}
CONVERTED = {
    "named": {"layer_timesteps": GRID, "kernel": "renoise", "noise_scale": SCALES, **NAMED},
    "several": {"layer_timesteps": GRIDS, "noise_eta": 1.0, "noise_scale": 0.7},
    "generic": {"noise_eta": 0.7, "noise_scale_type": "per_pixel", **NAMED},
    "edm": {"layer_timesteps": GRID, "edm": {"sigma_data": 1.0, "sigma_max": 120.0}},
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Without DPMSolverSDEScheduler where torchsde is not installed: a placeholder then.
STOCK = [getattr(diffusers, scheduler.name) for scheduler in KarrasDiffusionSchedulers]
STOCK = [cls for cls in STOCK if not hasattr(cls, "_backends")]


def tensors(dtype=torch.float32):
    """The same output, sample and noise at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def ready(scheduler):
    scheduler.set_timesteps(None if scheduler.config.layer_timesteps is not None else min(5, len(scheduler)))
    return scheduler


def walk(scheduler, **arguments):
    """A step from the same tensors at each timestep, stacked."""
    output, sample, noise = tensors()
    if scheduler.config.get("noise_scale_type") == "per_pixel":
        arguments["noise_scale"] = noise[:1].exp()
    steps = [scheduler.step(output, t, sample, variance_noise=noise, **arguments) for t in scheduler.timesteps]
    return torch.stack([step.prev_sample for step in steps])


def saved_and_loaded(scheduler, folder, cls=HSIVIScheduler):
    scheduler.save_pretrained(folder)
    return cls.from_pretrained(folder)


def arguments_of(scheduler):
    """The arguments of our constructor as they stand in the config, those left at their defaults too."""
    return {name: scheduler.config[name] for name in inspect.signature(HSIVIScheduler).parameters}


# ----- saving -----


@pytest.mark.parametrize(
    "options",
    [
        *({"prediction_type": name} for name in ("v_prediction", "sample")),
        *({"timestep_spacing": name} for name in ("uniform", "trailing", "leading", "linspace")),
        {"num_train_timesteps": 100, "beta_start": 0.01, "beta_end": 0.2, "beta_schedule": "sigmoid"},
        {"num_train_timesteps": 2, "trained_betas": [0.1, 0.3]},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        *CONVERTED.values(),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_saved_scheduler_loads_with_the_same_config_and_steps(options, tmp_path):
    scheduler = ready(HSIVIScheduler(**options))
    loaded = ready(saved_and_loaded(scheduler, tmp_path))
    config = dict(scheduler.config)
    del config["_use_default_values"]  # as the tests of diffusers do
    assert loaded.config == config
    assert torch.equal(walk(loaded), walk(scheduler))


def test_saving_writes_a_strict_json_and_the_code_and_nothing_else(tmp_path):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale=SCALES)
    scheduler.save_pretrained(tmp_path / "new" / "folder")
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()}
    assert sorted(files) == ["hsivi_diffusers.py", "scheduler_config.json"]
    assert files["hsivi_diffusers.py"] == Path(scheduling_hsivi.__file__).read_text()
    config = json.loads(files["scheduler_config.json"], parse_constant=pytest.fail)
    assert (config.pop("_class_name"), config.pop("_diffusers_version")) == ("HSIVIScheduler", diffusers.__version__)
    assert config == arguments_of(scheduler)


@pytest.mark.parametrize("make", [tuple, np.array, lambda numbers: [*map(np.float64, numbers)]])
@pytest.mark.parametrize(
    "options",
    [{"layer_timesteps": GRID}, {"layer_timesteps": GRID, "noise_scale": SCALES}, {"trained_betas": [0.1, 0.3]}],
)
def test_numbers_of_other_types_become_plain(make, options, tmp_path):
    given = HSIVIScheduler(**{name: make(numbers) for name, numbers in options.items()})
    plain = HSIVIScheduler(**options)
    loaded = saved_and_loaded(given, tmp_path)
    assert arguments_of(loaded) == arguments_of(saved_and_loaded(plain, tmp_path / "plain"))
    assert torch.equal(loaded.betas, plain.betas)


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor])
def test_several_grids_of_other_types_become_plain_numbers_and_one_is_itself(make, tmp_path):
    saved_and_loaded(HSIVIScheduler(layer_timesteps=tuple(map(make, GRIDS))), tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["layer_timesteps"] == GRIDS
    assert HSIVIScheduler(layer_timesteps=[make(GRID)], noise_scale=SCALES).config.layer_timesteps == GRID


def test_a_trained_sampler_has_no_setting_that_gives_way_to_the_default_of_another_class():
    """It keeps the key, though, which the tests of diffusers delete."""
    assert HSIVIScheduler(layer_timesteps=GRID).config["_use_default_values"] == []
    generic = HSIVIScheduler()
    assert "kernel" in generic.config["_use_default_values"]
    generic.register_to_config(layer_timesteps=GRID)
    assert generic.config["_use_default_values"] == []


def test_a_grid_changed_by_its_maker_does_not_change_the_scheduler():
    for grids in (list(GRID), copy.deepcopy(GRIDS)):
        scheduler, wanted = HSIVIScheduler(layer_timesteps=grids), copy.deepcopy(grids)
        (grids if grids[0] == GRID[0] else grids[0]).append(-1)
        scheduler.trained_grids[0].append(-1)
        assert scheduler.config.layer_timesteps == wanted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
@pytest.mark.parametrize("options", [{}, {"layer_timesteps": GRID, "noise_scale": SCALES}, {"layer_timesteps": GRIDS}])
def test_a_copy_steps_like_its_original_and_lives_on_its_own(copied, options):
    original = ready(HSIVIScheduler(**options))
    twin, before = copied(original), walk(original)
    assert torch.equal(walk(twin), before)
    twin.register_to_config(layer_timesteps=None, noise_scale=1.0)
    twin.set_timesteps(3)
    twin.alphas_cumprod.zero_()
    assert len(walk(twin)) == 3
    assert torch.equal(walk(ready(original)), before)


# ----- other schedulers -----


def test_the_compatible_schedulers_are_those_of_the_diffusion_pipelines_of_flows_and_of_edm():
    names = {cls.__name__ for cls in HSIVIScheduler().compatibles}
    others = {"EDMDPMSolverMultistepScheduler"}
    others |= {f"FlowMatch{kind}Scheduler" for kind in ("EulerDiscrete", "HeunDiscrete", "LCM")}
    assert names == {scheduler.name for scheduler in KarrasDiffusionSchedulers} | others


# To make those of KDPM2 takes longest; of them the levels are kept or refused below.
FAST = [cls for cls in STOCK if "KDPM2" not in cls.__name__]


@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("cls", others_slow(STOCK, *FAST))
def test_every_other_scheduler_hands_our_settings_back(cls, kind, tmp_path):
    ours = ready(HSIVIScheduler(**CONVERTED[kind]))
    other = cls.from_config(ours.config)
    for config in (other.config, saved_and_loaded(other, tmp_path, cls).config, HSIVIScheduler.load_config(tmp_path)):
        back = HSIVIScheduler.from_config(config)
        assert arguments_of(back) == arguments_of(ours)
    assert torch.equal(walk(ready(back)), walk(ours))


def have_defaults():
    """The schedulers of diffusers that are made without arguments."""
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    for cls in classes:
        parameters = [*inspect.signature(cls.__init__).parameters.values()][1:]
        can = all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in parameters)
        if can and not hasattr(cls, "_backends") and not cls.__name__.startswith("Flax"):
            yield cls


FLOWS = [cls for cls in have_defaults() if cls.__name__.startswith("FlowMatch")]


@pytest.mark.parametrize("cls", have_defaults())
def test_the_levels_of_any_scheduler_of_diffusers_are_kept_or_refused(cls, tmp_path):
    """Those of an object, whose defaults may differ from ours, and those of its file."""
    other, reason = cls(), None
    other.save_pretrained(tmp_path)
    for read in (partial(HSIVIScheduler.from_config, other.config), partial(HSIVIScheduler.from_pretrained, tmp_path)):
        try:
            ours = read()
        except ValueError as error:
            reason = str(error)
        else:
            if ours.is_flow:
                assert cls in FLOWS or cls.__name__ == "FlowMapEulerDiscreteScheduler"
                assert ours.config.shift == other.config.shift
            elif ours.is_edm:
                assert ours.config.edm == {name: other.config[name] for name in ours.config.edm}
            else:
                torch.testing.assert_close(ours.alphas_cumprod, other.alphas_cumprod, check_dtype=False)
            assert walk(ready(ours)).isfinite().all()
    assert reason is None or (cls not in {*STOCK, *FLOWS} and "not supported" in reason)


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing", "interpolation_type": "log_linear"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_the_grid_of_an_euler_scheduler_changes_no_level(options):
    """Its samples are x / alpha, and its betas those of any other."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ours = HSIVIScheduler.from_config(diffusers.EulerDiscreteScheduler(**betas, **options).config)
    common = {name: options[name] for name in ("rescale_betas_zero_snr", "prediction_type") if name in options}
    ddim = diffusers.DDIMScheduler(**betas, **common)
    torch.testing.assert_close(ours.alphas_cumprod, ddim.alphas_cumprod)
    assert ours.config.prediction_type == ddim.config.prediction_type


@pytest.mark.parametrize(
    ("cls", "options", "name"),
    [
        ("CogVideoXDDIMScheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale=3.0"),
        ("CogVideoXDPMScheduler", {}, "snr_shift_scale=3.0"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("FlowMatchLCMScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_a_setting_that_changes_levels_and_is_not_read_is_refused(cls, options, name, tmp_path):
    other = getattr(diffusers, cls)(**options)
    for refused in (partial(HSIVIScheduler.from_config, other.config), partial(saved_and_loaded, other, tmp_path)):
        with pytest.raises(ValueError, match=f"{name}.*: noise levels with this setting are not supported"):
            refused()


@pytest.mark.parametrize(
    "other",
    [
        diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0, prediction_type="sample", rescale_betas_zero_snr=True),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        DDPMScheduler(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()),
    ],
)
def test_betas_are_those_of_the_other_scheduler(other):
    ours = HSIVIScheduler.from_config(other.config)
    torch.testing.assert_close(ours.alphas_cumprod, other.alphas_cumprod, check_dtype=False)


# ----- timesteps -----


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_timesteps_given_one_by_one_are_used_as_they_are(make):
    scheduler, stock = HSIVIScheduler(noise_eta=0.5), DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=make([800, 600, 400, 200, 0]))
    stock.set_timesteps(5)
    torch.testing.assert_close(walk(scheduler), walk(stock, eta=0.5), rtol=1e-4, atol=1e-4)
    scheduler.set_timesteps(timesteps=make([999, 3]))
    assert (scheduler.timesteps.tolist(), scheduler.num_inference_steps) == ([999, 3], 2)
    trained = HSIVIScheduler(layer_timesteps=GRID)
    trained.set_timesteps(timesteps=make(GRID[:-1]))
    assert trained.timesteps.tolist() == GRID[:-1]


def test_a_setting_or_count_counts_from_the_next_set_timesteps_and_leaves_nothing_of_the_one_before():
    scheduler = HSIVIScheduler()
    for arguments in ({"num_inference_steps": 7}, {"timesteps": [900, 100]}, {"num_inference_steps": 5}):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(walk(scheduler), walk(ready(HSIVIScheduler())))
    scheduler.register_to_config(noise_eta=1.0)
    assert torch.equal(walk(ready(scheduler)), walk(ready(HSIVIScheduler(noise_eta=1.0))))


def test_a_grid_that_becomes_the_trained_one_or_is_freed_counts_from_the_next_set_timesteps():
    output, sample, _ = tensors()
    scheduler = HSIVIScheduler()
    for grid in (None, [440, 220, -1], None):
        scheduler.register_to_config(layer_timesteps=grid)
        scheduler.set_timesteps(timesteps=[440, 220])
        if grid is None:
            assert scheduler.step(output, 333, sample).prev_sample.isfinite().all()
        else:
            with pytest.raises(ValueError, match="timestep \\[333\\] is not an input of a layer"):
                scheduler.step(output, 333, sample)


def test_a_begin_index_changes_no_step_and_is_that_of_a_layer():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    before = walk(scheduler)
    scheduler.set_begin_index(4)
    assert torch.equal(walk(scheduler), before)
    with pytest.raises(ValueError, match="begin_index=5, but there are 5 layers"):
        scheduler.set_begin_index(5)


# ----- a step -----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"layer_timesteps": [997, 300, 2, 1], "noise_scale": [0.5, 0.6, 0.7]}, {}])
@pytest.mark.parametrize("pixels", [None, torch.ones(1, 3, 8, 8)], ids=["config", "per_pixel"])
def test_a_timestep_is_a_number_or_a_tensor_of_any_kind_and_the_dtype_stays(options, dtype, pixels):
    scheduler = ready(HSIVIScheduler(noise_eta=1.0, thresholding=not options, **options))
    output, sample, noise = tensors(dtype)
    for timestep in [*scheduler.timesteps.tolist(), *([] if options else [555])]:
        wanted = scheduler.step(output, timestep, sample, variance_noise=noise, noise_scale=pixels)
        assert wanted.prev_sample.dtype == wanted.pred_original_sample.dtype == dtype
        scalar = torch.tensor(timestep)
        for given_as in (np.int64(timestep), scalar, scalar[None], scalar.int(), scalar.float(), scalar.repeat(4)):
            step = scheduler.step(output, given_as, sample, variance_noise=noise, noise_scale=pixels)
            for name, value in step.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 8), (1, 3, 8, 8), (4, 3, 5, 8, 2)])
def test_a_step_keeps_any_shape_and_drops_the_learned_variance(shape):
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, variance, sample, noise = torch.randn(4, *shape)
    for timestep in (800, torch.full(shape[:1], 32)):
        step = scheduler.step(output, timestep, sample, variance_noise=noise)
        wide = scheduler.step(torch.cat([output, variance], dim=1), timestep, sample, variance_noise=noise)
        assert isinstance(step, HSIVISchedulerOutput)
        assert step.prev_sample.shape == step.pred_original_sample.shape == shape
        assert torch.equal(wide.prev_sample, step.prev_sample)
        assert step[0] is step["prev_sample"] is step.to_tuple()[0] is step.prev_sample


@pytest.mark.parametrize("dtype", DTYPES)
def test_noising_and_velocity_keep_the_dtype_and_are_those_of_ddpm(dtype):
    ours, stock = HSIVIScheduler(**LATENT_BETAS), DDPMScheduler(**LATENT_BETAS)
    clean, noise, _ = tensors(dtype)
    for name in ("add_noise", "get_velocity"):
        for timesteps in (torch.tensor([0, 20, 500, 999]), torch.tensor([300])):
            got = getattr(ours, name)(clean, noise, timesteps)
            assert got.dtype == dtype
            assert torch.equal(got, getattr(stock, name)(clean, noise, timesteps))
    assert ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.add_noise(clean, noise, torch.tensor([-1])), clean)
    assert ours.scale_model_input(clean, 3) is clean
    assert (ours.init_noise_sigma, len(ours)) == (1.0, 1000)


def test_the_last_layer_draws_nothing_and_repeats_itself():
    scheduler, (output, sample, _) = HSIVIScheduler(layer_timesteps=GRID), tensors()
    state = torch.get_rng_state()
    step = scheduler.step(output, 32, sample).prev_sample
    assert torch.equal(scheduler.step(output, 32, sample).prev_sample, step)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scheduler.step(output, torch.full((4,), 32), sample).prev_sample, step)


# ----- the law -----


@given(
    grid=st.lists(st.integers(-1, 999), min_size=2, max_size=6, unique=True).map(lambda grid: sorted(grid)[::-1]),
    kernel=st.sampled_from(["ddim", "renoise"]),
    eta=st.floats(0, 1),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    zero_snr=st.booleans(),
)
@settings(deadline=None)
def test_with_a_perfect_network_every_layer_has_the_marginal_of_the_teacher(grid, kernel, eta, prediction, zero_snr):
    """A layer goes from alpha x0 + sigma eps to the mean alpha_t x0, with a variance that adds up to sigma_t^2."""
    betas = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr and prediction != "epsilon"}
    scheduler = HSIVIScheduler(layer_timesteps=grid, kernel=kernel, noise_eta=eta, **betas)
    abar = torch.cat([scheduler.alphas_cumprod, torch.ones(1)]).double()[grid].reshape(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    row = torch.arange(len(grid) - 1).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    clean, eps = torch.randn(2, len(row), 1, 2, 2, generator=generator, dtype=torch.float64)
    sample, velocity = alpha[row] * clean + sigma[row] * eps, alpha[row] * eps - sigma[row] * clean
    output = {"epsilon": eps, "sample": clean, "v_prediction": velocity}[prediction]
    mean, std = scheduler.transition(output, scheduler.timesteps[row], sample)
    assert (std <= sigma[row + 1] + 1e-9).all()
    direction = (sigma[row + 1] ** 2 - std**2).clamp_min(0).sqrt()
    torch.testing.assert_close(mean, alpha[row + 1] * clean + direction * eps, rtol=1e-5, atol=1e-5)
