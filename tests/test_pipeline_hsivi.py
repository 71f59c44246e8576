import copy
import json
import re
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file

import hsivi_diffusers
from hsivi_diffusers import HSIVINoiseScale, HSIVIPipeline, HSIVIScheduler
from hsivi_diffusers.pipeline_hsivi import check_finite_weights
from tiny_unet import make_unet

GRID = [700, 400, 100, 0]
CPU = torch.device("cpu")
# diffusers renamed the argument.
DTYPE = "dtype" if re.search(r"^ +dtype \(", DiffusionPipeline.from_pretrained.__doc__, re.M) else "torch_dtype"
BOTH_NOISE_SCALES = pytest.mark.parametrize("noise_scale_type", ["config", "per_pixel"])


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_pipeline(unet, **options):
    noise_scale = None
    if options.get("noise_scale_type") == "per_pixel":
        noise_scale = HSIVINoiseScale(sample_shape=(1, 8, 8))
        torch.nn.init.normal_(noise_scale.log_scale)
    scheduler = HSIVIScheduler(**{"layer_timesteps": GRID, **options})
    return quiet(HSIVIPipeline(unet=unet, scheduler=scheduler, unet_noise_scale=noise_scale))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipeline, **options):
    return pipeline(batch_size=3, generator=seeded(), output_type="pt", **options).images


def test_it_calls_the_network_once_for_each_layer(unet):
    calls = []
    unet.register_forward_pre_hook(lambda _, inputs: calls.append(int(inputs[1])))
    pipeline = make_pipeline(unet)
    assert pipeline.num_timesteps == 3
    draw(pipeline)
    assert calls == GRID[:-1]
    assert pipeline.num_timesteps == 3


def test_images_are_those_of_the_scheduler_by_hand(unet):
    pipeline = make_pipeline(unet)
    generator = seeded()
    x = torch.randn(3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for timestep in GRID[:-1]:
            x = pipeline.scheduler.step(unet(x, timestep).sample, timestep, x, generator=generator).prev_sample
    assert torch.equal(draw(pipeline), (x / 2 + 0.5).clamp(0, 1))


def test_the_per_pixel_noise_scale_is_used(unet):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    first = draw(pipeline)
    with torch.no_grad():
        pipeline.unet_noise_scale.log_scale.zero_()
    assert not torch.equal(draw(pipeline), first)
    torch.testing.assert_close(draw(pipeline), draw(make_pipeline(unet)))


@pytest.mark.parametrize(
    ("channels", "dtype", "mode"), [(1, torch.float32, "L"), (3, torch.float32, "RGB"), (3, torch.bfloat16, "RGB")]
)
def test_all_output_types_show_the_same_images(channels, dtype, mode):
    pipeline = make_pipeline(make_unet(in_channels=channels, out_channels=channels).eval()).to(dtype)
    drawn = {name: pipeline(3, seeded(), output_type=name).images for name in ("latent", "pt", "np", "pil")}
    tensor = (drawn["latent"] / 2 + 0.5).clamp(0, 1)
    assert tensor.shape == (3, channels, 8, 8)
    assert tensor.dtype == dtype
    assert torch.equal(drawn["pt"], tensor)
    array = tensor.float().permute(0, 2, 3, 1).numpy()
    assert drawn["np"].dtype == np.float32
    np.testing.assert_array_equal(drawn["np"], array)
    assert [(type(image), image.mode) for image in drawn["pil"]] == [(Image.Image, mode)] * 3
    bytes_of = np.stack([np.array(image).reshape(8, 8, channels) for image in drawn["pil"]])
    np.testing.assert_array_equal(bytes_of, (array * 255).round().astype("uint8"))


def test_return_dict_false_gives_a_tuple_of_the_images(unet):
    pipeline = make_pipeline(unet)
    result = pipeline(3, seeded(), output_type="pt", return_dict=False)
    assert type(result) is tuple
    assert torch.equal(*result, draw(pipeline))


@BOTH_NOISE_SCALES
def test_a_list_of_generators_gives_the_images_of_single_draws(unet, noise_scale_type):
    pipeline = make_pipeline(unet, noise_scale_type=noise_scale_type)
    together = pipeline(3, generator=[seeded(5), seeded(6), seeded(7)], output_type="pt").images
    alone = torch.cat([pipeline(1, generator=seeded(seed), output_type="pt").images for seed in (5, 6, 7)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_latents_take_the_place_of_the_first_draw(unet):
    pipeline = make_pipeline(unet, noise_eta=0.0)
    latents = torch.randn(3, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(draw(pipeline), pipeline(3, latents=latents, output_type="pt").images)


def test_a_callback_sees_and_may_replace_the_state(unet):
    pipeline, seen = make_pipeline(unet), []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        assert type(timestep) is int
        seen.append((step, timestep, *tensors))
        return {"latents": torch.zeros(3, 1, 8, 8)} if step == 2 else tensors

    images = draw(pipeline, callback_on_step_end=callback)
    assert seen == [(0, 700, "latents"), (1, 400, "latents"), (2, 100, "latents")]
    assert torch.equal(images, torch.full_like(images, 0.5))
    seen.clear()
    draw(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen == [(0, 700), (1, 400), (2, 100)]


def test_without_a_trained_grid_any_count_goes_but_none(unet):
    pipeline = make_pipeline(unet, layer_timesteps=None)
    for steps in (7, 4):
        assert draw(pipeline, num_inference_steps=steps).shape == (3, 1, 8, 8)
        assert pipeline.num_timesteps == steps
    with pytest.raises(ValueError, match="no trained grid .* pass num_inference_steps"):
        draw(pipeline)


def test_class_labels_reach_the_network():
    pipeline = make_pipeline(make_unet(num_class_embeds=3).eval())
    assert not torch.equal(draw(pipeline, class_labels=[0, 0, 0]), draw(pipeline, class_labels=torch.tensor([1, 1, 1])))
    with pytest.raises(ValueError, match="needs class_labels"):
        draw(pipeline)
    for labels in ([0, 1], [0.5, 1.0, 2.0]):
        with pytest.raises(ValueError, match=r"class_labels has shape .* expected \(3,\) integers"):
            draw(pipeline, class_labels=labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 50}, "pass num_inference_steps=3"),
        ({"latents": torch.zeros(3, 1, 4, 4)}, r"latents has shape \(3, 1, 4, 4\): expected \(3, 1, 8, 8\)"),
        ({"batch_size": 0}, "ask for a whole number of images, at least 1"),
        ({"batch_size": 2.0}, "batch_size=2.0: ask for a whole number"),
        ({"batch_size": "a cat"}, "batch_size='a cat': ask for a whole number"),
        ({"generator": [torch.Generator()]}, "1 generators for batch_size=3"),
        ({"generator": [torch.Generator()] * 4}, "4 generators for batch_size=3"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown"),
        ({"class_labels": [1, 1, 1]}, "takes no class_labels"),
        ({"guidance_scale": 2}, "guidance_scale=2: this sampler was trained with no guidance: leave it out, or give 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\]"),
    ],
)
def test_bad_calls_are_refused(unet, options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(unet)(**{"batch_size": 3, **options})


def test_a_guidance_of_1_is_none(unet):
    assert torch.equal(draw(make_pipeline(unet), guidance_scale=1), draw(make_pipeline(unet)))
    guided = HSIVIScheduler(layer_timesteps=GRID, guidance_scale=[4.0, 2.0])
    assert [guided.guidance_index(scale) for scale in (None, 2, 4)] == [0, 0, 1]
    with pytest.raises(ValueError, match="guidance_scale=1: .* trained with guidance of scale 2.0 or 4.0: give"):
        guided.guidance_index(1)


def test_the_number_of_images_may_be_of_numpy(unet):
    pipeline = make_pipeline(unet)
    assert torch.equal(pipeline(np.int64(3), seeded(), output_type="pt").images, draw(pipeline))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float16),
        (float("inf"), torch.bfloat16),
        (float("nan"), torch.float32),
        (float("inf"), torch.float32),
        (-float("inf"), torch.float64),
    ],
)
def test_weights_that_are_not_finite_are_refused_before_anything_is_drawn(unet, value, dtype, tmp_path):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel").to(dtype)
    for part, name, weight in (
        (unet, "unet", unet.conv_out.bias),
        (pipeline.unet_noise_scale, "unet_noise_scale", pipeline.unet_noise_scale.log_scale),
    ):
        pipeline.save_pretrained(tmp_path)
        with torch.no_grad():
            kept = weight.flatten()[0].clone()
            weight.view(-1)[0] = value
        with pytest.raises(ValueError, match=f"{name} has weights that are NaN or infinite, the first in .*: its"):
            HSIVIPipeline(**pipeline.components)
        part.save_pretrained(tmp_path / name)
        for cls in (HSIVIPipeline, DiffusionPipeline):
            with pytest.raises(ValueError, match=f"{name} has weights that are NaN or infinite"):
                cls.from_pretrained(tmp_path)
        with torch.no_grad():
            weight.view(-1)[0] = kept


def test_weights_that_are_not_there_yet_or_of_8_bits_are_not_looked_at(unet):
    check_finite_weights(torch.nn.Linear(2, 2, device="meta"), "unet")
    check_finite_weights(torch.nn.Linear(2, 2).to(torch.float8_e4m3fn), "unet")
    check_finite_weights(torch.nn.Embedding(0, 2), "unet")
    large = torch.nn.Linear(2, 1, dtype=torch.float16)
    torch.nn.init.constant_(large.weight, 65504)  # of which the sum is infinite
    check_finite_weights(large, "unet")


@pytest.mark.parametrize("size", [0, 50, 2000, -100])
def test_a_damaged_file_of_weights_is_called_damaged(unet, tmp_path, size):
    make_pipeline(unet).save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged or incomplete: download it again"):
        HSIVIPipeline.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        HSIVIPipeline.from_pretrained(tmp_path)


def test_the_folder_of_a_run_stands_for_its_pipeline(unet, tmp_path):
    make_pipeline(unet).save_pretrained(tmp_path / "pipeline")
    one, other = (HSIVIPipeline.from_pretrained(folder) for folder in (tmp_path, tmp_path / "pipeline"))
    assert all(map(torch.equal, one.unet.state_dict().values(), other.unet.state_dict().values()))


def test_a_pipeline_with_another_in_a_folder_of_that_name_is_itself(unet, tmp_path):
    for folder, steps in ((tmp_path, 2), (tmp_path / "pipeline", 3)):
        scheduler = HSIVIScheduler(layer_timesteps=[*range(10 * steps, -1, -10)])
        HSIVIPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    assert HSIVIPipeline.from_pretrained(tmp_path).num_timesteps == 2


SD = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "scheduler": "PNDM"}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("StableDiffusionPipeline", SD),
        ("LDMPipeline", {"vqvae": "VQModel", "unet": "UNet2DModel", "scheduler": "DDIMScheduler"}),
        ("DiTPipeline", {"transformer": "DiTTransformer2DModel", "scheduler": "DDIMScheduler"}),
    ],
)
def test_a_pipeline_of_another_kind_is_named_before_its_weights_are_loaded(tmp_path, kind, parts):
    index = {"_class_name": kind, "safety_checker": [None, None], **{n: ["diffusers", c] for n, c in parts.items()}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = (
        f"is a {kind} of {', '.join(sorted(parts))}: HSIVIPipeline draws with a UNet2DModel alone. "
        f"Load this one with {kind}.from_pretrained"
    )
    with pytest.raises(ValueError, match=message):
        HSIVIPipeline.from_pretrained(tmp_path)


def test_bad_components_are_refused(unet):
    with pytest.raises(ValueError, match="got a EDMEulerScheduler, which has neither betas nor a rectified flow: EDM"):
        HSIVIPipeline(unet=unet, scheduler=EDMEulerScheduler())
    for flow in (FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(ValueError, match="this model was not distilled"):
            HSIVIPipeline(unet=unet, scheduler=flow)
    with pytest.raises(ValueError, match="got a DDIMScheduler: this model was not distilled"):
        HSIVIPipeline(unet=unet, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="unet_noise_scale is None: pass the HSIVINoiseScale"):
        HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(noise_scale_type="per_pixel"))
    for scheduler in (None, "ddim"):
        with pytest.raises(ValueError, match=f"got scheduler={scheduler!r}: pass an HSIVIScheduler"):
            HSIVIPipeline(unet=unet, scheduler=scheduler)
        with pytest.raises(ValueError, match=f"got scheduler={scheduler!r}: pass an HSIVIScheduler"):
            HSIVIPipeline.from_pipe(make_pipeline(unet), scheduler=scheduler)


def test_the_scheduler_swaps_into_a_stock_pipeline(unet):
    stock = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    stock.scheduler = HSIVIScheduler.from_config(stock.scheduler.config, layer_timesteps=GRID, clip_sample=False)
    images = quiet(stock)(batch_size=3, generator=seeded(), num_inference_steps=3, output_type="np").images
    np.testing.assert_array_equal(images, draw(make_pipeline(unet)).permute(0, 2, 3, 1).numpy())
    with pytest.raises(ValueError, match="pass num_inference_steps=3"):
        stock(batch_size=3)


def test_non_square_samples():
    pipeline = make_pipeline(make_unet(sample_size=(8, 16)).eval())
    assert draw(pipeline).shape == (3, 1, 8, 16)


def test_the_latents_of_a_callback_are_the_input_of_the_next_layer(unet):
    start = torch.randn(3, 1, 8, 8, generator=seeded(1))

    def callback(pipe, step, timestep, tensors):
        return {"latents": start} if step == 0 else tensors

    images = draw(make_pipeline(unet, noise_eta=0.0), callback_on_step_end=callback)
    rest = make_pipeline(unet, noise_eta=0.0, layer_timesteps=GRID[1:])
    assert torch.equal(images, draw(rest, latents=start))


def test_a_callback_that_returns_nothing_changes_nothing(unet):
    pipeline, seen = make_pipeline(unet), []
    images = draw(pipeline, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(step))
    assert seen == [0, 1, 2]
    assert torch.equal(images, draw(pipeline))


class Blank(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": torch.zeros(3, 1, 8, 8)}


def test_the_callback_class_of_diffusers_works_and_may_not_ask_for_other_tensors(unet):
    pipeline, callback = make_pipeline(unet), Blank()
    assert torch.equal(draw(pipeline, callback_on_step_end=callback), torch.full((3, 1, 8, 8), 0.5))
    callback.tensor_inputs = ["prompt_embeds"]
    with pytest.raises(ValueError, match="prompt_embeds"):
        draw(pipeline, callback_on_step_end=callback)


def test_the_progress_bar_counts_the_network_calls_and_can_be_named_or_left_out(unet, capsys):
    pipeline = make_pipeline(unet)
    draw(pipeline)
    assert capsys.readouterr() == ("", "")
    pipeline.set_progress_bar_config(desc="Drawing")
    draw(pipeline)
    assert re.search(r"Drawing: 100%.* 3/3 ", capsys.readouterr().err)


def test_latents_given_are_left_as_they_are(unet):
    latents = torch.randn(3, 1, 8, 8, generator=seeded())
    before = latents.clone()
    doubled = {"callback_on_step_end": lambda *args: {"latents": args[3]["latents"].mul_(2)}}
    draw(make_pipeline(unet), latents=latents, **doubled)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_class_labels_of_any_integer_type_give_the_same_images(dtype):
    pipeline = make_pipeline(make_unet(num_class_embeds=3).eval())
    images = draw(pipeline, class_labels=torch.tensor([0, 1, 2], dtype=dtype))
    assert torch.equal(images, draw(pipeline, class_labels=[0, 1, 2]))


@pytest.mark.parametrize("label", [3, -1])
def test_class_labels_that_are_no_class_are_refused(label):
    pipeline = make_pipeline(make_unet(num_class_embeds=3).eval())
    with pytest.raises(ValueError, match="class_labels"):
        draw(pipeline, class_labels=[0, 1, label])


# ----- files -----


@pytest.mark.parametrize("cls", [HSIVIPipeline, DiffusionPipeline])
@pytest.mark.parametrize("classes", [None, 3])
@BOTH_NOISE_SCALES
def test_a_saved_pipeline_gives_identical_images(tmp_path, cls, classes, noise_scale_type):
    pipeline = make_pipeline(make_unet(num_class_embeds=classes).eval(), noise_scale_type=noise_scale_type)
    pipeline.save_pretrained(tmp_path / "new" / "folder")
    loaded = quiet(cls.from_pretrained(tmp_path / "new" / "folder"))
    assert type(loaded) is HSIVIPipeline
    labels = {"class_labels": [0, 1, 2]} if classes else {}
    assert torch.equal(draw(loaded, **labels), draw(pipeline, **labels))


@BOTH_NOISE_SCALES
def test_a_saved_folder_names_our_classes_carries_their_code_and_holds_no_pickles(unet, tmp_path, noise_scale_type):
    make_pipeline(unet, noise_scale_type=noise_scale_type).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors", ".py"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["unet"]) == ("HSIVIPipeline", ["diffusers", "UNet2DModel"])
    assert index["scheduler"] == ["hsivi_diffusers", "HSIVIScheduler"]
    sources = {"pipeline.py": "pipeline_hsivi.py", "scheduler/hsivi_diffusers.py": "scheduling_hsivi.py"}
    if noise_scale_type == "per_pixel":
        assert index["unet_noise_scale"] == ["hsivi_diffusers", "HSIVINoiseScale"]
        sources["unet_noise_scale/hsivi_diffusers.py"] = "modeling_hsivi.py"
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")} == set(sources)
    for copied, source in sources.items():
        assert (tmp_path / copied).read_bytes() == Path(hsivi_diffusers.__file__).with_name(source).read_bytes()


def test_saving_over_an_earlier_save_takes_its_place(unet, tmp_path):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    pipeline.save_pretrained(tmp_path)
    with torch.no_grad():
        unet.conv_out.bias.add_(0.5)
        pipeline.unet_noise_scale.log_scale.add_(0.5)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(quiet(HSIVIPipeline.from_pretrained(tmp_path))), draw(pipeline))


def test_pickles_are_refused_before_anything_is_written(unet, tmp_path):
    with pytest.raises(ValueError, match="would write pickles: leave it out"):
        make_pipeline(unet).save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_variant_lies_beside_the_full_weights_and_both_load(unet, tmp_path):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    half = copy.deepcopy(pipeline).to(torch.float16)
    pipeline.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16")
    for component in ("unet", "unet_noise_scale"):
        names = {path.name for path in (tmp_path / component).glob("*.safetensors")}
        assert names == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    for saved, options in ((pipeline, {}), (half, {"variant": "fp16", DTYPE: torch.float16})):
        loaded = quiet(HSIVIPipeline.from_pretrained(tmp_path, **options))
        assert loaded.unet.dtype == loaded.unet_noise_scale.dtype == saved.dtype
        assert torch.equal(draw(loaded), draw(saved))


# Noise of double precision is another draw, so there it is left out.
@pytest.mark.parametrize(
    ("dtype", "noise_eta", "tolerance"),
    [(torch.float16, 0.2, 0.05), (torch.bfloat16, 0.2, 0.1), (torch.float64, 0.0, 1e-4)],
)
def test_another_precision_draws_nearly_the_same_images(unet, tmp_path, dtype, noise_eta, tolerance):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel", noise_eta=noise_eta)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(HSIVIPipeline.from_pretrained(tmp_path, **{DTYPE: dtype}))
    latents = torch.randn(3, 1, 8, 8, generator=seeded(1))
    images = draw(loaded, latents=latents)
    assert images.dtype == loaded.unet_noise_scale.dtype == dtype
    torch.testing.assert_close(images.float(), draw(pipeline, latents=latents), rtol=0, atol=tolerance)
    assert torch.equal(draw(pipeline.to("cpu", dtype)), draw(loaded))


# ----- where it comes from -----


def test_a_teacher_is_refused_and_the_remedies_of_the_error_work(teacher_folder):
    with pytest.raises(ValueError, match=r"not distilled\. Distil it with .*HSIVIScheduler.from_pretrained"):
        HSIVIPipeline.from_pretrained(teacher_folder)
    teacher = DDPMPipeline.from_pretrained(teacher_folder)
    scheduler = HSIVIScheduler.from_config(teacher.scheduler.config)
    pipeline = quiet(HSIVIPipeline.from_pretrained(teacher_folder, scheduler=scheduler))
    assert draw(pipeline, num_inference_steps=4).shape == (3, 1, 8, 8)


def test_a_folder_of_stock_classes_is_refused_until_it_gets_our_scheduler(unet, tmp_path):
    pipeline = make_pipeline(unet, noise_scale=[1.0, 0.9, 0.8])
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler.from_config(pipeline.scheduler.config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of a distilled sampler: .* scheduler=HSIVIScheduler.from_pretrained\("):
        HSIVIPipeline.from_pretrained(tmp_path)
    scheduler = HSIVIScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.equal(draw(quiet(HSIVIPipeline.from_pretrained(tmp_path, scheduler=scheduler))), draw(pipeline))


def test_a_text_conditional_unet_is_sent_to_its_stock_pipeline():
    blocks = {"down_block_types": ["DownBlock2D"], "mid_block_type": None, "up_block_types": ["UpBlock2D"]}
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=[8], norm_num_groups=4, **blocks)
    with pytest.raises(ValueError, match="got a UNet2DConditionModel.* stock pipeline .* assign the HSIVIScheduler"):
        HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(layer_timesteps=GRID))


def test_from_pipe_takes_the_network_of_a_stock_pipeline_and_gives_it_back(unet):
    stock, scheduler = DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), HSIVIScheduler(layer_timesteps=GRID)
    pipeline = quiet(HSIVIPipeline.from_pipe(stock, scheduler=scheduler))
    assert pipeline.unet is unet
    assert pipeline.scheduler is scheduler
    images = draw(pipeline)
    assert torch.equal(images, draw(make_pipeline(unet)))
    stock = quiet(DDPMPipeline.from_pipe(pipeline))
    assert torch.equal(draw(quiet(HSIVIPipeline.from_pipe(stock))), images)
    array = stock(3, seeded(), num_inference_steps=3, output_type="np").images
    np.testing.assert_array_equal(array, images.permute(0, 2, 3, 1).numpy())


@BOTH_NOISE_SCALES
@pytest.mark.parametrize(
    "make",
    [lambda pipeline: HSIVIPipeline(**pipeline.components), HSIVIPipeline.from_pipe, copy.deepcopy],
    ids=["components", "from_pipe", "deepcopy"],
)
def test_a_pipeline_made_of_another_gives_identical_images(unet, noise_scale_type, make):
    pipeline = make_pipeline(unet, noise_scale_type=noise_scale_type)
    other = quiet(make(pipeline))
    assert (other.unet is unet) == (make is not copy.deepcopy)
    assert torch.equal(draw(other), draw(pipeline))


def test_from_pipe_leaves_the_scale_behind_where_the_scheduler_wants_none(unet):
    source = make_pipeline(unet, noise_scale_type="per_pixel")
    pipeline = quiet(HSIVIPipeline.from_pipe(source, scheduler=HSIVIScheduler(layer_timesteps=GRID)))
    assert pipeline.unet_noise_scale is None
    assert source.unet_noise_scale is not None
    assert torch.equal(draw(pipeline), draw(make_pipeline(unet)))


def test_one_network_may_have_several_grids(unet, tmp_path):
    grids = [[440, 220, 0], [500, 0], [440, 330, 220, 110, 0]]
    pipeline = make_pipeline(unet, layer_timesteps=grids, noise_eta=1.0)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(HSIVIPipeline.from_pretrained(tmp_path))
    assert loaded.num_timesteps == 4
    for grid in grids:
        images = draw(loaded, num_inference_steps=len(grid) - 1)
        assert loaded.num_timesteps == len(grid) - 1
        assert torch.equal(images, draw(make_pipeline(unet, layer_timesteps=grid, noise_eta=1.0)))
    assert torch.equal(draw(loaded), images)
    with pytest.raises(ValueError, match="trained for 1, 2 or 4 steps.*pass num_inference_steps=1, 2 or 4"):
        loaded(1, num_inference_steps=3)
    stock = DDPMPipeline(unet=unet, scheduler=DDPMScheduler.from_config(loaded.scheduler.config))
    with pytest.raises(ValueError, match="carries the settings of a distilled sampler: pass scheduler="):
        HSIVIPipeline.from_pipe(stock)


# ----- hooks that move or cast the weights -----


def offload_layers(pipeline):
    for model in (pipeline.unet, pipeline.unet_noise_scale):
        accelerate.cpu_offload(model, execution_device=CPU)
    assert pipeline.unet.conv_in.weight.device.type == "meta"


def offload_groups(pipeline):
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("this torch cannot be asked for an accelerator where there is none")
    for model in (pipeline.unet, pipeline.unet_noise_scale):
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def offload_models(pipeline):
    networks = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert set(pipeline.model_cpu_offload_seq.split("->")) == networks
    pipeline.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offload", [offload_layers, offload_groups, offload_models])
def test_offloading_changes_no_image(unet, dtype, offload):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel").to(dtype)
    images = draw(pipeline)
    offload(pipeline)
    for _ in range(2):  # hooks are set anew after a call
        assert torch.equal(draw(pipeline), images)


def test_offloaded_models_are_moved_back_after_the_call(unet):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    offload_models(pipeline)
    hooks = list(pipeline._all_hooks)
    draw(pipeline)
    assert len(pipeline._all_hooks) == len(hooks) == 2
    assert not {*map(id, pipeline._all_hooks)} & {*map(id, hooks)}


def test_layerwise_casting_draws_in_the_compute_precision_with_rounded_weights(unet):
    rounded = copy.deepcopy(unet)
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.to(torch.bfloat16).to(torch.float32)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    images = draw(make_pipeline(unet))
    assert images.dtype == torch.float32
    assert torch.equal(images, draw(make_pipeline(rounded)))


def test_a_noise_scale_that_is_not_wanted_or_of_other_samples_is_refused(unet):
    with pytest.raises(ValueError, match="noise_scale_type is 'config' and unet_noise_scale is given: leave it out"):
        HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(), unet_noise_scale=HSIVINoiseScale(sample_shape=(1, 8, 8)))
    with pytest.raises(ValueError, match=r"sample_shape \(1, 4, 4\), the unet \(1, 8, 8\)"):
        HSIVIPipeline(
            unet=unet,
            scheduler=HSIVIScheduler(noise_scale_type="per_pixel"),
            unet_noise_scale=HSIVINoiseScale(sample_shape=(1, 4, 4)),
        )


def test_another_scheduler_assigned_later_is_refused_at_the_call(unet):
    pipeline = make_pipeline(unet)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="got a DDIMScheduler: this model was not distilled"):
        pipeline(1, num_inference_steps=3)
    pipeline.scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale_type="per_pixel")
    with pytest.raises(ValueError, match="noise_scale_type is 'per_pixel' and unet_noise_scale is None"):
        pipeline(1)


def test_a_unet_of_no_size_takes_it_from_the_latents():
    pipeline = make_pipeline(make_unet(sample_size=None).eval())
    assert pipeline(2, latents=torch.randn(2, 1, 16, 8), output_type="pt").images.shape == (2, 1, 16, 8)
    with pytest.raises(ValueError, match="has no sample_size: pass latents"):
        pipeline(2)


def test_each_set_has_one_student_stored_in_half_precision_that_draws_in_single_precision():
    folders = sorted((Path(__file__).parents[1] / "assets/students").glob("*/pipeline"))
    assert [folder.parent.name for folder in folders] == ["digits_t4", "emoji_t4", "fashion_t4"]
    for folder in folders:
        stored = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        assert {weights.dtype for weights in stored.values()} == {torch.float16}
        pipeline = quiet(HSIVIPipeline.from_pretrained(folder))
        assert {weights.dtype for weights in pipeline.unet.parameters()} == {torch.float32}
        assert pipeline(1, seeded(), output_type="pt", return_dict=False)[0].std() > 0.05
