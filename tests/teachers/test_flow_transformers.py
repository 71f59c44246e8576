"""Rectified-flow transformers: the velocity of their stock pipelines, and students in these pipelines."""

from functools import partial
from inspect import signature

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hsivi_diffusers import HSIVIConfig, HSIVIScheduler, load_teacher
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.loading import kind_of, load_student, read_teacher
from short_run import SETTINGS, train
from tiny_flows import FLOWS, OF_ANY_SIZE, SIZES, USUAL_SIZE, make_flow
from tiny_text import PROMPTS

CPU = torch.device("cpu")
SHORT = {"prompts": PROMPTS, "guidance_scale": 3.0, "lora_rank": 2, "validation_steps": 0}


@pytest.fixture(params=FLOWS)
def kind(request):
    return request.param


@pytest.fixture
def size(kind):
    """Height and width of the images."""
    return SIZES.get(kind, USUAL_SIZE)


@pytest.fixture
def stock(size):
    return partial(draw_stock, size)


def draw_stock(size, pipeline, **given):
    """Draws with a stock pipeline, of which some take no generator or negative prompt."""
    known = signature(pipeline.__call__).parameters
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    given = {"height": size[0], "width": size[1], "generator": generator, "output_type": "pt", **given}
    given["use_resolution_binning"] = False
    return pipeline([*PROMPTS], **{name: value for name, value in given.items() if name in known}).images


def make_teacher(kind, **scheduler):
    teacher = load_teacher(make_flow(kind, **scheduler))
    teacher.resize(SIZES.get(kind, USUAL_SIZE))
    teacher.encode_prompts(PROMPTS, "blurry", CPU)
    return teacher


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_velocity_is_that_of_the_stock_pipeline(kind, scale, stock):
    """At each step, of each prompt, guided or not."""
    seen, pipeline = [], make_flow(kind)
    teacher = make_teacher(kind)
    step = pipeline.scheduler.step

    def spy(velocity, time, x, **options):
        seen.append((velocity, time, x))
        return step(velocity, time, x, **options)

    pipeline.scheduler.step = spy
    stock(pipeline, negative_prompt=["blurry"] * len(PROMPTS), num_inference_steps=3, **teacher.guided(scale))
    assert len(seen) == 3
    guided, rows = Guided(teacher, [scale]), torch.arange(len(PROMPTS))
    for velocity, time, x in seen:
        ours = guided(teacher.unpack(x), torch.full((len(rows),), float(time)), rows)
        torch.testing.assert_close(ours, teacher.unpack(velocity), rtol=1e-4, atol=5e-6)


def test_each_row_may_have_its_own_level(kind):
    """And a prompt of its own length."""
    teacher = make_teacher(kind)
    x, rows, levels = torch.randn(3, *teacher.shape), torch.tensor([2, 0, 3]), torch.tensor([999, 500, 20])
    whole = teacher.denoise(teacher.network, x, levels, rows)[0]
    for i in range(3):
        one = teacher.denoise(teacher.network, x[i : i + 1], levels[i : i + 1], rows[i : i + 1])[0]
        torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)


def test_a_run_ends_in_a_file_that_the_stock_pipeline_loads(kind, size, stock, tmp_path):
    """At eta 0 also without our scheduler: the steps of FlowMatchEuler on the student's sigmas."""
    make_flow(kind).save_pretrained(tmp_path / "teacher")
    config = {**SHORT, "resolution": size, "noise_eta": 0.0, "learning_rate": 1e-2, "num_inference_steps": 2}
    trainer = train(tmp_path / "teacher", tmp_path / "run", **config)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    before = stock(pipeline, num_inference_steps=2)
    pipeline.load_lora_weights(tmp_path / "run" / "pipeline", weight_name=ADAPTER)
    pipeline.scheduler = ours = HSIVIScheduler.from_pretrained(tmp_path / "run" / "pipeline", subfolder="scheduler")
    assert ours.config.resolution == size
    given = {"num_inference_steps": 2, **type(trainer.state.teacher).unguided(ours)}
    drawn = stock(pipeline, **given)
    assert (drawn - before).abs().max() > 1e-3
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=ours.config.shift)
    torch.testing.assert_close(stock(pipeline, **given, sigmas=ours.unshifted_sigmas), drawn, rtol=1e-4, atol=1e-5)
    loaded = load_student(tmp_path / "run" / "pipeline")
    torch.testing.assert_close(stock(loaded, **given), drawn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock(trainer.pipeline, **given), drawn, rtol=1e-4, atol=1e-5)


def test_noise_of_layers_is_drawn_again_from_the_same_seed(kind, stock):
    pipeline = make_flow(kind)
    pipeline.scheduler = HSIVIScheduler.from_config(
        pipeline.scheduler.config, layer_timesteps=[999, 500, 0], noise_eta=1.0, use_dynamic_shifting=False
    )
    first, again = stock(pipeline, num_inference_steps=2), stock(pipeline, num_inference_steps=2)
    assert torch.equal(first, again)


def test_a_shift_that_depends_on_the_size_is_that_of_the_pipeline(kind, stock):
    pipeline = make_flow(kind, use_dynamic_shifting=True, base_shift=0.3, max_shift=2.0)
    if kind in OF_ANY_SIZE:
        with pytest.raises(ValueError, match="noise levels depend on the size of images: turn it off"):
            load_teacher(pipeline)
        return
    seen, teacher = [], make_teacher(kind, use_dynamic_shifting=True, base_shift=0.3, max_shift=2.0)
    own = pipeline.scheduler.set_timesteps

    def spy(num_inference_steps=None, device=None, sigmas=None, mu=None):
        seen.append(mu)
        own(num_inference_steps, device, sigmas=sigmas, mu=mu)

    pipeline.scheduler.set_timesteps = spy
    stock(pipeline, num_inference_steps=2)
    assert teacher.schedule.config.shift == pytest.approx(torch.tensor(seen[0]).exp().item())
    assert not teacher.schedule.config.use_dynamic_shifting


def test_images_are_decoded_as_the_pipeline_does(kind, size, stock):
    pipeline, teacher = make_flow(kind), make_teacher(kind)
    latents = stock(pipeline, num_inference_steps=1, output_type="latent")
    torch.testing.assert_close(teacher.decode(teacher.unpack(latents)), stock(pipeline, num_inference_steps=1))
    assert teacher.image_shape == (3, *size)


def test_a_size_that_does_not_fit_is_refused(kind):
    teacher = load_teacher(make_flow(kind))
    unit = teacher.factor * teacher.patch
    for size in ([unit], [unit - 1, unit], [0, unit]):
        with pytest.raises(ValueError, match=f"give height and width, multiples of {unit}"):
            teacher.resize(size)


def test_the_shapes_of_prompts_are_known_from_the_config(kind):
    teacher = make_teacher(kind)
    shapes = type(teacher).prompt_shapes(teacher.network)
    encoded = teacher.conditions.files[0]
    assert {name: shape[1:] for name, shape in shapes.items()} == {name: encoded[name].shape[2:] for name in encoded}


@pytest.mark.parametrize("kind", ["lumina2", "zimage"])
def test_a_plan_has_prompts_of_full_length(kind, size, tmp_path, monkeypatch):
    """Lengths are numbers, which fake tensors do not have."""
    make_flow(kind).save_pretrained(tmp_path)
    config = HSIVIConfig(**{**SETTINGS, **SHORT}, resolution=size)

    def count_flops():
        with FakeTensorMode(allow_non_fake_inputs=True):
            meter = plan.Meter()
            teacher = plan.make_fake_state(str(tmp_path), None, config, meter).teacher
            with meter, FlopCounterMode(display=False) as flops, torch.no_grad():
                zero = torch.zeros(1, dtype=torch.long)
                teacher.call(teacher.network, torch.randn(1, *teacher.shape), zero, zero)
        return flops.get_total_flops()

    kind = kind_of(make_flow(kind))
    whole, shapes = count_flops(), kind.prompt_shapes(read_teacher(str(tmp_path)).network)
    half = {name: (length // 2, *rest) for name, (length, *rest) in shapes.items()}
    monkeypatch.setattr(kind, "prompt_shapes", lambda network: half)
    assert count_flops() < 0.8 * whole


def test_auraflow_refuses_images_beyond_its_positions():
    teacher = load_teacher(make_flow("auraflow"))
    teacher.resize([32, 32])
    with pytest.raises(ValueError, match="positions for 32 x 32 at most"):
        teacher.resize([32, 36])


def test_sana_says_its_size_because_its_pipeline_draws_1024_pixels_by_default():
    assert load_teacher(make_flow("sana")).schedule.config.resolution == [64, 64]


def test_z_image_turbo_is_refused_by_its_name(tmp_path):
    pipeline = make_flow("zimage")
    pipeline.save_pretrained(tmp_path / "Z-Image-Turbo")
    pipeline.transformer.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo/transformer")
    for teacher in (tmp_path / "Z-Image-Turbo", pipeline):
        with pytest.raises(ValueError, match="distilled already"):
            load_teacher(teacher)


def test_teacher_and_student_are_drawn_again_with_the_same_prompts(kind, size):
    """The pipeline of Z-Image writes its template into the list of prompts, which would get it twice."""
    pipeline, prompts = make_flow(kind), [*PROMPTS]
    teacher = load_teacher(pipeline)
    teacher.resize(size)
    config = {"layer_timesteps": [999, 500, 0], "resolution": size, "guidance_scale": 3.0}
    pipeline.scheduler = HSIVIScheduler.from_config(pipeline.scheduler.config, **config, use_dynamic_shifting=False)
    ways = [partial(teacher.draw_teacher, num_inference_steps=2, guidance_scale=3.0, negative_prompt="")]
    ways.append(partial(type(teacher).draw, pipeline))
    for draw in ways:
        first, again = (draw(prompts, [torch.Generator().manual_seed(seed) for seed in range(3)]) for _ in range(2))
        first, again = (drawn[0] if isinstance(drawn, tuple) else drawn for drawn in (first, again))
        assert [image.size for image in first] == [(size[1], size[0])] * 3
        assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


def test_the_template_of_a_tokenizer_counts_among_what_encodes():
    digests = set()
    for template in ("{{ messages[0]['content'] }}", "a {{ messages[0]['content'] }}"):
        pipeline = make_flow("zimage")
        pipeline.tokenizer.chat_template = template
        digests.add(load_teacher(pipeline).encoders_digest())
    assert len(digests) == 2
