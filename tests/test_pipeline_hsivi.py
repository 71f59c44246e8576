import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image

from hsivi_diffusers import HSIVINoiseScale, HSIVIPipeline, HSIVIScheduler
from tiny_unet import make_unet

GRID = [700, 400, 100, 0]


def make_pipeline(unet, **options):
    noise_scale = None
    if options.get("noise_scale_type") == "per_pixel":
        noise_scale = HSIVINoiseScale(sample_shape=(1, 8, 8))
        torch.nn.init.normal_(noise_scale.log_scale)
    scheduler = HSIVIScheduler(**{"layer_timesteps": GRID, **options})
    pipeline = HSIVIPipeline(unet=unet, scheduler=scheduler, unet_noise_scale=noise_scale)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipeline, **options):
    return pipeline(batch_size=3, generator=seeded(), output_type="pt", **options).images


def test_it_calls_the_network_once_for_each_layer(unet):
    calls = []
    unet.register_forward_pre_hook(lambda _, inputs: calls.append(int(inputs[1])))
    draw(make_pipeline(unet))
    assert calls == GRID[:-1]


def test_pictures_are_those_of_the_scheduler_by_hand(unet):
    pipeline = make_pipeline(unet)
    generator = seeded()
    x = torch.randn(3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for timestep in GRID[:-1]:
            x = pipeline.scheduler.step(unet(x, timestep).sample, timestep, x, generator=generator).prev_sample
    assert torch.equal(draw(pipeline), (x / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("noise_scale_type", ["config", "per_pixel"])
def test_a_saved_pipeline_gives_identical_pictures(unet, tmp_path, noise_scale_type):
    pipeline = make_pipeline(unet, noise_scale_type=noise_scale_type)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["hsivi_diffusers", "HSIVIScheduler"]
    if noise_scale_type == "per_pixel":
        assert index["unet_noise_scale"] == ["hsivi_diffusers", "HSIVINoiseScale"]
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json", ".safetensors"}
    loaded = HSIVIPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipeline))


def test_the_per_pixel_noise_scale_is_used(unet):
    pipeline = make_pipeline(unet, noise_scale_type="per_pixel")
    first = draw(pipeline)
    with torch.no_grad():
        pipeline.unet_noise_scale.log_scale.zero_()
    assert not torch.equal(draw(pipeline), first)
    torch.testing.assert_close(draw(pipeline), draw(make_pipeline(unet)))


def test_output_types(unet):
    pipeline = make_pipeline(unet)
    tensor = draw(pipeline)
    array = pipeline(3, seeded(), output_type="np").images
    pictures = pipeline(3, seeded()).images
    latents = pipeline(3, seeded(), output_type="latent").images
    assert tensor.shape == (3, 1, 8, 8)
    assert array.shape == (3, 8, 8, 1)
    assert isinstance(pictures[0], Image.Image)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.array(pictures[0]), (array[0, :, :, 0] * 255).round().astype("uint8"))
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), tensor)
    assert pipeline(1, return_dict=False)[0][0].size == (8, 8)


def test_a_list_of_generators_gives_each_picture_its_own(unet):
    pipeline = make_pipeline(unet)
    together = pipeline(2, generator=[seeded(5), seeded(6)], output_type="pt").images
    alone = pipeline(1, generator=[seeded(6)], output_type="pt").images
    torch.testing.assert_close(together[1:], alone)


def test_latents_take_the_place_of_the_first_draw(unet):
    pipeline = make_pipeline(unet, noise_eta=0.0)
    latents = torch.randn(3, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(draw(pipeline), pipeline(3, latents=latents, output_type="pt").images)


def test_a_callback_sees_and_may_replace_the_state(unet):
    pipeline, seen = make_pipeline(unet), []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    images = draw(pipeline, callback_on_step_end=callback)
    assert seen == [(0, 700), (1, 400), (2, 100)]
    assert torch.equal(images, torch.full_like(images, 0.5))
    assert pipeline.num_timesteps == 3


def test_without_a_trained_grid_any_count_goes(unet):
    pipeline = make_pipeline(unet, layer_timesteps=None)
    assert draw(pipeline, num_inference_steps=7).shape == (3, 1, 8, 8)
    assert pipeline.num_timesteps == 7


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
        ({"batch_size": 0}, "ask for at least 1 picture"),
        ({"generator": [torch.Generator()]}, "1 generators for batch_size=3"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown"),
        ({"class_labels": [1, 1, 1]}, "takes no class_labels"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\]"),
    ],
)
def test_bad_calls_are_refused(unet, options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(unet)(**{"batch_size": 3, **options})


def test_bad_components_are_refused(unet):
    with pytest.raises(ValueError, match="got a DDIMScheduler: pass HSIVIScheduler.from_config"):
        HSIVIPipeline(unet=unet, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="unet_noise_scale is None"):
        HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(noise_scale_type="per_pixel"))


def test_the_scheduler_swaps_into_a_stock_pipeline(unet):
    stock = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    stock.scheduler = HSIVIScheduler.from_config(stock.scheduler.config, layer_timesteps=GRID, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    images = stock(batch_size=3, generator=seeded(), num_inference_steps=3, output_type="np").images
    np.testing.assert_array_equal(images, draw(make_pipeline(unet)).permute(0, 2, 3, 1).numpy())
    with pytest.raises(ValueError, match="pass num_inference_steps=3"):
        stock(batch_size=3)


def test_non_square_samples():
    pipeline = make_pipeline(make_unet(sample_size=(8, 16)).eval())
    assert draw(pipeline).shape == (3, 1, 8, 16)
