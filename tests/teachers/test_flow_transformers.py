"""Rectified-flow transformers: the velocity of their stock pipelines, and students in these pipelines."""

import re
from functools import partial
from inspect import signature
from itertools import product
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIConfig, HSIVIScheduler, HSIVITrainer, load_teacher
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.runs.artifacts import ADAPTER, read_run
from hsivi_diffusers.share.card import make_adapter_card
from hsivi_diffusers.teachers.adapters import add_adapter
from hsivi_diffusers.teachers.flow_transformers import FlowTransformer
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.loading import kind_of, load_student
from hsivi_diffusers.teachers.prompts import digest_of
from hsivi_diffusers.teachers.solvers import make_scheduler, make_solver, run_solver
from hsivi_diffusers.teachers.teacher import Teacher
from short_run import SETTINGS, train
from slow import others_slow
from tiny_flows import FLOWS, OF_ANY_SIZE, make_flow, make_flux2, make_klein, size_of
from tiny_text import PROMPTS

CPU = torch.device("cpu")
SHORT = {"prompts": PROMPTS, "guidance_scale": 3.0, "lora_rank": 2, "validation_steps": 0}
QUICK = {"max_train_steps": 2, "critic_updates": 1, "lr_warmup_steps": 0}
USUAL = "sd3", "qwen", "zimage"  # whose latents, prompts and calls differ most


@pytest.fixture(params=others_slow(FLOWS, *USUAL))
def kind(request):
    return request.param


def stock(pipeline, prompts=PROMPTS, **given):
    """Draws with a stock pipeline, of which some take no generator or negative prompt."""
    known, (height, width) = signature(pipeline.__call__).parameters, size_of(pipeline)
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    given = {"height": height, "width": width, "generator": generator, "output_type": "pt", **given}
    given |= {"prompt": [*prompts], "use_resolution_binning": False}  # a copy, for Z-Image's writes into it
    return pipeline(**{name: value for name, value in given.items() if name in known}).images


def velocities(pipeline, prompts, **given):
    """What a stock pipeline hands to its scheduler in 3 steps: velocity, time and latents."""
    seen, step = [], pipeline.scheduler.step

    def spy(velocity, time, x, **options):
        seen.append((velocity, time, x))
        return step(velocity, time, x, **options)

    pipeline.scheduler.step = spy
    stock(pipeline, prompts, num_inference_steps=3, **given)
    assert len(seen) == 3
    return seen


@pytest.fixture(autouse=True)
def whole_prompts(monkeypatch):
    """Stock pipelines do not round what their encoders return."""
    monkeypatch.setattr(FlowTransformer, "prompt_dtype", None)


def make_teacher(kind, prompts=PROMPTS, **scheduler):
    teacher = load_teacher(pipeline := make_flow(kind, **scheduler))
    teacher.set_size(size_of(pipeline))
    takes_negative = "negative_prompt" in signature(pipeline.__call__).parameters
    teacher.encode_prompts(prompts, "blurry" if takes_negative else "", CPU)
    return teacher


@pytest.mark.parametrize(
    ("kind", "scale"), others_slow(product(FLOWS, [1.0, 3.0]), ("sd3", 1.0), *((kind, 3.0) for kind in FLOWS))
)
def test_the_velocity_is_that_of_the_stock_pipeline(kind, scale):
    """At each step, of each prompt, guided or not."""
    teacher = make_teacher(kind)
    negative = ["blurry"] * len(PROMPTS)
    seen = velocities(make_flow(kind), PROMPTS, negative_prompt=negative, **teacher.guided(scale))
    guided, rows = Guided(teacher, [scale]), torch.arange(len(PROMPTS))
    for velocity, time, x in seen:
        ours = guided(teacher.unpack(x), torch.full((len(rows),), float(time)), rows)
        torch.testing.assert_close(ours, teacher.unpack(velocity), rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("kind", others_slow(["chroma", "qwen", "lumina2", "zimage"], "zimage"))
def test_a_prompt_of_a_batch_has_the_velocity_that_it_has_alone(kind):
    """The pipeline takes each at its own length, and cuts what is too long; other rows are of other lengths."""
    prompts = ["blue", "a red cat", "a green dog a blue star " * 100]
    teacher = make_teacher(kind, prompts)
    guided, rows = Guided(teacher, [3.0]), torch.arange(3)
    for row, prompt in enumerate(prompts):
        seen = velocities(make_flow(kind), [prompt], negative_prompt=["blurry"], **teacher.guided(3.0))
        for velocity, time, x in seen:
            ours = guided(teacher.unpack(x).expand(3, -1, -1, -1), torch.full((3,), float(time)), rows)[[row]]
            torch.testing.assert_close(ours, teacher.unpack(velocity), rtol=1e-4, atol=5e-6)


def test_prompts_are_cut_to_the_length_that_is_given(kind):
    prompts = ["a red cat a blue star a green dog", "a blue star"]
    teacher = make_teacher(kind, prompts)
    digest = teacher.conditions.digest
    longest = {"lumina2": 40, "flux2": 40, "zimage": 34}.get(kind, 5)  # which have long templates
    identity = Teacher.identity(teacher)
    teacher.set_length(longest)
    assert Teacher.identity(teacher) == identity  # runs of other lengths have the same teacher
    teacher.encode_prompts(prompts, "", CPU)
    assert teacher.conditions.digest != digest
    assert teacher.call_arguments(teacher.schedule)["max_sequence_length"] == longest
    seen = velocities(make_flow(kind), prompts, max_sequence_length=longest, **teacher.guided(1.0))
    guided, rows = Guided(teacher, [1.0]), torch.arange(2)
    for velocity, time, x in seen:
        ours = guided(teacher.unpack(x), torch.full((2,), float(time)), rows)
        torch.testing.assert_close(ours, teacher.unpack(velocity), rtol=1e-4, atol=5e-6)


def test_a_length_that_no_call_takes_or_that_leaves_the_template_alone_is_refused():
    teacher = make_teacher("lumina2")
    with pytest.raises(ValueError, match="max_sequence_length=257: the pipeline of a Lumina2.* has 256 by default"):
        teacher.set_length(257)
    teacher.set_length(20)
    with pytest.raises(ValueError, match="max_sequence_length=20 leaves nothing of the prompts that tells them apart"):
        teacher.encode_prompts(PROMPTS, "", CPU)


@pytest.mark.parametrize("kind", ["chroma", "qwen"])
def test_gradient_checkpointing_changes_nothing(kind):
    """diffusers drops the mask of Chroma's single blocks under it."""
    teacher = make_teacher(kind)
    x, rows, network = torch.randn(3, *teacher.shape), torch.arange(3), teacher.network
    weight, outputs, gradients = next(network.transformer_blocks.parameters()), [], []
    for turn in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        turn()
        outputs.append(teacher.call(network, x, 500, rows))
        gradients += torch.autograd.grad(outputs[-1].square().sum(), weight)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_every_weight_of_an_adapter_has_a_gradient(kind):
    teacher = make_teacher(kind)
    network = add_adapter(teacher.network, teacher.adapter, 2)
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        torch.nn.init.normal_(weight)
    teacher.call(network, torch.randn(3, *teacher.shape), 500, torch.arange(3)).square().sum().backward()
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("kind", others_slow(["chroma", "qwen"], "qwen"))
def test_the_pipeline_of_a_teacher_guides_without_a_negative_prompt(kind):
    teacher = make_teacher(kind)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    plain, guided = (
        teacher.draw_teacher(PROMPTS[:2], [each.clone_state() for each in generators], 2, scale, "")[0]
        for scale in (1.0, 30.0)
    )
    assert [image.tobytes() for image in plain] != [image.tobytes() for image in guided]


def test_a_solver_draws_in_the_pipeline_of_a_teacher(kind):
    teacher = make_teacher(kind)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    noise = torch.cat([torch.randn(1, *teacher.shape, generator=each.clone_state()) for each in generators])
    draw = partial(teacher.draw_teacher, PROMPTS, num_inference_steps=3, guidance_scale=1.0, negative_prompt="")
    images, calls, name = draw([each.clone_state() for each in generators], solver="UniPC")
    assert (calls, name) == (3, "UniPC")
    stock, _, name = draw(generators)
    assert name.endswith("Scheduler")
    assert [image.tobytes() for image in images] != [image.tobytes() for image in stock]
    if kind in ("flux2", "klein"):  # whose pipelines draw the noise of patches
        return
    x = run_solver(Guided(teacher), make_scheduler("UniPC", teacher.schedule)[0], noise, 3, torch.arange(len(PROMPTS)))
    own = DiffusionPipeline.numpy_to_pil(teacher.decode(x).permute(0, 2, 3, 1).numpy())
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(images, own, strict=True))


def test_each_row_may_have_its_own_level(kind):
    """And a prompt of its own length."""
    teacher = make_teacher(kind)
    x, rows, levels = torch.randn(3, *teacher.shape), torch.tensor([2, 0, 3]), torch.tensor([999, 500, 20])
    whole = teacher.denoise(teacher.network, x, levels, rows)[0]
    for i in range(3):
        one = teacher.denoise(teacher.network, x[i : i + 1], levels[i : i + 1], rows[i : i + 1])[0]
        torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", others_slow(FLOWS, "zimage"))
def test_a_run_ends_in_a_file_that_the_stock_pipeline_loads(kind, tmp_path):
    """At eta 0 also without our scheduler: the steps of FlowMatchEuler on the student's sigmas, as the card says."""
    teacher, size = str(tmp_path / "teacher"), size_of(make_flow(kind))
    make_flow(kind).save_pretrained(teacher)
    config = {**SHORT, **QUICK, "resolution": size, "noise_eta": 0.0, "learning_rate": 1e-2, "num_inference_steps": 2}
    trainer = train(teacher, tmp_path / "run", **config)
    pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
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
    card = make_adapter_card(ours, str(tmp_path / "run" / "pipeline"), read_run(tmp_path / "run"), base_model=teacher)
    assert not re.search(r"\.\d{7}", card.text)
    images = []
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        names: dict = {}
        torch.manual_seed(0)
        exec(block, names)
        images.append(torch.from_numpy(np.array(names["images"][0], dtype=np.float32)))
    assert [image.shape for image in images] == [(*size, 3)] * 2
    torch.testing.assert_close(*images, rtol=0, atol=2)
    loaded = load_student(tmp_path / "run" / "pipeline")
    torch.testing.assert_close(stock(loaded, **given), drawn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock(trainer.pipeline, **given), drawn, rtol=1e-4, atol=1e-5)


def test_prompts_are_kept_in_half_the_bytes(monkeypatch):
    whole = make_teacher("sd3").conditions
    monkeypatch.setattr(FlowTransformer, "prompt_dtype", torch.bfloat16)
    half = make_teacher("sd3").conditions
    assert {each.dtype for each in half.files[0].values() if each.is_floating_point()} == {torch.bfloat16}
    rows, like = torch.tensor([1, 3]), torch.zeros(1)
    given, rounded = (each.arguments(rows, like) for each in (whole, half))
    for name, value in rounded.items():
        assert torch.equal(value, given[name].bfloat16().float())


TAKING_IMAGES = [
    *(("sd3", f"StableDiffusion3{what}") for what in ("Img2Img", "Inpaint")),
    *(("flux", f"Flux{what}") for what in ("Img2Img", "Inpaint")),
    ("chroma", "ChromaImg2Img"),  # ChromaInpaintPipeline of diffusers 0.42 asks for a config that no Chroma has
    *(("qwen", f"QwenImage{what}") for what in ("Img2Img", "Inpaint")),
    ("klein", "Flux2KleinInpaint"),
    *(("zimage", f"ZImage{what}") for what in ("Img2Img", "Inpaint")),
]


CONTROLLED = [("sd3", "StableDiffusion3", "SD3"), ("flux", "Flux", "Flux"), ("qwen", "QwenImage", "QwenImage")]


def derived(kind, name, **parts):
    """Another pipeline of the parts of a family, with a scheduler of a student, and the arguments of its images."""
    pipeline = getattr(diffusers, f"{name}Pipeline").from_pipe(stock := make_flow(kind), **parts)
    pipeline.set_progress_bar_config(disable=True)
    grid = [999, 749, 500, 250, -1]
    pipeline.scheduler = HSIVIScheduler(prediction_type="flow_prediction", layer_timesteps=grid, noise_eta=0.0)
    given = {"prompt": "a red cat", "num_inference_steps": 4, "height": 16, "width": 24, "output_type": "pt"}
    return pipeline, {**given, **kind_of(stock).unguided(pipeline.scheduler)}


@pytest.mark.parametrize(("kind", "name"), others_slow(TAKING_IMAGES, *TAKING_IMAGES[:2], ("zimage", "ZImageImg2Img")))
def test_pipelines_that_take_an_image_draw_what_euler_draws(kind, name):
    pipeline, given = derived(kind, name)
    ours, euler = pipeline.scheduler, FlowMatchEulerDiscreteScheduler()
    given |= {"image": Image.new("RGB", (24, 16), "red"), "strength": 0.6}
    given |= {"mask_image": Image.new("L", (24, 16), 255)} if "Inpaint" in name else {}
    images = []
    for scheduler, more in ((ours, {}), (euler, {"sigmas": ours.unshifted_sigmas})):
        pipeline.scheduler = scheduler
        images.append(pipeline(**given, **more, generator=torch.Generator().manual_seed(0)).images)
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "network"),
    others_slow(CONTROLLED, CONTROLLED[0]),
)
def test_a_controlnet_that_says_nothing_changes_nothing(kind, name, network):
    """As a new one does, whose last layers are 0."""
    network = getattr(diffusers, f"{network}ControlNetModel")
    controlnet = network.from_config(make_flow(kind).transformer.config)
    pipeline, given = derived(kind, f"{name}ControlNet", controlnet=controlnet)
    teacher = make_teacher(kind)
    given |= {"latents": teacher.pack(torch.randn(1, *teacher.shape))}
    control, plain = {"control_image": Image.new("RGB", (24, 16), "red")}, derived(kind, name)[0](**given).images
    torch.testing.assert_close(pipeline(**given, **control).images, plain)
    torch.nn.init.eye_(controlnet.controlnet_blocks[0].weight)
    assert (pipeline(**given, **control).images - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", others_slow(["sd3", "flux", "klein", "zimage"], "sd3"))
def test_the_weights_of_a_style_add_to_those_of_a_student(kind, tmp_path):
    teacher = make_teacher(kind)
    for name in ("student", "style"):
        network = add_adapter(teacher.network, teacher.adapter, 2)
        for weight in network.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3)
        teacher.save(network, tmp_path / name)
    both, merged = make_flow(kind), make_flow(kind)
    before = stock(both, num_inference_steps=2)
    for name, scale in (("student", 1.0), ("style", 0.5)):
        both.load_lora_weights(tmp_path / name, weight_name=ADAPTER, adapter_name=name)
        state = load_file(tmp_path / name / ADAPTER)
        for path in {path.split(".lora_")[0] for path in state}:
            down, up = (state[f"{path}.lora_{factor}.weight"] for factor in "AB")
            merged.transformer.get_submodule(path.removeprefix("transformer.")).weight.data += scale * up @ down
    both.set_adapters(["student", "style"], [1.0, 0.5])
    drawn = stock(both, num_inference_steps=2)
    torch.testing.assert_close(drawn, stock(merged, num_inference_steps=2), rtol=1e-4, atol=1e-5)
    both.set_adapters(["student"])
    alone = stock(both, num_inference_steps=2)
    assert min((drawn - alone).abs().max(), (alone - before).abs().max()) > 1e-3


def test_noise_of_layers_is_drawn_again_from_the_same_seed(kind):
    pipeline = make_flow(kind)
    pipeline.scheduler = HSIVIScheduler.from_config(
        pipeline.scheduler.config, layer_timesteps=[999, 500, 0], noise_eta=1.0, use_dynamic_shifting=False
    )
    first, again = stock(pipeline, num_inference_steps=2), stock(pipeline, num_inference_steps=2)
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", others_slow(FLOWS, *USUAL, "flux2", *OF_ANY_SIZE))
def test_a_shift_that_depends_on_the_size_is_that_of_the_pipeline(kind):
    """At its default number of steps, on which that of FLUX.2 depends too."""
    pipeline = make_flow(kind, use_dynamic_shifting=True, base_shift=0.3, max_shift=2.0)
    if kind in OF_ANY_SIZE:
        with pytest.raises(ValueError, match="noise levels depend on the size of images: turn it off"):
            load_teacher(pipeline)
        return
    teacher = make_teacher(kind, use_dynamic_shifting=True, base_shift=0.3, max_shift=2.0)

    def spy(num_inference_steps=None, device=None, sigmas=None, mu=None):
        raise StopIteration(mu)  # the rest is not needed

    pipeline.scheduler.set_timesteps = spy
    with pytest.raises(StopIteration) as asked:
        stock(pipeline)
    assert teacher.schedule.config.shift == pytest.approx(torch.tensor(asked.value.value).exp().item())
    assert not teacher.schedule.config.use_dynamic_shifting


@pytest.mark.parametrize("kind", others_slow(FLOWS, *USUAL, "flux2", *OF_ANY_SIZE))
def test_images_are_decoded_as_the_pipeline_does(kind):
    """From the latents of the last step: some pipelines return scaled ones as output_type 'latent'."""
    pipeline, teacher, seen = make_flow(kind), make_teacher(kind), []

    def keep(pipeline, step, time, given):
        seen.append(given["latents"])
        return {}

    images = stock(pipeline, num_inference_steps=2, callback_on_step_end=keep)
    torch.testing.assert_close(teacher.decode(teacher.unpack(seen[-1])), images)
    assert teacher.image_shape == (3, *size_of(pipeline))


def test_a_size_that_does_not_fit_is_refused(kind):
    teacher = load_teacher(make_flow(kind))
    unit = teacher.factor * teacher.patch
    for size in ([unit], [unit - 1, unit], [0, unit]):
        with pytest.raises(ValueError, match=f"give height and width, multiples of {unit}"):
            teacher.set_size(size)


@pytest.mark.parametrize("kind", others_slow(FLOWS, *(kind for kind in FLOWS if kind != "flux2")))
def test_the_shapes_of_prompts_are_known_from_the_config(kind):
    teacher = make_teacher(kind)
    shapes = teacher.prompt_shapes()
    encoded = teacher.conditions.files[0]
    assert {name: shape[1:] for name, shape in shapes.items()} == {name: encoded[name].shape[2:] for name in encoded}


@pytest.mark.parametrize("kind", others_slow(["qwen", "zimage"], "qwen"))
def test_a_plan_has_prompts_of_full_length(kind, tmp_path, monkeypatch):
    """Lengths are numbers, which tensors without values do not have."""
    make_flow(kind).save_pretrained(tmp_path)
    config = HSIVIConfig(**{**SETTINGS, **SHORT}, resolution=size_of(make_flow(kind)))

    def count_flops(longest):
        config.max_sequence_length = longest
        meter = plan.Meter()
        teacher = plan.make_hollow_state(str(tmp_path), None, config, meter).teacher
        with meter, torch.no_grad():
            zero = torch.zeros(1, dtype=torch.long)
            teacher.call(teacher.network, torch.randn(1, *teacher.shape), zero, zero)
        return meter.flops

    whole = count_flops(None)
    assert count_flops(256) < 0.8 * whole
    assert count_flops(512) == whole


@pytest.mark.parametrize(("kind", "most"), [("auraflow", 32), ("sd3", 64), ("lumina2", 256), ("zimage", 64)])
def test_images_beyond_the_positions_of_a_network_are_refused(kind, most):
    teacher = make_teacher(kind)
    teacher.set_size([most, most])
    teacher.call(teacher.network, torch.randn(1, *teacher.shape), 500, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=f"positions for {most} x {most} at most: give a smaller size"):
        teacher.set_size([most, most + teacher.factor * teacher.patch])


def test_a_size_without_a_shift_is_refused():
    with pytest.raises(ValueError, match=r"resolution=\[100000, 100000\]: .* give a smaller size"):
        load_teacher(make_flow("flux")).set_size([100_000, 100_000])


def test_a_scheduler_with_betas_is_refused(kind):
    pipeline = make_flow(kind)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="is a rectified flow, and its DDIMScheduler not: give it"):
        load_teacher(pipeline)


@pytest.mark.parametrize("kind", others_slow(["sd3", "flux", "lumina2"], "sd3", "flux"))
def test_the_euler_baseline_has_the_grid_of_the_pipeline(kind):
    pipeline = make_flow(kind)
    solver = make_solver("Euler", 4, Guided(make_teacher(kind))).scheduler
    stock(pipeline, num_inference_steps=4)
    solver.set_timesteps(4)
    torch.testing.assert_close(solver.timesteps.float(), pipeline.scheduler.timesteps.float(), rtol=0, atol=1.0)


def test_sana_says_its_size_because_its_pipeline_draws_1024_pixels_by_default():
    assert load_teacher(make_flow("sana")).schedule.config.resolution == [64, 64]


def test_long_prompts_of_z_image_keep_their_length(monkeypatch):
    """Whose mask is kept in bfloat16, which cannot count beyond 256."""
    monkeypatch.setattr(FlowTransformer, "prompt_dtype", torch.bfloat16)
    teacher = make_teacher("zimage", ["a " + "a cat " * 115])
    (length,) = teacher.conditions.lengths("mask", torch.tensor([0]))
    assert length == teacher.conditions.files[0]["cap_feats"].shape[1] > 256


def test_the_guidance_of_a_run_is_its_own_whatever_else_guides():
    teacher = make_teacher("flux")
    x, rows = torch.randn(3, *teacher.shape), torch.arange(3)
    guided = Guided(teacher, [3.5])
    before = guided(x, 500.0, rows)
    assert not torch.equal(Guided(teacher)(x, 500.0, rows), before)
    assert torch.equal(guided(x, 500.0, rows), before)
    teacher.draw_teacher(PROMPTS, [torch.Generator().manual_seed(0) for _ in PROMPTS], 1, 1.0, "")
    assert teacher.guidance == 3.5


def test_z_image_turbo_is_refused_by_its_name(tmp_path):
    pipeline = make_flow("zimage")
    pipeline.save_pretrained(tmp_path / "Z-Image-Turbo")
    pipeline.transformer.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo/transformer")
    for teacher in (tmp_path / "Z-Image-Turbo", pipeline):
        with pytest.raises(ValueError, match="distilled already"):
            load_teacher(teacher)


@pytest.mark.parametrize("kind", others_slow(["sd3", "zimage"], "zimage"))
def test_teacher_and_student_are_drawn_again_with_the_same_prompts(kind):
    """The pipeline of Z-Image writes its template into the list of prompts, which would get it twice."""
    pipeline, prompts = make_flow(kind), [*PROMPTS]
    size = size_of(pipeline)
    teacher = load_teacher(pipeline)
    teacher.set_size(size)
    config = {"layer_timesteps": [999, 500, 0], "resolution": size, "guidance_scale": 3.0}
    pipeline.scheduler = HSIVIScheduler.from_config(pipeline.scheduler.config, **config, use_dynamic_shifting=False)
    ways = [
        lambda *given: teacher.draw_teacher(*given, 2, 3.0, "")[0],
        lambda *given: type(teacher).draw(pipeline, *given),
    ]
    for draw in ways:
        first, again = (draw(prompts, [torch.Generator().manual_seed(seed) for seed in range(3)]) for _ in range(2))
        assert [image.size for image in first] == [(size[1], size[0])] * 3
        assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


def test_flux2_klein_takes_no_negative_prompt_and_must_not_be_distilled():
    with pytest.raises(ValueError, match="negative_prompt='blurry': a Flux2KleinPipeline takes no negative prompt"):
        load_teacher(make_flow("klein")).check_students(HSIVIConfig(negative_prompt="blurry", guidance_scale=3.0))
    with pytest.raises(ValueError, match="is_distilled=True, so it is distilled already: give the base model"):
        load_teacher(make_klein(is_distilled=True))
    with pytest.raises(ValueError, match="guidance_embeds=False of the transformer.*: give FLUX.2-dev"):
        load_teacher(make_flux2(guidance_embeds=False))


def test_prompts_are_encoded_again_with_another_chat_template():
    """Of a tokenizer, or of a processor with a tokenizer, as FLUX.2-dev has."""
    tokenizer = make_klein().tokenizer
    parts = [tokenizer, *(SimpleNamespace(tokenizer=tokenizer, chat_template=text) for text in "ab")]
    given = {"config": {}, "encode_prompt": lambda prompt: prompt}
    digests = {digest_of("", SimpleNamespace(components={"tokenizer": part}, **given), {}) for part in parts}
    assert len(digests) == 3


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("kind", others_slow(["sd3", "flux"], "sd3"))
def test_a_teacher_stored_in_bfloat16_stays_so_as_the_base_of_adapters(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(FlowTransformer, "prompt_dtype", torch.bfloat16)
    pipeline = make_flow(kind).to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "half")
    pipeline.to(torch.float32).save_pretrained(tmp_path / "single")
    given = {**SHORT, **QUICK, "resolution": size_of(pipeline), "mixed_precision": "bf16", "learning_rate": 1e-2}
    whole, half = (train(tmp_path / name, tmp_path / f"{name}_run", **given) for name in ("single", "half"))
    assert half.state.teacher.loaded_half
    assert not whole.state.teacher.loaded_half
    assert half.state.identity["teacher_sha256"] == whole.state.identity["teacher_sha256"]
    assert half.state.teacher.weights_sha256 == whole.state.teacher.weights_sha256
    assert {each.dtype for each in half.state.teacher.load_encoders().values()} == {torch.bfloat16}
    assert half.state.teacher.vae.dtype == torch.float32
    files = [load_file(tmp_path / f"{name}_run" / "pipeline" / ADAPTER) for name in ("half", "single")]
    assert files[0].keys() == files[1].keys()
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in files[0].values())
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    student, other = (load_student(tmp_path / f"{name}_run" / "pipeline") for name in ("half", "single"))
    assert (student.transformer.dtype, other.transformer.dtype) == (torch.bfloat16, torch.float32)
    drawn = half.state.teacher.draw(student, PROMPTS, generators)
    teacher = load_teacher(tmp_path / "half")
    teacher.set_size(size_of(pipeline))
    drawn += teacher.draw_teacher(PROMPTS, generators, 2, 3.0, "")[0]
    assert [image.size for image in drawn] == [(24, 16)] * 6
    assert half.state.student.network.dtype == torch.bfloat16
    trainer = HSIVITrainer(str(tmp_path / "half"), HSIVIConfig(**{**SHORT, "lora_rank": 0}, mixed_precision="bf16"))
    assert trainer.state.student.network.dtype == torch.float32  # for all weights are trained
