"""A LoRA of ours with its scheduler in other stock pipelines of a Stable Diffusion than text to image."""

from inspect import signature

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.distillation.state import trained
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.teachers.adapters import add_adapter, save_adapter
from hsivi_diffusers.teachers.stable_diffusion import StableDiffusion
from tiny_text import MIDDLE, make_scheduler, make_sd

SIZE = 16  # pixels; latents have half of it
LATENTS = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(1))
IMAGE = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a LoRA that changes the network a good deal, as a run saves it."""
    folder = tmp_path_factory.mktemp("lora")
    unet = add_adapter(make_parts()["unet"], StableDiffusion.adapter, 4)
    with torch.no_grad():
        for weight in trained(unet):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    save_adapter(unet, folder, StableDiffusion.adapter.prefix, "hash")
    grid = [899, 500, 200, 0]
    HSIVIScheduler.from_config(make_scheduler().config, layer_timesteps=grid).save_pretrained(folder / "scheduler")
    return folder


def make_parts():
    """The parts of a Stable Diffusion of four channels, which inpainting asks for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_sd(channels=4, **MIDDLE).components


def make(kind, adapter=None, **parts):
    """A stock pipeline, with a LoRA as a card says."""
    taken = {name: part for name, part in make_parts().items() if name in signature(kind).parameters}
    pipeline = kind(**taken, **parts)
    if adapter is not None:
        pipeline.load_lora_weights(adapter, weight_name=ADAPTER)
        pipeline.scheduler = HSIVIScheduler.from_pretrained(adapter, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **given):
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 3, "guidance_scale": 1, "output_type": "pt", "generator": generator}
    return pipeline("a red cat", **settings, **given)


@pytest.fixture(scope="module")
def image(adapter):
    """What the text-to-image pipeline draws; the LoRA shows in it."""
    drawn = draw(make(StableDiffusionPipeline, adapter), latents=LATENTS).images
    without = make(StableDiffusionPipeline)
    without.scheduler = HSIVIScheduler.from_pretrained(adapter, subfolder="scheduler")
    assert (drawn - draw(without, latents=LATENTS).images).abs().max() > 0.05
    return drawn


def without_noise(adapter):
    """The scheduler of layers without noise, whose images follow from the latents alone."""
    scheduler = HSIVIScheduler.from_pretrained(adapter, subfolder="scheduler")
    return HSIVIScheduler.from_config(scheduler.config, noise_eta=0.0)


def reconstruction(pipeline):
    """The image as the autoencoder has it."""
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * IMAGE - 1).latent_dist.sample(torch.Generator().manual_seed(0))
        return (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def test_a_controlnet_that_says_nothing_changes_nothing(adapter, image):
    """As a new one does, whose last convolutions are 0."""
    controlnet = ControlNetModel.from_unet(make_parts()["unet"], conditioning_embedding_out_channels=(16, 32))
    pipeline = make(StableDiffusionControlNetPipeline, adapter, controlnet=controlnet)
    torch.testing.assert_close(draw(pipeline, image=IMAGE, latents=LATENTS).images, image)
    with torch.no_grad():
        controlnet.controlnet_mid_block.weight.fill_(0.5)
    assert (draw(pipeline, image=IMAGE, latents=LATENTS).images - image).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.67])
def test_inpainting_keeps_what_is_not_masked_and_draws_the_rest(adapter, strength):
    pipeline, still = make(StableDiffusionInpaintPipeline, adapter), make(StableDiffusionPipeline, adapter)
    pipeline.scheduler = still.scheduler = without_noise(adapter)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    given = {"image": IMAGE, "latents": LATENTS, "strength": strength, "height": SIZE, "width": SIZE}
    torch.testing.assert_close(draw(pipeline, mask_image=mask, **given).images, reconstruction(pipeline))
    drawn, image = draw(pipeline, mask_image=1 - mask, **given).images, draw(still, latents=LATENTS).images
    assert drawn.allclose(image, atol=1e-5) == (strength == 1)
    assert (drawn - reconstruction(pipeline)).abs().max() > 0.3


def test_each_frame_of_a_still_motion_is_the_image(adapter):
    """Of a motion module whose last layers are 0."""
    motion = MotionAdapter((8, 16), 1, motion_norm_num_groups=4, motion_num_attention_heads=2)
    with torch.no_grad():
        for name, weight in motion.named_parameters():
            if "proj_out" in name:
                weight.zero_()
    pipeline, still = (
        make(AnimateDiffPipeline, adapter, motion_adapter=motion),
        make(StableDiffusionPipeline, adapter),
    )
    pipeline.scheduler = still.scheduler = without_noise(adapter)
    frames = draw(pipeline, num_frames=3, latents=LATENTS[:, :, None].repeat(1, 1, 3, 1, 1)).frames
    image = draw(still, latents=LATENTS).images
    torch.testing.assert_close(frames[0], image.repeat(3, 1, 1, 1))
