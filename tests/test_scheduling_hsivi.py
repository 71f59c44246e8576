import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsivi_diffusers import HSIVIScheduler

SHAPE = (4, 3, 8, 8)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
GRID = [800, 512, 288, 128, 32, 0]
SCALES = [0.5, 0.6, 0.7, 0.8, 0.9]
GRIDS = [[440, 330, 220, 110, 0], [500, 0], [440, 220, 10]]  # for 4, 1 and 2 steps
FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}


def output_and_sample(dtype=torch.float32):
    return torch.randn(2, *SHAPE, dtype=dtype).unbind()


# ----- equality with diffusers' DDIM -----


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "trailing"},
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"thresholding": True},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 3.0},
        {"thresholding": True, "clip_sample": True, "sample_max_value": 100.0},
        {"steps_offset": 1, "set_alpha_to_one": False},
    ],
)
def test_with_noise_scale_one_it_is_ddim(prediction_type, eta, options):
    options = {"prediction_type": prediction_type, "timestep_spacing": "leading", "clip_sample": False, **options}
    eta = eta if options.get("set_alpha_to_one", True) else 0.0  # our last layer adds no noise
    ours, stock = HSIVIScheduler(noise_eta=eta, **options), DDIMScheduler(**options)
    ours.set_timesteps(10)
    stock.set_timesteps(10)
    assert torch.equal(ours.timesteps, stock.timesteps)
    trained = HSIVIScheduler(noise_eta=eta, layer_timesteps=[*ours.timesteps.tolist(), -1], **options)
    sample = torch.randn(SHAPE)
    for timestep in stock.timesteps:
        output, noise = torch.randn(SHAPE), torch.randn(SHAPE)
        wanted = stock.step(output, timestep, sample, eta=eta, variance_noise=noise)
        for scheduler in (ours, trained):
            got = scheduler.step(output, timestep, sample, variance_noise=noise)
            torch.testing.assert_close(got.prev_sample, wanted.prev_sample, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.pred_original_sample, wanted.pred_original_sample, rtol=1e-4, atol=1e-4)
        sample = wanted.prev_sample


@pytest.mark.parametrize("count", [1, 5, 10])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_from_pure_noise_at_zero_terminal_snr_it_is_ddim(prediction_type, count):
    options = {"prediction_type": prediction_type, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    ours, stock = HSIVIScheduler(noise_eta=0.5, **options), DDIMScheduler(**options, clip_sample=False)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(count)
        assert (scheduler.timesteps[0], scheduler.alphas_cumprod[999]) == (999, 0)
    (output, sample), noise = output_and_sample(), torch.randn(SHAPE)
    for timestep in ours.timesteps:
        got = ours.step(output, timestep, sample, variance_noise=noise).prev_sample
        wanted = stock.step(output, timestep, sample, eta=0.5, variance_noise=noise).prev_sample
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# ----- the layer -----


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_transition_and_step_agree_to_the_last_bit_in_any_order_and_repetition(kernel):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, kernel=kernel, noise_scale=SCALES)
    (output, sample), noise = output_and_sample(), torch.randn(SHAPE)
    for timestep in (32, 800, 800, 128, 512, 288, 32):
        mean, std = scheduler.transition(output, timestep, sample)
        vector = scheduler.transition(output, torch.full((4,), timestep), sample)
        assert torch.equal(vector[0], mean)
        assert torch.equal(vector[1].expand(SHAPE), std.expand(SHAPE))
        wanted = mean if timestep == 32 else mean + std * noise
        assert torch.equal(scheduler.step(output, timestep, sample, variance_noise=noise).prev_sample, wanted)


def test_rows_at_different_timesteps_do_not_mix():
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale=SCALES)
    (output, sample), noise = output_and_sample(), torch.randn(SHAPE)
    timesteps = torch.tensor([32, 800, 128, 288])
    mean, std = scheduler.transition(output, timesteps, sample)
    stepped = scheduler.step(output, timesteps, sample, variance_noise=noise).prev_sample
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        alone = scheduler.transition(output[one], timestep, sample[one])
        torch.testing.assert_close((mean[one], std[one]), alone)
        step = scheduler.step(output[one], timestep, sample[one], variance_noise=noise[one])
        torch.testing.assert_close(stepped[one], step.prev_sample)


def test_the_renoise_kernel_is_fresh_noise_on_the_clean_image():
    scheduler = HSIVIScheduler(layer_timesteps=GRID, kernel="renoise")
    (output, sample), noise = output_and_sample(), torch.randn(SHAPE)
    clean, _ = scheduler.predict(output, 512, sample)
    drawn = scheduler.step(output, 512, sample, variance_noise=noise).prev_sample
    torch.testing.assert_close(drawn, DDPMScheduler().add_noise(clean, noise, torch.full((4,), 288)))


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
    torch.testing.assert_close(layer.invert(mean, sample), (clean, eps))
    torch.testing.assert_close(layer.mean(clean, layer.noise_in(sample, clean)), mean)


def test_noise_scale_multiplies_the_std_of_its_layer_alone():
    plain, per_layer = HSIVIScheduler(layer_timesteps=GRID), HSIVIScheduler(layer_timesteps=GRID, noise_scale=SCALES)
    output, sample = output_and_sample()
    for t, scale in enumerate(SCALES):
        level = plain.input_level(torch.tensor(t))
        mean, std = plain.transition(output, level, sample)
        scaled_mean, scaled_std = per_layer.transition(output, level, sample)
        assert torch.equal(mean, scaled_mean)
        torch.testing.assert_close(scaled_std, scale * std)
        given_scale = torch.rand(1, 3, 8, 8)
        torch.testing.assert_close(plain.transition(output, level, sample, given_scale)[1], given_scale * std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_of_a_generator_is_drawn_in_single_precision_for_half(dtype):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0)
    output, sample = output_and_sample(dtype)
    step = scheduler.step(output, 800, sample, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(step.prev_sample, scheduler.step(output, 800, sample, variance_noise=noise).prev_sample)


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
        {"layer_timesteps": GRID, "noise_scale": SCALES},
        {"layer_timesteps": GRIDS, "noise_scale": 0.5, "clip_sample": True},
        {"layer_timesteps": GRID, **FLOW},
        {"kernel": "renoise"},
    ],
)
def test_no_call_waits_for_a_gpu(options):
    """The device meta, whose tensors have no numbers to be read, stands for one."""
    scheduler, half = HSIVIScheduler(**options), {"dtype": torch.float16, "device": "meta"}
    output, sample, noise = torch.randn(3, *SHAPE, **half)
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

    call()  # vectors are copied to the device once
    with NoWaiting():
        call()
    assert b"meta" not in pickle.dumps(scheduler.layers)  # so that it loads where there is no GPU


# ----- grids -----


@pytest.mark.parametrize(
    ("spacing", "start", "grid"),
    [
        ("quadratic", None, [800, 512, 288, 128, 32, 0]),
        ("uniform", None, [999, 799, 599, 400, 200, 0]),
        ("uniform", 440, [440, 352, 264, 176, 88, 0]),
        ("trailing", None, [999, 799, 599, 399, 199, -1]),
        ("leading", None, [800, 600, 400, 200, 0, -1]),
        ("linspace", None, [999, 749, 500, 250, 0, -1]),
    ],
)
def test_five_step_grids(spacing, start, grid):
    assert HSIVIScheduler.make_layer_timesteps(5, spacing, start=start) == grid


@given(
    st.sampled_from(["quadratic", "uniform", "trailing", "leading", "linspace"]),
    st.integers(1, 1000),
    st.integers(0, 2),
)
@example("quadratic", 900, 0)
@example("leading", 1000, 1)
@settings(deadline=None)
def test_every_count_has_a_strictly_descending_grid_on_the_clock(spacing, count, offset):
    grid = HSIVIScheduler.make_layer_timesteps(count, spacing, steps_offset=offset)
    assert len(grid) == count + 1
    assert all(above > below for above, below in zip(grid[:-1], grid[1:], strict=True))
    assert grid[0] <= 999
    assert grid[-1] >= -1


def test_a_whole_number_of_steps_may_be_of_any_type():
    for scheduler in (HSIVIScheduler(), HSIVIScheduler(layer_timesteps=GRID)):
        for count in (5, 5.0, np.int64(5), torch.tensor(5)):
            scheduler.set_timesteps(count)
            assert scheduler.timesteps.tolist() == GRID[:-1]
            assert scheduler.num_inference_steps == 5


def test_off_the_grid_only_an_untrained_scheduler_steps():
    output, sample = output_and_sample()
    generic, stock = HSIVIScheduler(timestep_spacing="leading", noise_eta=0.0), DDIMScheduler(clip_sample=False)
    for scheduler in (generic, stock):
        scheduler.set_timesteps(10)
    for timestep in (555, 37):
        got, wanted = (each.step(output, timestep, sample).prev_sample for each in (generic, stock))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ValueError, match="num_inference_steps=3"):
        scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [440, 220]


def test_layers_are_counted_over_all_grids_by_rising_count():
    scheduler = HSIVIScheduler(layer_timesteps=GRIDS)
    for count in scheduler.depths:
        scheduler.set_timesteps(count)
        assert scheduler.input_level(torch.arange(7)).tolist() == [500, 220, 440, 110, 220, 330, 440]
        assert scheduler.output_level(torch.arange(7)).tolist() == [0, 10, 220, 0, 110, 220, 330]
    assert scheduler.input_level(torch.tensor([[6, 0], [1, 1]])).tolist() == [[440, 500], [220, 220]]
    single = HSIVIScheduler(layer_timesteps=GRID)
    assert single.input_level(torch.tensor([0, 4, 2])).tolist() == [32, 800, 288]


one_grid = st.lists(st.integers(-1, 999), min_size=2, max_size=7, unique=True).map(lambda grid: sorted(grid)[::-1])


@given(
    options=st.fixed_dictionaries(
        {
            "layer_timesteps": st.lists(one_grid, min_size=2, max_size=4, unique_by=len),
            "kernel": st.sampled_from(["ddim", "renoise"]),
            "noise_eta": st.floats(0, 1),
            "noise_scale": st.floats(0.1, 3),
            "prediction_type": st.sampled_from(PREDICTIONS),
        }
    )
)
@settings(max_examples=25)
def test_each_count_steps_exactly_as_its_grid_alone(options):
    """And so does a transition of a layer of any grid that gets its end."""
    several = HSIVIScheduler(**options)
    t = torch.arange(sum(several.depths))
    output, sample, noise = torch.randn(3, len(t), 3, 8, 8)
    inputs, outputs = several.input_level(t), several.output_level(t)
    mean, std = several.transition(output, inputs, sample, prev_level=outputs)
    for grid, rows in zip(several.trained_grids, t.split(several.depths), strict=True):
        alone = HSIVIScheduler(**{**options, "layer_timesteps": grid})
        several.set_timesteps(len(grid) - 1)
        assert grid == [*inputs[rows].tolist()[::-1], int(outputs[rows[0]])]
        wanted = alone.transition(output[rows], inputs[rows], sample[rows])
        assert torch.equal(mean[rows], wanted[0])
        assert torch.equal(std[rows], wanted[1])
        steps = [
            each.step(output[rows], inputs[rows], sample[rows], variance_noise=noise[rows]) for each in (several, alone)
        ]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


@pytest.mark.parametrize("scale", [0.5, [0.5, 0.6, 0.7]])
def test_a_transition_of_one_grid_may_be_given_its_end(scale):
    scheduler = HSIVIScheduler(layer_timesteps=[440, 220, 110, 0], noise_scale=scale)
    t = torch.tensor([2, 0, 1])
    output, sample = torch.randn(2, 3, 3, 8, 8)
    inputs, outputs = scheduler.input_level(t), scheduler.output_level(t)
    with_end = scheduler.transition(output, inputs, sample, prev_level=outputs)
    torch.testing.assert_close(with_end, scheduler.transition(output, inputs, sample), rtol=0, atol=0)


# ----- what is refused -----


def make_grid(num_layers=5, **arguments):
    HSIVIScheduler.make_layer_timesteps(num_layers, **arguments)


def set_steps(scheduler_options, **arguments):
    HSIVIScheduler(**scheduler_options).set_timesteps(**arguments)


def step(at=800, output=SHAPE, sample=SHAPE, dtypes=(torch.float32, torch.float32), method="step", **arguments):
    scheduler = HSIVIScheduler(**arguments.pop("scheduler_options", TRAINED))
    if scheduler.trained_grids != [GRID]:
        scheduler.set_timesteps(2)
    output, sample = (torch.zeros(shape, dtype=dtype) for shape, dtype in zip((output, sample), dtypes, strict=True))
    getattr(scheduler, method)(output, at, sample, **arguments)


NEW, TRAINED, SEVERAL = HSIVIScheduler, {"layer_timesteps": GRID}, {"layer_timesteps": GRIDS}
NO_SIGNAL = {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1.0]}
FLOATS, CLOCK = torch.full((4,), 800.5), "give T\\+1 strictly descending integers from 999 to 0"
REFUSED = [
    (make_grid, {"num_layers": 0}, "0 steps: give a whole number from 1 to"),
    (make_grid, {"num_layers": 1001}, "1001 steps: give a whole number from 1"),
    (make_grid, {"num_layers": "5"}, "'5' steps: give a whole number from 1"),
    (make_grid, {"start": 1000}, "start=1000: give a timestep from 5"),
    (make_grid, {"start": "500"}, "start='500': give a timestep from 5"),
    (make_grid, {"start": 4}, "start=4: give a timestep from 5"),
    (make_grid, {"timestep_spacing": "leading", "start": 500}, "goes with timestep_spacing 'quadratic'"),
    (make_grid, {"timestep_spacing": "cosine"}, "timestep_spacing='cosine' is unknown: choose one of"),
    # single settings
    (NEW, {"prediction_type": "score"}, "prediction_type='score' is unknown"),
    (NEW, {"shift": 0.0}, "shift=0.0: give a number > 0"),
    (NEW, {"time_shift_type": "cubic"}, "time_shift_type='cubic' is unknown"),
    (NEW, {"timestep_spacing": "karras"}, "timestep_spacing='karras' is unknown"),
    (NEW, {"kernel": "euler"}, "kernel='euler' is unknown: choose one of 'ddim', 'renoise'"),
    (NEW, {"noise_scale_type": "tensor"}, "noise_scale_type='tensor' is unknown"),
    (NEW, {"noise_eta": 1.5}, "noise_eta=1.5: give a number from 0 to 1; 0 is DDIM"),
    (NEW, {"noise_eta": "0.2"}, "noise_eta='0.2': give a number from 0 to 1"),
    (NEW, {"noise_eta": float("nan")}, "noise_eta=nan: give a number from 0 to 1"),
    (NEW, {"num_train_timesteps": 0}, "num_train_timesteps=0: give a whole number of at least 1"),
    (NEW, {"num_train_timesteps": 10.0}, "num_train_timesteps=10.0: give a whole number"),
    (NEW, {"steps_offset": -400}, "steps_offset=-400: give a whole number from 0 to 999"),
    (NEW, {"steps_offset": 1000}, "steps_offset=1000: give a whole number from 0 to 999"),
    (NEW, {"steps_offset": True}, "steps_offset=True: give a whole number"),
    (NEW, {"clip_sample_range": 0.0}, "clip_sample_range=0.0: give a number > 0"),
    (NEW, {"clip_sample_range": float("inf")}, "clip_sample_range=inf: give a number > 0"),
    (NEW, {"sample_max_value": 0.0}, "sample_max_value=0.0: give a number > 0"),
    (NEW, {"dynamic_thresholding_ratio": 1.1}, "dynamic_thresholding_ratio=1.1: give a number from 0 to 1"),
    (NEW, {"guidance_scale": [2.0, 2.0]}, "guidance_scale=.*: give a number of at least 0, 1 for none"),
    (NEW, {"guidance_scale": -1}, "guidance_scale=-1: give a number of at least 0"),
    # betas
    (NEW, {"rescale_betas_zero_snr": True}, "goes with prediction_type 'v_prediction' or 'sample'"),
    (NEW, {"beta_start": "a"}, "no betas follow from these settings .*: give betas from 0 to 1"),
    (NEW, {"beta_schedule": "square"}, "no betas follow from these settings .*square.*: give betas from 0 to 1"),
    (NEW, {"beta_start": -0.1}, "betas from -0.1 to 0.02, .*: give betas from 0 to 1"),
    (NEW, {"beta_end": 1.5}, "to 1.5, .*: give betas from 0 to 1"),
    (NEW, {"trained_betas": [0.1, float("nan"), 0.2]}, "betas from nan to nan"),
    (NEW, {"trained_betas": []}, "no betas follow from these settings"),
    (NEW, {"trained_betas": [[0.1, 0.2]]}, r"shape \(1, 2\): give betas"),
    (NEW, {"trained_betas": [0.0, 0.0]}, "betas of at most 0 add no noise: give betas from 0 to 1"),
    (NEW, {"beta_start": 1e-9, "beta_end": 1e-9}, "betas of at most 1e-09 add no noise"),
    (NEW, {"trained_betas": [0.0, 0.1], "layer_timesteps": [1, 0, -1]}, "abar is 1 at 0, .*: raise the first beta"),
    (NEW, {**NO_SIGNAL, "layer_timesteps": [2, 0]}, "abar is 0 at 2, .*: start lower"),
    (NEW, {**NO_SIGNAL, "layer_timesteps": [[1, 0, -1], [2, 0]]}, "abar is 0 at 2"),
    (NEW, {"trained_betas": [0.1, 0.2], "layer_timesteps": [[1, 0, -1], [2, 0]]}, "starts beyond the 2 betas"),
    # trained grids
    (NEW, {"layer_timesteps": 500}, "no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": "many"}, "no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": [None, 0]}, "no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": [500]}, "no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": [500.5, 0]}, "no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": ["500", "0"]}, "no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": [[500, 0], 5]}, r"layer_timesteps\[1\]=\[5\] is no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": [[440, 0], []]}, r"layer_timesteps\[1\]=\[\] is no grid of at least 1 layer"),
    (NEW, {"layer_timesteps": [500, 500, 0]}, "not strictly descending"),
    (NEW, {"layer_timesteps": [[440, 0], [220, 440, 0]]}, r"layer_timesteps\[1\]=.* is not strictly descending"),
    (NEW, {"layer_timesteps": [1000, 0]}, f"leaves the teacher's clock: {CLOCK}"),
    (NEW, {"layer_timesteps": [500, 0, -2]}, "leaves the teacher's clock"),
    (NEW, {"layer_timesteps": [[440, 0], [500, 0]]}, r"grids of \[1, 1\] steps: give each number of steps one grid"),
    # noise scales
    (NEW, {"noise_scale": "1"}, "noise_scale='1': give a number > 0 or a list"),
    (NEW, {"noise_scale": 0.0}, "give a number > 0"),
    (NEW, {"noise_scale": float("inf")}, "give a number > 0"),
    (NEW, {"layer_timesteps": [500, 0], "noise_scale": [[1.0]]}, "give a number > 0 or a list"),
    (NEW, {"layer_timesteps": [500, 0], "noise_scale": [float("nan")]}, "give a number > 0"),
    (NEW, {"layer_timesteps": GRID, "noise_scale": [1.0, -1.0, 1.0, 1.0, 1.0]}, "give a number > 0"),
    (NEW, {"noise_scale": [1.0, 1.0]}, "it needs a grid"),
    (NEW, {"layer_timesteps": GRID, "noise_scale": [1.0, 1.0]}, "noise_scale has 2 numbers: it needs 5 numbers"),
    (NEW, {"layer_timesteps": GRIDS, "noise_scale": [1.0] * 7}, "7 numbers, for 3 grids: give one number for all"),
    # the grid that is asked for
    *((set_steps, {"scheduler_options": {}, "num_inference_steps": n}, f"{n!r} steps: give a whole number from 1 to")
      for n in ("5", 2.5, True, float("nan"))),
    *((set_steps, {"scheduler_options": TRAINED, "num_inference_steps": n},
       f"num_inference_steps={n!r}, but this sampler was trained for 5 steps.*: pass num_inference_steps=5")
      for n in (50, "5", 2.5, float("nan"))),
    *((set_steps, {"scheduler_options": SEVERAL, "num_inference_steps": n},
       f"num_inference_steps={n!r}, but .* trained for 1, 2 or 4 steps.*: pass num_inference_steps=1, 2 or 4")
      for n in (3, "2")),
    *((set_steps, {"scheduler_options": {}, "timesteps": timesteps}, "strictly descending integers from 999 to 0")
      for timesteps in ([0, 500], [500, 500], [1000, 500], [500, -1], [500.5, 0], [], "many")),
    *((set_steps, {"scheduler_options": TRAINED, "timesteps": timesteps}, "trained for 5 steps.*pass num_inference")
      for timesteps in (GRID, GRID[1:-1], [800, 600, 400, 200, 0])),
    (set_steps, {"scheduler_options": SEVERAL, "timesteps": [440, 330]}, r"timesteps=\[440, 330\], but this sampler"),
    (set_steps, {"scheduler_options": {}}, "pass num_inference_steps"),
    (set_steps, {"scheduler_options": {}, "num_inference_steps": 2, "timesteps": [5, 1]}, "both given: pass one of"),
    (set_steps, {"scheduler_options": NO_SIGNAL, "num_inference_steps": 3}, "abar is 0 at 2, .*: start lower"),
    (set_steps, {"scheduler_options": {}, "sigmas": [1.0, 0.5]}, "sigmas are of a rectified flow, and this scheduler"),
    # a step
    (lambda: NEW().step(torch.zeros(SHAPE), 10, torch.zeros(SHAPE)), {}, "call set_timesteps"),
    (step, {"output": (4, 5, 8, 8)}, "must be equal, or the output must have twice the channels"),
    (step, {"output": (4, 3, 4, 4)}, "must be equal"),
    (step, {"dtypes": (torch.float32, torch.int64)}, "the sample torch.int64: give floating-point"),
    (step, {"dtypes": (torch.uint8, torch.float32)}, "model_output is torch.uint8 .*: give floating-point"),
    (step, {"at": torch.tensor([800, 512])}, "2 timesteps for 4 samples"),
    (step, {"at": "800"}, "timestep='800': give a number or a tensor"),
    (step, {"at": 1000}, "is off the clock: give integers from 0 to 999"),
    (step, {"at": -1}, "is off the clock"),
    *((step, {"at": at, "scheduler_options": options, "method": method, "dtypes": (dtype, dtype)},
       r"(timestep|level) \[800.5.*\] is off the clock: give integers from 0 to 999")
      for at in (800.5, FLOATS, FLOATS[0]) for options in (TRAINED, {}) for dtype in (torch.float32, torch.float64)
      for method in ("step", "transition", "predict")),
    (step, {"at": 555}, r"timestep \[555\] is not an input of a layer.*trained at \[800, 512"),
    (step, {"at": 330, "scheduler_options": SEVERAL}, r"\[330\] is not an input of a layer: the grid that is set, of 2 "
     r"steps, was trained at \[440, 220\]: there are grids of 1, 2 or 4 steps, call set_timesteps\(T\)"),
    *((step, {"noise_scale": torch.ones(shape), "method": method},
       r"noise_scale has shape .*: give one that broadcasts to the sample, \(4, 3")
      for shape in [(5, 3, 8, 8), (1, 1, 3, 8, 8), (2, 8, 8)] for method in ("step", "transition")),
    (step, {"output": (4, 1, 8, 8), "sample": (4, 1, 8, 8), "noise_scale": torch.ones(1, 3, 8, 8)}, "noise_scale has"),
    *((step, {"variance_noise": torch.ones(shape)}, r"variance_noise has shape .*: give that of the sample, \(4, 3")
      for shape in [(1, 3, 8, 8), (3, 8, 8), (2, 4, 3, 8, 8)]),
    (step, {"variance_noise": torch.ones(SHAPE), "generator": torch.Generator()}, "both given: pass the source"),
    (step, {"scheduler_options": {**TRAINED, "noise_scale_type": "per_pixel"}},
     "no noise_scale was given: sample with HSIVIPipeline"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_a_remedy(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_what_a_noise_prediction_does_not_determine_others_do():
    HSIVIScheduler(**NO_SIGNAL).set_timesteps(timesteps=[1, 0])
    HSIVIScheduler(**NO_SIGNAL, prediction_type="v_prediction").set_timesteps(3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (9, 7)])
def test_low_noise_keeps_what_is_below_the_cutoff_and_nothing_above(size, dtype):
    scheduler = HSIVIScheduler(layer_timesteps=[440, 0], noise_cutoff=2.5)
    noise = torch.randn(4, 2, *size, dtype=torch.float64).to(dtype)
    low = scheduler.low_pass(noise)
    assert (low.dtype, low.shape) == (dtype, noise.shape)
    u, v = (torch.fft.fftfreq(side, 1 / side) for side in size)
    kept = (u[:, None] ** 2 + v**2).sqrt() <= 2.5
    before, after = (torch.fft.fft2(each.double()) for each in (noise, low))
    tolerance = 1e-5 + 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(after, before * kept, atol=tolerance, rtol=0)
    torch.testing.assert_close(scheduler.low_pass(low), low, atol=tolerance, rtol=0)
    scheduler.step(low, 440, low)  # is accepted
    with pytest.raises(ValueError, match="noise above 2.5 cycles"):
        scheduler.step(noise, 440, noise)
    assert HSIVIScheduler().low_pass(noise) is noise


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_cutoff": 0.0, "layer_timesteps": [440, 0]}, "noise_cutoff=0.0"),
        ({"noise_cutoff": 8.0}, "noise_cutoff=8.0 is of a trained grid of one step: set it to None"),
        (
            {"noise_cutoff": 8.0, "layer_timesteps": [440, 220, 0]},
            "noise_cutoff=8.0 is of a trained grid of one step",
        ),
    ],
)
def test_a_cutoff_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HSIVIScheduler(**settings)
