import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsivi_diffusers import HSIVIScheduler, HSIVISchedulerOutput

SHAPE = (4, 3, 8, 8)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
GRID = [800, 512, 288, 128, 32, 0]
GRIDS = [[440, 330, 220, 110, 0], [500, 0], [440, 220, 10]]  # for 4, 1 and 2 steps


def output_and_sample():
    return torch.randn(SHAPE), torch.randn(SHAPE)


# ----- equality with diffusers' DDIM -----


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_with_noise_scale_one_it_is_ddim(prediction_type, spacing, eta, clip_sample):
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing, "clip_sample": clip_sample}
    ours, stock = HSIVIScheduler(noise_eta=eta, **options), DDIMScheduler(**options)
    ours.set_timesteps(10)
    stock.set_timesteps(10)
    assert torch.equal(ours.timesteps, stock.timesteps)
    sample = torch.randn(SHAPE)
    for timestep in stock.timesteps:
        output, noise = torch.randn(SHAPE), torch.randn(SHAPE)
        got = ours.step(output, timestep, sample, variance_noise=noise)
        wanted = stock.step(output, timestep, sample, eta=eta, variance_noise=noise)
        torch.testing.assert_close(got.prev_sample, wanted.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.pred_original_sample, wanted.pred_original_sample, rtol=1e-4, atol=1e-4)
        sample = wanted.prev_sample


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_trained_uniform_grid_is_ddim_too(prediction_type):
    ours = HSIVIScheduler(prediction_type=prediction_type, noise_eta=0.5, layer_timesteps=[800, 600, 400, 200, 0, -1])
    stock = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    stock.set_timesteps(5)
    for timestep in ours.timesteps:
        (output, sample), noise = output_and_sample(), torch.randn(SHAPE)
        got = ours.step(output, timestep, sample, variance_noise=noise).prev_sample
        wanted = stock.step(output, int(timestep), sample, eta=0.5, variance_noise=noise).prev_sample
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_set_alpha_to_one_is_ddims():
    output, sample = output_and_sample()
    for set_alpha_to_one in (True, False):
        options = {"timestep_spacing": "leading", "set_alpha_to_one": set_alpha_to_one, "clip_sample": False}
        ours, stock = HSIVIScheduler(noise_eta=0.0, **options), DDIMScheduler(**options)
        ours.set_timesteps(10)
        stock.set_timesteps(10)
        got, wanted = (scheduler.step(output, 0, sample).prev_sample for scheduler in (ours, stock))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ----- the layer -----


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_transition_and_step_agree_to_the_last_bit(kernel):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, kernel=kernel, noise_scale=[0.5, 0.6, 0.7, 0.8, 0.9])
    for timestep in scheduler.timesteps:
        (output, sample), noise = output_and_sample(), torch.randn(SHAPE)
        mean, std = scheduler.transition(output, timestep, sample)
        vector = scheduler.transition(output, timestep.repeat(len(sample)), sample)
        assert torch.equal(vector[0], mean)
        assert torch.equal(vector[1].expand(SHAPE), std.expand(SHAPE))
        wanted = mean if timestep == scheduler.timesteps[-1] else mean + std * noise
        assert torch.equal(scheduler.step(output, timestep, sample, variance_noise=noise).prev_sample, wanted)


def test_rows_at_different_timesteps_do_not_mix():
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale=[0.5, 0.6, 0.7, 0.8, 0.9])
    output, sample = output_and_sample()
    timesteps = torch.tensor([32, 800, 128, 288])
    mean, std = scheduler.transition(output, timesteps, sample)
    noise = torch.randn(SHAPE)
    stepped = scheduler.step(output, timesteps, sample, variance_noise=noise).prev_sample
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        alone = scheduler.transition(output[one], timestep, sample[one])
        torch.testing.assert_close(mean[one], alone[0])
        torch.testing.assert_close(std[one], alone[1])
        step = scheduler.step(output[one], timestep, sample[one], variance_noise=noise[one])
        torch.testing.assert_close(stepped[one], step.prev_sample)


def test_the_renoise_kernel_is_fresh_noise_on_the_clean_image():
    scheduler = HSIVIScheduler(layer_timesteps=GRID, kernel="renoise")
    output, sample = output_and_sample()
    clean, _ = scheduler.predict(output, 512, sample)
    mean, std = scheduler.transition(output, 512, sample)
    alpha, sigma = scheduler.alpha_sigma(torch.tensor([288]), sample)
    torch.testing.assert_close(mean, alpha * clean)
    torch.testing.assert_close(std, sigma)
    noise = torch.randn(SHAPE)
    torch.testing.assert_close(
        scheduler.step(output, 512, sample, variance_noise=noise).prev_sample,
        DDPMScheduler().add_noise(clean, noise, torch.full((4,), 288)),
    )


def test_rounding_leaves_no_root_of_a_negative_number():
    """With eta = 1 and almost no signal in the input, sigma^2 - c^2 is rounded to a negative number at some outputs."""
    output, sample = output_and_sample()
    for end in (1, 2, 4):
        mean, std = HSIVIScheduler(layer_timesteps=[999, end], noise_eta=1.0).transition(output, 999, sample)
        assert mean.isfinite().all()
        assert std > 0


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_mean_is_read_as_the_image_and_noise_it_was_made_of_and_leads_back(prediction_type):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, prediction_type=prediction_type, noise_eta=0.5)
    output, sample = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    timesteps, below = scheduler.timesteps, torch.tensor(GRID[1:])
    clean, eps = scheduler.predict(output, timesteps, sample)
    mean, _ = scheduler.transition(output, timesteps, sample)
    layer = scheduler.layers.coefficients(timesteps, sample, below)
    for got, wanted in zip(layer.invert(mean, sample), (clean, eps), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(layer.mean(clean, layer.noise_in(sample, clean)), mean)


def test_noise_scale_multiplies_the_std_of_its_layer_alone():
    plain = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()
    scales = [0.5, 0.6, 0.7, 0.8, 0.9]
    per_layer = HSIVIScheduler(layer_timesteps=GRID, noise_scale=scales)
    for t in range(5):
        timestep = plain.input_level(torch.tensor(t))
        mean, std = plain.transition(output, timestep, sample)
        scaled_mean, scaled_std = per_layer.transition(output, timestep, sample)
        assert torch.equal(mean, scaled_mean)
        torch.testing.assert_close(scaled_std, scales[t] * std)
        given_scale = torch.rand(1, 3, 8, 8)
        torch.testing.assert_close(plain.transition(output, timestep, sample, given_scale)[1], given_scale * std)


def test_per_pixel_noise_scale_must_come_with_the_call():
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale_type="per_pixel")
    output, sample = output_and_sample()
    with pytest.raises(ValueError, match="no noise_scale was given: sample with HSIVIPipeline"):
        scheduler.step(output, 800, sample)
    scheduler.step(output, 800, sample, noise_scale=torch.ones(1, 3, 8, 8))


def test_step_is_stateless_in_any_order_and_repetition():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()
    noise = torch.randn(SHAPE)

    def step(timestep):
        return scheduler.step(output, timestep, sample, variance_noise=noise).prev_sample

    first = {timestep: step(timestep) for timestep in (800, 512, 288, 128, 32)}
    for timestep in (32, 800, 800, 128, 512, 288, 32):
        assert torch.equal(step(timestep), first[timestep])


def test_generators_fix_the_noise_one_for_all_or_one_for_each():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()

    def step(generator):
        return scheduler.step(output, 800, sample, generator=generator).prev_sample

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(step(seeded(1)), step(seeded(1)))
    assert not torch.equal(step(seeded(1)), step(seeded(2)))
    each = step([seeded(i) for i in range(4)])
    alone = scheduler.step(output[2:3], 800, sample[2:3], generator=seeded(2)).prev_sample
    torch.testing.assert_close(each[2:3], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_of_a_generator_is_drawn_in_single_precision_for_half(dtype):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0)
    output, sample = (tensor.to(dtype) for tensor in output_and_sample())
    step = scheduler.step(output, 800, sample, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(step.prev_sample, scheduler.step(output, 800, sample, variance_noise=noise).prev_sample)


def test_eta_given_by_a_pipeline_does_not_silence_the_noise():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()
    noise = torch.randn(SHAPE)
    plain = scheduler.step(output, 800, sample, variance_noise=noise).prev_sample
    given = scheduler.step(output, 800, sample, variance_noise=noise, eta=0.0, use_clipped_model_output=True)
    assert torch.equal(plain, given.prev_sample)


def test_output_is_a_named_tuple_or_a_tuple():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()
    noise = torch.randn(SHAPE)
    named = scheduler.step(output, 800, sample, variance_noise=noise)
    assert isinstance(named, HSIVISchedulerOutput)
    prev_sample, clean = scheduler.step(output, 800, sample, variance_noise=noise, return_dict=False)
    assert torch.equal(named.prev_sample, prev_sample)
    assert torch.equal(named.pred_original_sample, clean)


def test_a_learned_variance_is_dropped():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()
    mean, _ = scheduler.transition(output, 800, sample)
    wide, _ = scheduler.transition(torch.cat([output, torch.randn(SHAPE)], dim=1), 800, sample)
    assert torch.equal(mean, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_keeps_its_dtype(dtype):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale_type="per_pixel")
    output, sample = (tensor.to(dtype) for tensor in output_and_sample())
    step = scheduler.step(output, 800, sample, noise_scale=torch.ones(1, 3, 8, 8))
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
    assert step.prev_sample.isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_predict_recovers_image_and_noise(prediction_type):
    scheduler = HSIVIScheduler(prediction_type=prediction_type)
    clean, noise = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    timesteps = torch.tensor([10, 200, 500, 900])
    sample = scheduler.add_noise(clean, noise, timesteps)
    output = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timesteps)}
    got = scheduler.predict(output[prediction_type], timesteps, sample)
    torch.testing.assert_close(got[0], clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], noise, rtol=1e-4, atol=1e-4)


def test_add_noise_velocity_and_scaling_are_those_of_ddpm():
    ours, stock = HSIVIScheduler(), DDPMScheduler()
    clean, noise = output_and_sample()
    timesteps = torch.tensor([0, 20, 500, 999])
    assert torch.equal(ours.add_noise(clean, noise, timesteps), stock.add_noise(clean, noise, timesteps))
    assert torch.equal(ours.get_velocity(clean, noise, timesteps), stock.get_velocity(clean, noise, timesteps))
    assert ours.scale_model_input(clean, 3) is clean
    assert ours.init_noise_sigma == 1.0
    assert len(ours) == 1000


def test_noising_on_one_device_leaves_stepping_on_it_possible():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("meta")  # what add_noise does with the sample's device
    alpha, sigma = scheduler.alpha_sigma(torch.tensor([800], device="meta"), torch.zeros(SHAPE, device="meta"))
    assert alpha.device.type == sigma.device.type == "meta"


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would be waited for: a number is read from it, or a tensor copied to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        assert name != "_local_scalar_dense" or tensors[0].device.type == "cpu"
        assert name not in ("_to_copy", "copy_") or len({tensor.device for tensor in tensors}) == 1, "a copy"
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"layer_timesteps": GRID, "noise_scale": [0.5, 0.6, 0.7, 0.8, 0.9]},
        {"layer_timesteps": GRIDS, "noise_scale": 0.5, "clip_sample": True},
        {"layer_timesteps": GRID, "prediction_type": "flow_prediction", "shift": 3.0},
        {"kernel": "renoise"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_call_waits_for_a_gpu(options, dtype):
    """The device meta, whose tensors have no numbers to be read, stands for one."""
    scheduler, (output, sample, noise) = HSIVIScheduler(**options), torch.randn(3, *SHAPE, dtype=dtype, device="meta")
    scheduler.set_timesteps(None if scheduler.trained_grids else 5, device="meta")

    def call():
        for timestep in scheduler.timesteps:
            for at in (timestep, timestep.repeat(4)):
                drawn = scheduler.step(output, at, sample, variance_noise=noise)
                assert drawn.prev_sample.device.type == "meta"
        t = torch.arange(4, device="meta")
        level, below = scheduler.input_level(t), scheduler.output_level(t)
        for end in (None, below):
            scheduler.transition(output, level, sample, prev_level=end)
        scheduler.predict(output, level, sample)
        scheduler.add_noise(sample, noise, scheduler.levels.time(level))

    call()  # numbers are copied to the device once
    with NoWaiting():
        call()
    torch.testing.assert_close(pickle.loads(pickle.dumps(scheduler)).layers.grid, scheduler.layers.grid)


def test_leading_with_an_offset_has_no_duplicates():
    grid = HSIVIScheduler.make_layer_timesteps(1000, "leading", steps_offset=1)
    assert grid == list(range(999, -2, -1))


# ----- grids -----


@pytest.mark.parametrize(
    ("spacing", "grid"),
    [
        ("quadratic", [800, 512, 288, 128, 32, 0]),
        ("uniform", [999, 799, 599, 400, 200, 0]),
        ("trailing", [999, 799, 599, 399, 199, -1]),
        ("leading", [800, 600, 400, 200, 0, -1]),
        ("linspace", [999, 749, 500, 250, 0, -1]),
    ],
)
def test_five_step_grids(spacing, grid):
    assert HSIVIScheduler.make_layer_timesteps(5, spacing) == grid


@given(st.sampled_from(["quadratic", "uniform", "trailing", "leading", "linspace"]), st.integers(1, 1000))
def test_every_count_has_a_strictly_descending_grid_on_the_clock(spacing, count):
    grid = HSIVIScheduler.make_layer_timesteps(count, spacing)
    assert len(grid) == count + 1
    assert all(above > below for above, below in zip(grid[:-1], grid[1:], strict=True))
    assert grid[0] <= 999
    assert grid[-1] >= -1


def test_the_grid_can_start_below_the_end_of_the_clock():
    assert HSIVIScheduler.make_layer_timesteps(5, "uniform", start=440) == [440, 352, 264, 176, 88, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "0 steps: give a whole number from 1 to"),
        ({"num_layers": 1001}, "1001 steps: give a whole number from 1"),
        ({"num_layers": 5, "start": 1000}, "start=1000: give a timestep from 5"),
        ({"num_layers": "5"}, "'5' steps: give a whole number from 1"),
        ({"num_layers": 2.5}, "2.5 steps: give a whole number from 1"),
        ({"num_layers": 5, "start": "500"}, "start='500': give a timestep from 5"),
        ({"num_layers": 5, "start": 4}, "start=4: give a timestep from 5"),
        ({"num_layers": 5, "timestep_spacing": "leading", "start": 500}, "goes with timestep_spacing 'quadratic'"),
        ({"num_layers": 5, "timestep_spacing": "cosine"}, "timestep_spacing='cosine' is unknown: choose one of"),
    ],
)
def test_grids_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HSIVIScheduler.make_layer_timesteps(**arguments)


def test_a_trained_grid_is_used_from_the_start_and_any_other_count_refused():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    assert scheduler.timesteps.tolist() == GRID[:-1]
    for count in (None, 5):
        scheduler.set_timesteps(count)
        assert scheduler.num_inference_steps == 5
    with pytest.raises(ValueError, match="num_inference_steps=50.*trained for 5 steps.*pass num_inference_steps=5"):
        scheduler.set_timesteps(50)


@pytest.mark.parametrize("count", ["5", 2.5, True, "many", float("nan")])
def test_a_count_that_is_no_whole_number_is_refused(count):
    with pytest.raises(ValueError, match=f"{count!r} steps: give a whole number from 1 to"):
        HSIVIScheduler().set_timesteps(count)
    with pytest.raises(ValueError, match=f"num_inference_steps={count!r}, but this sampler was trained for 5 steps"):
        HSIVIScheduler(layer_timesteps=GRID).set_timesteps(count)


def test_a_whole_number_may_be_of_any_type():
    scheduler = HSIVIScheduler()
    for count in (5, 5.0, np.int64(5), torch.tensor(5)):
        scheduler.set_timesteps(count)
        assert scheduler.timesteps.tolist() == GRID[:-1]
        assert scheduler.num_inference_steps == 5


def test_a_noise_prediction_has_no_layer_that_starts_where_abar_is_0():
    options = {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1.0]}
    scheduler = HSIVIScheduler(**options)
    for start in ({"num_inference_steps": 3}, {"timesteps": [2, 0]}):
        with pytest.raises(ValueError, match="abar is 0 at 2, .*: start lower"):
            scheduler.set_timesteps(**start)
    with pytest.raises(ValueError, match="abar is 0 at 2"):
        HSIVIScheduler(**options, layer_timesteps=[2, 0])
    scheduler.set_timesteps(timesteps=[1, 0])
    HSIVIScheduler(**options, prediction_type="v_prediction").set_timesteps(3)


def test_layers_know_their_timesteps():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    t = torch.tensor([0, 4, 2])
    assert scheduler.input_level(t).tolist() == [32, 800, 288]
    assert scheduler.output_level(t).tolist() == [0, 512, 128]


def test_without_a_grid_the_count_must_come_first():
    scheduler = HSIVIScheduler()
    with pytest.raises(ValueError, match="pass num_inference_steps"):
        scheduler.set_timesteps()
    output, sample = output_and_sample()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(output, 10, sample)


def test_off_the_grid_only_an_untrained_scheduler_steps():
    output, sample = output_and_sample()
    generic, stock = HSIVIScheduler(timestep_spacing="leading", noise_eta=0.0), DDIMScheduler(clip_sample=False)
    for scheduler in (generic, stock):
        scheduler.set_timesteps(10)
    for timestep in (555, 37):
        torch.testing.assert_close(
            generic.step(output, timestep, sample).prev_sample,
            stock.step(output, timestep, sample).prev_sample,
            rtol=1e-4,
            atol=1e-4,
        )
    with pytest.raises(ValueError, match=r"timestep \[555\] is not an input of a layer.*trained at \[800, 512"):
        HSIVIScheduler(layer_timesteps=GRID).step(output, 555, sample)


@pytest.mark.parametrize(
    "timestep", [800.5, torch.tensor(800.5), torch.tensor([800.5]), torch.tensor([800.5, 512, 288, 128])], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fraction_of_a_timestep_is_refused(timestep, dtype):
    output, sample = (tensor.to(dtype) for tensor in output_and_sample())
    for scheduler in (HSIVIScheduler(layer_timesteps=GRID), HSIVIScheduler()):
        scheduler.set_timesteps(5)
        for method in (scheduler.step, scheduler.transition, scheduler.predict):
            with pytest.raises(
                ValueError, match=r"(timestep|level) \[800.5.*\] is off the clock: give integers from 0 to 999"
            ):
                method(output, timestep, sample)


def test_a_timestep_may_be_a_whole_float():
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    output, sample = output_and_sample()
    mean, std = scheduler.transition(output, 800, sample)
    for timestep in (800.0, np.float32(800), torch.tensor(800.0), torch.full((4,), 800.0)):
        got = scheduler.transition(output, timestep, sample)
        assert torch.equal(got[0], mean)
        assert torch.equal(got[1].expand(SHAPE), std.expand(SHAPE))


# ----- several grids for one network -----


def test_a_count_picks_its_grid_and_none_the_longest():
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS)
    assert scheduler.timesteps.tolist() == GRIDS[0][:-1]
    assert scheduler.trained_grids == [GRIDS[1], GRIDS[2], GRIDS[0]]
    assert scheduler.depths == [1, 2, 4]
    for count, grid in ((2, GRIDS[2]), (1, GRIDS[1]), (4, GRIDS[0]), (np.int64(2), GRIDS[2]), (None, GRIDS[0])):
        scheduler.set_timesteps(count)
        assert (scheduler.timesteps.tolist(), scheduler.num_inference_steps) == (grid[:-1], len(grid) - 1)
    scheduler.set_timesteps(timesteps=[440, 220])
    assert scheduler.layers.grid.tolist() == GRIDS[2]


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps=3"),
        ({"num_inference_steps": 50}, "num_inference_steps=50"),
        ({"num_inference_steps": "2"}, "num_inference_steps='2'"),
        ({"timesteps": [440, 330]}, r"timesteps=\[440, 330\]"),
    ],
)
def test_any_other_count_is_refused_and_those_there_are_are_listed(arguments, asked):
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS)
    scheduler.set_timesteps(2)
    message = f"{asked}, but this sampler was trained for 1, 2 or 4 steps.*: pass num_inference_steps=1, 2 or 4"
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [440, 220]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_timesteps": [[440, 0], [500, 0]]}, r"grids of \[1, 1\] steps: give each number of steps one grid"),
        ({"layer_timesteps": [[440, 0], []]}, r"layer_timesteps\[1\]=\[\] is no grid of at least 1 layer"),
        ({"layer_timesteps": [[440, 0], [220, 440, 0]]}, r"layer_timesteps\[1\]=.* is not strictly descending"),
        ({"layer_timesteps": GRIDS, "noise_scale": [1.0, 1.0]}, "2 numbers, for 3 grids: give one number for all"),
        ({"layer_timesteps": GRIDS, "noise_scale": [1.0] * 7}, "7 numbers, for 3 grids: give one number for all"),
    ],
)
def test_grids_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HSIVIScheduler(**options)


def test_each_of_several_grids_must_be_one_to_sample_on():
    betas = {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1.0]}
    with pytest.raises(ValueError, match="abar is 0 at 2"):
        HSIVIScheduler(**betas, layer_timesteps=[[1, 0, -1], [2, 0]])
    with pytest.raises(ValueError, match="starts beyond the 2 betas"):
        HSIVIScheduler(trained_betas=[0.1, 0.2], layer_timesteps=[[1, 0, -1], [2, 0]])


def test_layers_are_counted_over_all_grids_by_rising_count():
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS)
    for count in scheduler.depths:
        scheduler.set_timesteps(count)
        assert scheduler.input_level(torch.arange(7)).tolist() == [500, 220, 440, 110, 220, 330, 440]
        assert scheduler.output_level(torch.arange(7)).tolist() == [0, 10, 220, 0, 110, 220, 330]
    assert scheduler.input_level(torch.tensor([[6, 0], [1, 1]])).tolist() == [[440, 500], [220, 220]]


def test_a_timestep_of_another_grid_is_refused():
    scheduler, (output, sample) = HSIVIScheduler(layer_timesteps=GRIDS), output_and_sample()
    scheduler.set_timesteps(2)
    message = (
        r"timestep \[330\] is not an input of a layer: the grid that is set, of 2 steps, was trained at \[440, 220\]: "
        r"there are grids of 1, 2 or 4 steps, call set_timesteps\(T\)"
    )
    with pytest.raises(ValueError, match=message):
        scheduler.step(output, 330, sample)


one_grid = st.lists(st.integers(-1, 999), min_size=2, max_size=7, unique=True).map(lambda grid: sorted(grid)[::-1])
settings_of_layers = st.fixed_dictionaries(
    {
        "layer_timesteps": st.lists(one_grid, min_size=2, max_size=4, unique_by=len),
        "kernel": st.sampled_from(["ddim", "renoise"]),
        "noise_eta": st.floats(0, 1),
        "noise_scale": st.floats(0.1, 3),
        "prediction_type": st.sampled_from(PREDICTIONS),
    }
)


@given(options=settings_of_layers)
@settings(deadline=None, max_examples=50)
def test_each_count_steps_exactly_as_its_grid_alone(options):
    several, (output, sample), noise = HSIVIScheduler(**options), output_and_sample(), torch.randn(SHAPE)
    for grid in options["layer_timesteps"]:
        alone = HSIVIScheduler(**{**options, "layer_timesteps": grid})
        several.set_timesteps(len(grid) - 1)
        assert torch.equal(several.timesteps, alone.timesteps)
        for timestep in grid[:-1]:
            for at in (timestep, torch.full((4,), timestep)):
                steps = [each.step(output, at, sample, variance_noise=noise) for each in (several, alone)]
                assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


@given(options=settings_of_layers)
@settings(deadline=None, max_examples=50)
def test_a_transition_told_where_it_ends_is_that_of_the_layer_in_its_grid(options):
    several = HSIVIScheduler(**options)
    t = torch.arange(sum(several.depths))
    output, sample = torch.randn(2, len(t), 3, 8, 8)
    inputs, outputs = several.input_level(t), several.output_level(t)
    mean, std = several.transition(output, inputs, sample, prev_level=outputs)
    for grid, rows in zip(several.trained_grids, t.split(several.depths), strict=True):
        alone = HSIVIScheduler(**{**options, "layer_timesteps": grid})
        assert grid == [*inputs[rows].tolist()[::-1], int(outputs[rows[0]])]
        wanted = alone.transition(output[rows], inputs[rows], sample[rows])
        assert torch.equal(mean[rows], wanted[0])
        assert torch.equal(std[rows], wanted[1])


@pytest.mark.parametrize("scale", [0.5, [0.5, 0.6, 0.7]])
def test_a_transition_of_one_grid_may_be_told_where_it_ends(scale):
    scheduler = HSIVIScheduler(layer_timesteps=[440, 220, 110, 0], noise_scale=scale)
    t = torch.tensor([2, 0, 1])
    output, sample = torch.randn(2, 3, 3, 8, 8)
    inputs, outputs = scheduler.input_level(t), scheduler.output_level(t)
    told = scheduler.transition(output, inputs, sample, prev_level=outputs)
    for one, other in zip(told, scheduler.transition(output, inputs, sample), strict=True):
        assert torch.equal(one, other)


# ----- configuration -----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type='score' is unknown"),
        ({"shift": 0.0}, "shift=0.0: give a number > 0"),
        ({"time_shift_type": "cubic"}, "time_shift_type='cubic' is unknown"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is unknown"),
        ({"kernel": "euler"}, "kernel='euler' is unknown: choose one of 'ddim', 'renoise'"),
        ({"noise_scale_type": "tensor"}, "noise_scale_type='tensor' is unknown"),
        ({"noise_eta": 1.5}, "noise_eta=1.5: give a number from 0 to 1; 0 is DDIM"),
        ({"noise_eta": "0.2"}, "noise_eta='0.2': give a number from 0 to 1"),
        ({"noise_eta": float("nan")}, "noise_eta=nan: give a number from 0 to 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: give a whole number of at least 1"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps=10.0: give a whole number"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000': give a whole number"),
        ({"steps_offset": -400}, "steps_offset=-400: give a whole number from 0 to 999"),
        ({"steps_offset": 1000}, "steps_offset=1000: give a whole number from 0 to 999"),
        ({"steps_offset": True}, "steps_offset=True: give a whole number"),
        ({"clip_sample_range": -1.0}, "clip_sample_range=-1.0: give a number > 0"),
        ({"clip_sample_range": 0.0}, "clip_sample_range=0.0: give a number > 0"),
        ({"clip_sample_range": float("inf")}, "clip_sample_range=inf: give a number > 0"),
        ({"sample_max_value": 0.0}, "sample_max_value=0.0: give a number > 0"),
        ({"dynamic_thresholding_ratio": 1.1}, "dynamic_thresholding_ratio=1.1: give a number from 0 to 1"),
        ({"beta_start": "a"}, "no betas follow from these settings .*: give betas from 0 to 1"),
        ({"beta_schedule": "square"}, "no betas follow from these settings .*square.*: give betas from 0 to 1"),
        ({"beta_start": -0.1}, "betas from -0.1 to 0.02, .*: give betas from 0 to 1"),
        ({"beta_end": 1.5}, "to 1.5, .*: give betas from 0 to 1"),
        ({"beta_end": float("nan")}, "betas from nan to nan"),
        ({"trained_betas": [0.1, float("nan"), 0.2]}, "betas from nan to nan"),
        ({"trained_betas": [0.0, 0.0]}, "betas of at most 0 add no noise: give betas from 0 to 1"),
        ({"beta_start": 1e-9, "beta_end": 1e-9}, "betas of at most 1e-09 add no noise"),
        ({"trained_betas": [0.0, 0.1], "layer_timesteps": [1, 0, -1]}, "abar is 1 at 0, .*: raise the first beta"),
        ({"trained_betas": []}, "no betas follow from these settings"),
        ({"trained_betas": [[0.1, 0.2]]}, r"shape \(1, 2\): give betas"),
        ({"trained_betas": ["0.1"]}, "no betas follow from these settings"),
        ({"layer_timesteps": 500}, "no grid of at least 1 layer"),
        ({"layer_timesteps": "many"}, "no grid of at least 1 layer"),
        ({"layer_timesteps": [None, 0]}, "no grid of at least 1 layer"),
        ({"layer_timesteps": [[500, 0], 5]}, r"layer_timesteps\[1\]=\[5\] is no grid of at least 1 layer"),
        ({"noise_scale": "1"}, "noise_scale='1': give a number > 0 or a list"),
        ({"layer_timesteps": [500, 0], "noise_scale": [[1.0]]}, "give a number > 0 or a list"),
        ({"layer_timesteps": [500]}, "no grid of at least 1 layer"),
        ({"layer_timesteps": [500.5, 0]}, "no grid of at least 1 layer"),
        ({"layer_timesteps": ["500", "0"]}, "no grid of at least 1 layer"),
        ({"layer_timesteps": [500, 500, 0]}, "not strictly descending"),
        ({"layer_timesteps": [0, 500]}, "not strictly descending"),
        ({"layer_timesteps": [1000, 0]}, "leaves the teacher's clock: give T\\+1 strictly descending"),
        ({"layer_timesteps": [500, 0, -2]}, "leaves the teacher's clock"),
        ({"noise_scale": 0.0}, "give a number > 0"),
        ({"noise_scale": float("inf")}, "give a number > 0"),
        ({"layer_timesteps": [500, 0], "noise_scale": [float("nan")]}, "give a number > 0"),
        ({"noise_scale": [1.0, 1.0]}, "it needs a grid"),
        ({"layer_timesteps": GRID, "noise_scale": [1.0, 1.0]}, "noise_scale has 2 numbers: it needs 5 numbers"),
        ({"layer_timesteps": GRID, "noise_scale": [1.0, -1.0, 1.0, 1.0, 1.0]}, "give a number > 0"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        HSIVIScheduler(**options)


@pytest.mark.parametrize(
    ("output", "timestep", "message"),
    [
        (torch.zeros(4, 5, 8, 8), 800, "must be equal, or the output must have twice the channels"),
        (torch.zeros(4, 3, 4, 4), 800, "must be equal"),
        (torch.zeros(SHAPE), torch.tensor([800, 512]), "2 timesteps for 4 samples"),
        (torch.zeros(SHAPE), "800", "timestep='800': give a number or a tensor"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(output, timestep, message):
    with pytest.raises(ValueError, match=message):
        HSIVIScheduler(layer_timesteps=GRID).step(output, timestep, torch.zeros(SHAPE))


@pytest.mark.parametrize(("output", "sample"), [(torch.float32, torch.int64), (torch.uint8, torch.float32)])
def test_integer_samples_are_refused_rather_than_truncated(output, sample):
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    with pytest.raises(ValueError, match=f"model_output is {output} and the sample {sample}: give floating-point"):
        scheduler.step(torch.zeros(SHAPE, dtype=output), 800, torch.zeros(SHAPE, dtype=sample))


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (1, 1, 3, 8, 8), (2, 8, 8)])
def test_a_noise_scale_that_would_change_the_shape_is_refused(shape):
    scheduler, (output, sample) = HSIVIScheduler(layer_timesteps=GRID), output_and_sample()
    for method in (scheduler.step, scheduler.transition):
        with pytest.raises(
            ValueError, match=r"noise_scale has shape .*: give one that broadcasts to the sample, \(4, 3"
        ):
            method(output, 800, sample, noise_scale=torch.ones(shape))
    with pytest.raises(ValueError, match=r"noise_scale has shape \(1, 3, 8, 8\)"):
        scheduler.step(output[:, :1], 800, sample[:, :1], noise_scale=torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 8, 8), (2, 4, 3, 8, 8)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"variance_noise has shape .*: give that of the sample, \(4, 3, 8, 8\)"):
        HSIVIScheduler(layer_timesteps=GRID).step(
            *output_and_sample()[:1], 800, *output_and_sample()[1:], variance_noise=torch.ones(shape)
        )


def test_adding_noise_reaches_the_final_alpha():
    clean, noise = output_and_sample()
    assert torch.equal(HSIVIScheduler().add_noise(clean, noise, torch.tensor([-1])), clean)


def test_config_survives_saving_and_other_schedulers(tmp_path):
    scheduler = HSIVIScheduler(
        layer_timesteps=GRID, kernel="renoise", noise_eta=0.7, noise_scale=[0.5, 0.6, 0.7, 0.8, 0.9]
    )
    scheduler.save_pretrained(tmp_path)
    loaded = HSIVIScheduler.from_pretrained(tmp_path)
    through = HSIVIScheduler.from_config(DDIMScheduler.from_config(scheduler.config).config)
    for other in (loaded, through):
        for key in ("layer_timesteps", "kernel", "noise_eta", "noise_scale", "noise_scale_type"):
            assert other.config[key] == scheduler.config[key]
        assert torch.equal(other.timesteps, scheduler.timesteps)


def test_beta_schedules_are_those_of_ddpm():
    for options in (
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()},
        {"num_train_timesteps": 2, "trained_betas": [0.1, 0.2]},
    ):
        assert torch.equal(HSIVIScheduler(**options).alphas_cumprod, DDPMScheduler(**options).alphas_cumprod)
