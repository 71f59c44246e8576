import copy
import json
import re
from functools import partial
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
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
PER_PIXEL = HSIVIScheduler(noise_scale_type="per_pixel")


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
    return pipeline(**{"batch_size": 3, "generator": seeded(), "output_type": "pt", **options}).images


@pytest.fixture
def pipeline(unet):
    return make_pipeline(unet)


def test_images_are_those_of_the_scheduler_by_hand_in_one_call_a_layer(unet):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    generator, calls, scale = seeded(), [], pipeline.unet_noise_scale()
    x = torch.randn(3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for timestep in GRID[:-1]:
            output = unet(x, timestep).sample
            x = pipeline.scheduler.step(output, timestep, x, generator=generator, noise_scale=scale).prev_sample
    unet.register_forward_pre_hook(lambda _, inputs: calls.append(int(inputs[1])))
    assert pipeline.num_timesteps == 3
    assert torch.equal(draw(pipeline), (x / 2 + 0.5).clamp(0, 1))
    assert calls == GRID[:-1]
    result = pipeline(np.int64(3), seeded(), output_type="pt", return_dict=False)
    assert type(result) is tuple
    assert torch.equal(*result, draw(pipeline))
    pipeline.unet_noise_scale.log_scale.data.zero_()
    torch.testing.assert_close(draw(pipeline), draw(make_pipeline(unet)))


@pytest.mark.parametrize(
    ("channels", "dtype", "mode"), [(1, torch.float32, "L"), (3, torch.float32, "RGB"), (3, torch.bfloat16, "RGB")]
)
def test_all_output_types_show_the_same_images(channels, dtype, mode):
    pipeline = make_pipeline(make_unet(in_channels=channels, out_channels=channels).eval()).to(dtype)
    drawn = {name: draw(pipeline, output_type=name) for name in ("latent", "pt", "np", "pil")}
    tensor = (drawn["latent"] / 2 + 0.5).clamp(0, 1)
    assert (tensor.shape, tensor.dtype) == ((3, channels, 8, 8), dtype)
    assert torch.equal(drawn["pt"], tensor)
    array = tensor.float().permute(0, 2, 3, 1).numpy()
    assert drawn["np"].dtype == np.float32
    np.testing.assert_array_equal(drawn["np"], array)
    assert [(type(image), image.mode) for image in drawn["pil"]] == [(Image.Image, mode)] * 3
    bytes_of = np.stack([np.array(image).reshape(8, 8, channels) for image in drawn["pil"]])
    np.testing.assert_array_equal(bytes_of, (array * 255).round().astype("uint8"))


def test_a_list_of_generators_gives_the_images_of_single_draws(unet):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    together = draw(pipeline, generator=[seeded(5), seeded(6), seeded(7)])
    alone = torch.cat([draw(pipeline, batch_size=1, generator=seeded(seed)) for seed in (5, 6, 7)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_latents_take_the_place_of_the_first_draw_and_are_left_as_they_are(unet):
    pipeline = make_pipeline(unet, noise_eta=0.0)
    latents = torch.randn(3, 1, 8, 8, generator=seeded())
    before = latents.clone()
    torch.testing.assert_close(draw(pipeline), draw(pipeline, latents=latents))
    draw(pipeline, latents=latents, callback_on_step_end=lambda *args: {"latents": args[3]["latents"].mul_(2)})
    assert torch.equal(latents, before)


@pytest.mark.parametrize(("size", "latents"), [((8, 16), None), (None, torch.randn(3, 1, 8, 16))])
def test_samples_need_not_be_square_and_the_unet_may_leave_their_size_to_the_latents(size, latents):
    assert draw(make_pipeline(make_unet(sample_size=size).eval()), latents=latents).shape == (3, 1, 8, 16)


class Blank(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": torch.zeros(3, 1, 8, 8)}


def test_a_student_without_fine_noise_gets_the_rest_and_no_other_pipeline_may_forget_it(unet, tmp_path):
    HSIVIPipeline(unet, HSIVIScheduler(layer_timesteps=[440, 0], noise_cutoff=2.0)).save_pretrained(tmp_path)
    pipeline = HSIVIPipeline.from_pretrained(tmp_path)
    scheduler, seeded = pipeline.scheduler, partial(torch.Generator().manual_seed, 3)
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    x, time = scheduler.low_pass(noise), scheduler.timesteps[0]
    expected = scheduler.step(pipeline.unet(x, time).sample, time, x).prev_sample
    for given in ({"generator": seeded()}, {"latents": noise}, {"latents": x}):
        drawn = pipeline(2, **given, output_type="latent").images
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match="noise above 2 cycles .* draw with HSIVIPipeline, or start from scheduler.low"
    ):
        DDPMPipeline(pipeline.unet, scheduler)(2, num_inference_steps=1)


def test_a_callback_sees_and_may_replace_the_state(unet):
    pipeline, seen, start = make_pipeline(unet, noise_eta=0.0), [], torch.randn(3, 1, 8, 8, generator=seeded(1))

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        assert type(timestep) is int
        seen.append((step, timestep, *tensors))
        return {"latents": start} if step == 0 and tensors else None

    rest = make_pipeline(unet, noise_eta=0.0, layer_timesteps=GRID[1:])
    assert torch.equal(draw(pipeline, callback_on_step_end=callback), draw(rest, latents=start))
    assert seen == [(0, 700, "latents"), (1, 400, "latents"), (2, 100, "latents")]
    seen.clear()
    images = draw(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert torch.equal(images, draw(pipeline))
    assert seen == [(0, 700), (1, 400), (2, 100)]
    blank = Blank()
    assert torch.equal(draw(pipeline, callback_on_step_end=blank), torch.full((3, 1, 8, 8), 0.5))
    blank.tensor_inputs = ["prompt_embeds"]
    with pytest.raises(ValueError, match="prompt_embeds"):
        draw(pipeline, callback_on_step_end=blank)


def test_without_a_trained_grid_any_count_goes_but_none(unet):
    pipeline = make_pipeline(unet, layer_timesteps=None)
    for steps in (7, 4):
        assert draw(pipeline, num_inference_steps=steps).shape == (3, 1, 8, 8)
        assert pipeline.num_timesteps == steps
    with pytest.raises(ValueError, match="no trained grid .* pass num_inference_steps"):
        draw(pipeline)


def test_class_labels_of_any_integer_type_reach_the_network():
    pipeline = make_pipeline(make_unet(num_class_embeds=3).eval())
    images = draw(pipeline, class_labels=[0, 1, 2])
    assert not torch.equal(images, draw(pipeline, class_labels=[1, 1, 1]))
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(images, draw(pipeline, class_labels=torch.tensor([0, 1, 2], dtype=dtype)))


def test_a_guidance_of_1_is_none(pipeline):
    assert torch.equal(draw(pipeline, guidance_scale=1), draw(pipeline))


@pytest.mark.parametrize(("scale", "place"), [(None, 0), (2, 0), (4, 1)])
def test_a_scale_of_guidance_reaches_the_network_beside_the_class(scale, place):
    """The last of four classes is none, and each has a label for either scale."""
    pipeline, labels = make_pipeline(make_unet(num_class_embeds=8).eval(), guidance_scale=[4.0, 2.0]), []
    pipeline.unet.register_forward_pre_hook(lambda *given: labels.append(given[2]["class_labels"]), with_kwargs=True)
    draw(pipeline, class_labels=[0, 1, 2], guidance_scale=scale)
    assert [each.tolist() for each in labels] == [[place, 2 + place, 4 + place]] * 3
    assert pipeline.num_classes == 3
    for bad in ({"guidance_scale": 1}, {"class_labels": [0, 1, 3]}):
        with pytest.raises(ValueError, match="trained with guidance of scale 2.0 or 4.0: give one|unet are 0 to 2"):
            draw(pipeline, **{"class_labels": [0, 1, 2], **bad})


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
        ({"unet": {"num_class_embeds": 3}}, "needs class_labels"),
        ({"unet": {"num_class_embeds": 3}, "class_labels": [0, 1]}, r"class_labels has shape .* expected \(3,\) int"),
        ({"unet": {"num_class_embeds": 3}, "class_labels": [0.5, 1.0, 2.0]}, r"class_labels has .* expected \(3,\)"),
        ({"unet": {"num_class_embeds": 3}, "class_labels": [0, 1, 3]}, "the classes of this unet are 0 to 2"),
        ({"unet": {"num_class_embeds": 3}, "class_labels": [0, 1, -1]}, "the classes of this unet are 0 to 2"),
        ({"unet": {"sample_size": None}}, "has no sample_size: pass latents"),
        ({"guidance_scale": 2}, "guidance_scale=2: this sampler was trained with no guidance: leave it out, or give 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\]"),
    ],
)
def test_bad_calls_are_refused(options, message):
    unet = make_unet(**options.pop("unet", {})).eval()
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(unet), **options)


def text_unet():
    blocks = {"down_block_types": ["DownBlock2D"], "mid_block_type": None, "up_block_types": ["UpBlock2D"]}
    return diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=[8], norm_num_groups=4, **blocks)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"scheduler": diffusers.ScoreSdeVeScheduler()},
            "ScoreSdeVeScheduler, which has no betas, and is neither of a rectified flow nor of EDM",
        ),
        ({"scheduler": diffusers.EDMEulerScheduler()}, "this model was not distilled"),
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "this model was not distilled"),
        ({"scheduler": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)}, "this model was not distilled"),
        ({"scheduler": DDIMScheduler()}, "got a DDIMScheduler: this model was not distilled"),
        ({"scheduler": None}, "got scheduler=None: pass an HSIVIScheduler"),
        ({"scheduler": "ddim"}, "got scheduler='ddim': pass an HSIVIScheduler"),
        ({"scheduler": PER_PIXEL}, "unet_noise_scale is None: pass the HSIVINoise"),
        ({"unet": text_unet()}, "got a UNet2DConditionModel.* stock pipeline .* assign the HSIVIScheduler"),
        ({"unet_noise_scale": HSIVINoiseScale((1, 8, 8))}, "unet_noise_scale is given: leave it out"),
        (
            {"scheduler": PER_PIXEL, "unet_noise_scale": HSIVINoiseScale((1, 4, 4))},
            r"\(1, 4, 4\), the unet \(1, 8, 8\)",
        ),
    ],
)
def test_bad_components_are_refused(unet, parts, message):
    with pytest.raises(ValueError, match=message):
        HSIVIPipeline(**{"unet": unet, "scheduler": HSIVIScheduler(), **parts})
    if not isinstance(parts.get("scheduler", 0), DDIMScheduler | HSIVIScheduler | int):
        with pytest.raises(ValueError, match=message):
            HSIVIPipeline.from_pipe(make_pipeline(unet), **parts)


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [("unet", float("nan"), torch.float16), ("unet_noise_scale", -float("inf"), torch.float32)],
)
def test_weights_that_are_not_finite_are_refused_before_anything_is_drawn(unet, name, value, dtype, tmp_path):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel").to(dtype)
    pipeline.save_pretrained(tmp_path)
    part = pipeline.components[name]
    next(part.parameters()).data.view(-1)[0] = value
    part.save_pretrained(tmp_path / name)
    calls = [lambda: HSIVIPipeline(**pipeline.components)]
    calls += [partial(cls.from_pretrained, tmp_path) for cls in (HSIVIPipeline, DiffusionPipeline)]
    for refused in calls:
        with pytest.raises(ValueError, match=f"{name} has weights that are NaN or infinite, the first in .*: its"):
            refused()


def test_weights_that_are_not_there_yet_or_of_8_bits_are_not_looked_at():
    check_finite_weights(torch.nn.Linear(2, 2, device="meta"), "unet")
    check_finite_weights(torch.nn.Linear(2, 2).to(torch.float8_e4m3fn), "unet")
    check_finite_weights(torch.nn.Embedding(0, 2), "unet")
    large = torch.nn.Linear(2, 1, dtype=torch.float16)
    torch.nn.init.constant_(large.weight, 65504)  # of which the sum is infinite
    check_finite_weights(large, "unet")


def test_the_progress_bar_counts_the_network_calls_and_can_be_named_or_left_out(pipeline, capsys):
    draw(pipeline)
    assert capsys.readouterr() == ("", "")
    pipeline.set_progress_bar_config(desc="Drawing")
    draw(pipeline)
    assert re.search(r"Drawing: 100%.* 3/3 ", capsys.readouterr().err)


# ----- files -----


@pytest.mark.parametrize(
    ("cls", "classes", "noise_scale_type"),
    [(HSIVIPipeline, 3, "per_pixel"), (DiffusionPipeline, 3, "config"), (DiffusionPipeline, None, "per_pixel")],
)
def test_a_saved_pipeline_gives_identical_images(tmp_path, cls, classes, noise_scale_type):
    """Also one that is saved over another."""
    labels = {"class_labels": [0, 1, 2]} if classes else {}
    for _ in range(2):
        unet = make_unet(num_class_embeds=classes).eval()
        pipeline = make_pipeline(unet, noise_scale_type=noise_scale_type)
        pipeline.save_pretrained(tmp_path / "new" / "folder")
        loaded = quiet(cls.from_pretrained(tmp_path / "new" / "folder"))
        assert type(loaded) is HSIVIPipeline
        assert torch.equal(draw(loaded, **labels), draw(pipeline, **labels))


@pytest.mark.parametrize("noise_scale_type", ["config", "per_pixel"])
def test_a_saved_folder_names_our_classes_carries_their_code_and_holds_no_pickles(unet, tmp_path, noise_scale_type):
    pipeline = make_pipeline(unet, noise_scale_type=noise_scale_type)
    with pytest.raises(ValueError, match="would write pickles: leave it out"):
        pipeline.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()
    pipeline.save_pretrained(tmp_path)
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


@pytest.mark.parametrize("size", [0, -100])
def test_a_damaged_file_of_weights_is_called_damaged(pipeline, tmp_path, size):
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged or incomplete: download it again"):
        HSIVIPipeline.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        HSIVIPipeline.from_pretrained(tmp_path)


# ----- where it comes from -----


def test_the_folder_of_a_run_stands_for_its_pipeline_unless_it_is_one_itself(unet, tmp_path):
    for folder, grid in ((tmp_path / "pipeline", [30, 20, 10, 0]), (tmp_path, [20, 10, 0])):
        make_pipeline(unet, layer_timesteps=grid).save_pretrained(folder)
        assert HSIVIPipeline.from_pretrained(tmp_path).num_timesteps == len(grid) - 1


@pytest.mark.parametrize("parts", [["scheduler", "text_encoder", "unet", "vae"], ["scheduler"]])
def test_a_pipeline_of_another_kind_is_named_before_its_weights_are_loaded(tmp_path, parts):
    kind = "StableDiffusionPipeline"
    index = {"_class_name": kind, "safety_checker": [None, None], **dict.fromkeys(parts, ["diffusers", "Model"])}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = (
        f"is a {kind} of {', '.join(parts)}: HSIVIPipeline draws with a UNet2DModel alone. Load this one with {kind}"
    )
    with pytest.raises(ValueError, match=f"{message}.from_pretrained"):
        HSIVIPipeline.from_pretrained(tmp_path)


def test_a_teacher_is_refused_and_the_remedies_of_the_error_work(teacher_folder):
    with pytest.raises(ValueError, match=r"not distilled\. Distil it with .*HSIVIScheduler.from_pretrained"):
        HSIVIPipeline.from_pretrained(teacher_folder)
    teacher = DDPMPipeline.from_pretrained(teacher_folder)
    scheduler = HSIVIScheduler.from_config(teacher.scheduler.config)
    pipeline = quiet(HSIVIPipeline.from_pretrained(teacher_folder, scheduler=scheduler))
    assert draw(pipeline, num_inference_steps=4).shape == (3, 1, 8, 8)


def test_a_folder_of_stock_classes_is_refused_until_it_gets_our_scheduler(unet, tmp_path):
    pipeline = make_pipeline(unet, noise_scale=[1.0, 0.9, 0.8])
    stock = DDPMPipeline(unet=unet, scheduler=DDPMScheduler.from_config(pipeline.scheduler.config))
    stock.save_pretrained(tmp_path)
    for refused in (lambda: HSIVIPipeline.from_pretrained(tmp_path), lambda: HSIVIPipeline.from_pipe(stock)):
        with pytest.raises(ValueError, match=r"of a distilled sampler: .* scheduler=HSIVIScheduler.from_pretrained\("):
            refused()
    scheduler = HSIVIScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.equal(draw(quiet(HSIVIPipeline.from_pretrained(tmp_path, scheduler=scheduler))), draw(pipeline))


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


def test_a_pipeline_made_of_another_gives_identical_images(unet):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    images = draw(pipeline)
    for make in (lambda pipeline: HSIVIPipeline(**pipeline.components), HSIVIPipeline.from_pipe, copy.deepcopy):
        other = quiet(make(pipeline))
        assert (other.unet is unet) == (make is not copy.deepcopy)
        assert torch.equal(draw(other), images)
    without = quiet(HSIVIPipeline.from_pipe(pipeline, scheduler=HSIVIScheduler(layer_timesteps=GRID)))
    assert without.unet_noise_scale is None
    assert torch.equal(draw(without), draw(make_pipeline(unet)))


def test_one_network_may_have_several_grids(unet, tmp_path):
    grids = [[440, 220, 0], [500, 0], [440, 330, 220, 110, 0]]
    make_pipeline(unet, layer_timesteps=grids, noise_eta=1.0).save_pretrained(tmp_path)
    loaded = quiet(HSIVIPipeline.from_pretrained(tmp_path))
    assert loaded.num_timesteps == 4
    for grid in grids:
        images = draw(loaded, num_inference_steps=len(grid) - 1)
        assert loaded.num_timesteps == len(grid) - 1
        assert torch.equal(images, draw(make_pipeline(unet, layer_timesteps=grid, noise_eta=1.0)))
    assert torch.equal(draw(loaded), images)


def test_another_scheduler_assigned_later_is_refused_at_the_call(pipeline):
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="got a DDIMScheduler: this model was not distilled"):
        pipeline(1, num_inference_steps=3)
    pipeline.scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale_type="per_pixel")
    with pytest.raises(ValueError, match="noise_scale_type is 'per_pixel' and unet_noise_scale is None"):
        pipeline(1)


def test_each_set_has_one_student_stored_in_half_precision_that_draws_in_single_precision():
    folders = sorted((Path(__file__).parents[1] / "assets/students").glob("*_t4/pipeline/unet"))
    assert [folder.parents[1].name for folder in folders] == ["digits_t4", "emoji_t4", "fashion_t4"]
    for folder in folders:
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert {weights.dtype for weights in stored.values()} == {torch.float16}
        pipeline = quiet(HSIVIPipeline.from_pretrained(folder.parent))
        assert {weights.dtype for weights in pipeline.unet.parameters()} == {torch.float32}
        assert pipeline(1, seeded(), output_type="pt", return_dict=False)[0].std() > 0.05


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


@pytest.mark.parametrize("offload", [offload_layers, offload_groups, offload_models])
def test_offloading_changes_no_image(unet, offload):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel").to(torch.float16)
    images = draw(pipeline)
    offload(pipeline)
    hooks = list(getattr(pipeline, "_all_hooks", []))
    for _ in range(2):  # models are moved back after a call, and hooks set anew
        assert torch.equal(draw(pipeline), images)
        assert len(getattr(pipeline, "_all_hooks", [])) == len(hooks)
        assert not any(new is old for new in getattr(pipeline, "_all_hooks", []) for old in hooks)


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
