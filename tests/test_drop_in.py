"""Our scheduler inside the stock pipelines of diffusers, on networks of random weights."""

import functools

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.share.card import make_card
from tiny_unet import make_unet

GRID = [700, 400, 100, 0]
WITH_PROMPTS = ["sd", "img2img", "sdxl", "pixart"]
WITH_GUIDANCE = [*WITH_PROMPTS, "dit"]
# What the scheduler_config.json of Stable Diffusion 1.5 (PNDM) and XL (Euler) have.
LATENT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


# ----- the pipelines, as they come, each with the scheduler of its published weights -----


def make_vae():
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()


def make_text_unet(**options):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        **options,
    ).eval()


def make_transformer(cls, **options):
    return cls(
        sample_size=8,
        patch_size=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        **options,
    ).eval()


def make_sd(cls=StableDiffusionPipeline, scheduler=None):
    absent = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    stock = PNDMScheduler(**LATENT_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    return cls(
        vae=make_vae(), unet=make_text_unet(), scheduler=scheduler or stock, requires_safety_checker=False, **absent
    )


def make_sdxl():
    absent = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    unet = make_text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 8
    )
    scheduler = EulerDiscreteScheduler(**LATENT_BETAS, timestep_spacing="leading")
    return StableDiffusionXLPipeline(vae=make_vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **absent)


def make_pixart():
    transformer = make_transformer(PixArtTransformer2DModel, cross_attention_dim=8, caption_channels=8)
    return PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=make_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def make_dit():
    transformer = make_transformer(DiTTransformer2DModel, num_embeds_ada_norm=1000)
    return DiTPipeline(transformer=transformer, vae=make_vae(), scheduler=DDIMScheduler(clip_sample=False))


MAKERS = {
    "ddpm": lambda: DDPMPipeline(unet=make_unet().eval(), scheduler=DDPMScheduler()),
    "ddim": lambda: DDIMPipeline(unet=make_unet().eval(), scheduler=DDPMScheduler()),
    "sd": make_sd,
    "img2img": lambda: make_sd(StableDiffusionImg2ImgPipeline),
    "sdxl": make_sdxl,
    "pixart": make_pixart,
    "dit": make_dit,
}


def make_pipe(name, **options):
    """Makes a stock pipeline; the options are those of our scheduler, which takes the place of the stock one."""
    pipe = MAKERS[name]()
    if options:
        swap(pipe, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def swap(pipe, **options):
    pipe.scheduler = HSIVIScheduler.from_config(pipe.scheduler.config, **options)


@pytest.fixture(params=MAKERS)
def pipe(request):
    return make_pipe(request.param)


# ----- calls -----


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=1):
    return torch.randn(shape, generator=seeded(seed))


def arguments(pipe):
    """Two images, no guidance, latents where the pipeline shows them."""
    if isinstance(pipe, DDPMPipeline | DDIMPipeline):
        return {"batch_size": 2, "output_type": "np"}
    if isinstance(pipe, DiTPipeline):
        return {"class_labels": [3, 7], "guidance_scale": 1.0, "output_type": "np"}
    prompts = {"prompt_embeds": gaussian(2, 3, 8), "negative_prompt_embeds": gaussian(2, 3, 8, seed=2)}
    common = {**prompts, "guidance_scale": 1.0, "output_type": "latent"}
    if isinstance(pipe, PixArtAlphaPipeline):
        masks = dict.fromkeys(["prompt_attention_mask", "negative_prompt_attention_mask"], torch.ones(2, 3))
        return {**common, **masks, "negative_prompt": None, "use_resolution_binning": False}
    if isinstance(pipe, StableDiffusionXLPipeline):
        return {**common, **dict.fromkeys(["pooled_prompt_embeds", "negative_pooled_prompt_embeds"], gaussian(2, 8))}
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        return {**common, "image": gaussian(2, 4, 8, 8, seed=3), "strength": 1.0}
    return common


def draw(pipe, **options):
    return torch.as_tensor(pipe(**{**arguments(pipe), "generator": seeded(), **options}).images)


def network(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def watch(pipe):
    """Returns a list that gets the timestep and the state of every network call."""
    calls = []

    def see(_, inputs, named):
        timestep = named["timestep"] if "timestep" in named else inputs[1]
        calls.append((int(timestep.reshape(-1)[0]), inputs[0].clone()))

    network(pipe).register_forward_pre_hook(see, with_kwargs=True)
    return calls


def watch_steps(scheduler):
    """Returns a list that gets what every step returns, before a pipeline decodes or clamps it."""
    states, step = [], scheduler.step

    @functools.wraps(step)
    def watched(*inputs, **named):
        output = step(*inputs, **named)
        states.append(output[0])
        return output

    scheduler.step = watched
    return states


def timesteps_of(calls):
    return [timestep for timestep, _ in calls]


@torch.no_grad()
def run_by_hand(pipe, x, generator, timesteps=GRID[:-1], **conditions):
    for timestep in timesteps:
        model_output = network(pipe)(x, timestep=torch.tensor([timestep] * len(x)), **conditions).sample
        x = pipe.scheduler.step(model_output, timestep, x, generator=generator).prev_sample
    return x


# ----- every pipeline -----


def test_a_trained_grid_takes_one_network_call_for_each_layer(pipe):
    swap(pipe, layer_timesteps=GRID)
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=3)
    assert timesteps_of(calls) == GRID[:-1]
    assert [len(state) for _, state in calls] == [2, 2, 2]
    assert len(images) == 2
    assert images.isfinite().all()


@pytest.mark.parametrize("name", WITH_GUIDANCE)
def test_guidance_doubles_the_batch_and_not_the_calls(name):
    pipe = make_pipe(name, layer_timesteps=GRID)
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=3, guidance_scale=3.0)
    assert timesteps_of(calls) == GRID[:-1]
    assert [len(state) for _, state in calls] == [4, 4, 4]
    assert all(torch.equal(state[:2], state[2:]) for _, state in calls)
    assert len(images) == 2
    assert images.isfinite().all()


def test_the_default_number_of_steps_is_refused_before_any_network_call(pipe):
    swap(pipe, layer_timesteps=GRID)
    calls = watch(pipe)
    with pytest.raises(ValueError, match="trained for 3 steps.*: pass num_inference_steps=3"):
        draw(pipe)
    assert calls == []


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_without_noise_it_is_the_stock_ddim(pipe, spacing):
    common = {"timestep_spacing": spacing, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config, calls, answers = pipe.scheduler.config, watch(pipe), []
    for scheduler in (
        DDIMScheduler.from_config(config, **common),
        HSIVIScheduler.from_config(config, **common, noise_eta=0.0),
    ):
        pipe.scheduler, states = scheduler, watch_steps(scheduler)
        images = draw(pipe, num_inference_steps=4)
        answers.append((timesteps_of(calls), [*states, images]))
        calls.clear()
    (stock_timesteps, stock), (our_timesteps, ours) = answers
    assert our_timesteps == stock_timesteps
    assert len(our_timesteps) == 4
    assert len(ours) == 5
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", *WITH_PROMPTS])
def test_the_eta_of_the_pipeline_neither_silences_nor_adds_noise(name):
    pipe = make_pipe(name, layer_timesteps=GRID)
    images = draw(pipe, num_inference_steps=3, eta=0.0)
    assert torch.equal(images, draw(pipe, num_inference_steps=3, eta=1.0))
    swap(pipe, noise_eta=0.0)
    assert not torch.equal(images, draw(pipe, num_inference_steps=3, eta=0.0))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_two_generators_give_two_images_of_the_same_latents(name):
    pipe = make_pipe(name, layer_timesteps=GRID)
    options = {"num_inference_steps": 3, "latents": gaussian(2, 4, 8, 8), "eta": 0.0}
    one, again, other = (draw(pipe, generator=seeded(seed), **options) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.01


def test_a_list_of_generators_gives_each_image_its_own():
    pipe = make_pipe("sd", layer_timesteps=GRID)
    together = draw(pipe, num_inference_steps=3, generator=[seeded(5), seeded(6)])
    alone = draw(
        pipe,
        num_inference_steps=3,
        generator=[seeded(6)],
        prompt_embeds=gaussian(2, 3, 8)[1:],
        negative_prompt_embeds=gaussian(2, 3, 8, seed=2)[1:],
    )
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_custom_timesteps_are_used_as_they_are_without_a_trained_grid(name):
    pipe = make_pipe(name, timestep_spacing="leading")
    calls = watch(pipe)
    images = draw(pipe, timesteps=[900, 500, 20])
    assert timesteps_of(calls) == [900, 500, 20]
    swap(pipe, layer_timesteps=[900, 500, 20, -1])
    assert torch.equal(images, draw(pipe, num_inference_steps=3))


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_custom_timesteps_of_a_trained_grid_must_be_that_grid(name):
    pipe = make_pipe(name, layer_timesteps=GRID)
    assert torch.equal(draw(pipe, timesteps=GRID[:-1]), draw(pipe, num_inference_steps=3))
    calls = watch(pipe)
    with pytest.raises(ValueError, match=r"trained.*\[700, 400, 100"):
        draw(pipe, timesteps=[900, 500, 20])
    assert calls == []


def test_a_scheduler_that_lacks_its_per_pixel_scale_is_not_run_without(pipe):
    swap(pipe, layer_timesteps=GRID, noise_scale_type="per_pixel")
    with pytest.raises(ValueError, match="no noise_scale was given: sample with HSIVIPipeline"):
        draw(pipe, num_inference_steps=3)


# ----- DDPM and DDIM -----


def test_ddpm_images_are_those_of_the_loop_by_hand():
    pipe, generator = make_pipe("ddpm", layer_timesteps=GRID), seeded()
    x = run_by_hand(pipe, torch.randn(2, 1, 8, 8, generator=generator), generator)
    assert torch.equal(draw(pipe, num_inference_steps=3), (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def test_the_learned_variance_of_a_ddpm_teacher_is_dropped():
    pipe = make_pipe("ddpm")
    pipe.unet = make_unet(out_channels=2).eval()
    pipe.scheduler = DDPMScheduler(variance_type="learned_range")
    swap(pipe, layer_timesteps=GRID)
    images = draw(pipe, num_inference_steps=3)
    variances = []
    pipe.unet.register_forward_hook(lambda _, __, output: variances.append(output.sample[:, 1:].mul_(100)))
    assert torch.equal(draw(pipe, num_inference_steps=3), images)
    assert [tuple(variance.shape) for variance in variances] == [(2, 1, 8, 8)] * 3


@pytest.fixture
def log(caplog):
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(level)


def test_ddim_pipeline_turns_our_scheduler_into_ddim_and_says_so(unet, log):
    scheduler = HSIVIScheduler(layer_timesteps=GRID, noise_scale=[1.0, 0.9, 0.8], timestep_spacing="leading")
    pipe = DDIMPipeline(unet=unet, scheduler=scheduler)
    assert type(pipe.scheduler) is DDIMScheduler
    (message,) = [message for message in log.messages if "will be ignored" in message]
    assert "were passed to DDIMScheduler" in message
    assert "'layer_timesteps': [700, 400, 100, 0]" in message
    assert "'noise_scale': [1.0, 0.9, 0.8]" in message

    pipe.set_progress_bar_config(disable=True)
    calls = watch(pipe)
    draw(pipe, num_inference_steps=4)
    assert timesteps_of(calls) == [750, 500, 250, 0]


def test_ddim_pipeline_keeps_the_scheduler_assigned_afterwards(unet):
    scheduler = HSIVIScheduler(layer_timesteps=GRID)
    pipe = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    generator = seeded()
    x = run_by_hand(pipe, torch.randn(2, 1, 8, 8, generator=generator), generator)
    images = draw(pipe, num_inference_steps=3, use_clipped_model_output=True)
    assert torch.equal(images, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def test_ddim_pipeline_turns_our_scheduler_into_ddim_again_at_loading_but_keeps_its_settings(tmp_path):
    pipe = make_pipe("ddim", layer_timesteps=GRID, noise_scale=[1.0, 0.9, 0.8])
    pipe.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMScheduler
    swap(loaded)
    assert torch.equal(draw(loaded, num_inference_steps=3), draw(pipe, num_inference_steps=3))


# ----- pipelines of latents -----


def test_sd_latents_are_those_of_the_loop_by_hand():
    pipe, generator = make_pipe("sd", layer_timesteps=GRID), seeded()
    start = torch.randn(2, 4, 8, 8, generator=generator)
    x = run_by_hand(pipe, start, generator, encoder_hidden_states=gaussian(2, 3, 8))
    assert torch.equal(draw(pipe, num_inference_steps=3), x)


def test_sdxl_latents_are_those_of_the_loop_by_hand():
    pipe, generator = make_pipe("sdxl", layer_timesteps=GRID), seeded()
    start = torch.randn(2, 4, 8, 8, generator=generator)
    added = {"text_embeds": gaussian(2, 8), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)}
    x = run_by_hand(pipe, start, generator, encoder_hidden_states=gaussian(2, 3, 8), added_cond_kwargs=added)
    assert torch.equal(draw(pipe, num_inference_steps=3), x)


def pixart_conditions():
    return {
        "encoder_hidden_states": gaussian(2, 3, 8),
        "encoder_attention_mask": torch.ones(2, 3),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def test_pixart_latents_are_those_of_the_loop_by_hand():
    pipe, generator = make_pipe("pixart", layer_timesteps=GRID), seeded()
    start = torch.randn(2, 4, 8, 8, generator=generator)
    x = run_by_hand(pipe, start, generator, **pixart_conditions())
    assert torch.equal(draw(pipe, num_inference_steps=3), x)


def test_pixart_returns_the_clean_image_of_a_single_layer_rather_than_its_output():
    pipe = make_pipe("pixart", layer_timesteps=[700, 100])
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=1)
    ((timestep, start),) = calls
    with torch.no_grad():
        model_output = pipe.transformer(start, timestep=torch.tensor([700, 700]), **pixart_conditions()).sample
    layer = pipe.scheduler.step(model_output, timestep, start)
    assert torch.equal(images, layer.pred_original_sample)
    assert not torch.equal(images, layer.prev_sample)


def test_dit_images_are_those_of_the_loop_by_hand_with_the_global_generator():
    pipe = make_pipe("dit", layer_timesteps=GRID)
    torch.manual_seed(7)
    images = draw(pipe, num_inference_steps=3)
    torch.manual_seed(7)
    start = torch.randn(2, 4, 8, 8, generator=seeded())
    x = run_by_hand(pipe, start, None, class_labels=torch.tensor([3, 7]))
    with torch.no_grad():
        decoded = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * x).sample
    assert torch.equal(images, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    assert not torch.equal(images, draw(pipe, num_inference_steps=3))  # the same generator, but later noise


def test_sd_rewrites_our_config_but_neither_the_grid_nor_the_samples():
    scheduler = HSIVIScheduler(**{**LATENT_BETAS, "steps_offset": 0}, layer_timesteps=GRID)
    output, sample = gaussian(2, 4, 8, 8), gaussian(2, 4, 8, 8, seed=2)
    before = [scheduler.step(output, timestep, sample, generator=seeded()).prev_sample for timestep in GRID[:-1]]
    pipe = make_sd(scheduler=scheduler)
    assert pipe.scheduler is scheduler
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.layer_timesteps == GRID
    assert scheduler.timesteps.tolist() == GRID[:-1]
    pipe.scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == GRID[:-1]
    after = [scheduler.step(output, timestep, sample, generator=seeded()).prev_sample for timestep in GRID[:-1]]
    assert torch.equal(torch.stack(before), torch.stack(after))


def test_sd_switches_a_clamp_off_that_was_asked_for():
    scheduler = HSIVIScheduler(**LATENT_BETAS, layer_timesteps=GRID, clip_sample=True)
    output, sample = gaussian(2, 4, 8, 8), gaussian(2, 4, 8, 8, seed=2)
    assert scheduler.step(output, 700, sample).pred_original_sample.abs().max() == 1
    make_sd(scheduler=scheduler)
    assert scheduler.config.clip_sample is False
    assert scheduler.step(output, 700, sample).pred_original_sample.abs().max() > 1


def test_sd_moves_a_generic_leading_grid_by_one_where_its_offset_was_0():
    scheduler = HSIVIScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [750, 500, 250, 0]
    make_sd(scheduler=scheduler)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]


@pytest.mark.parametrize("name", ["sd", "sdxl", "img2img"])
def test_a_callback_sees_every_layer_and_may_replace_the_latents(name):
    pipe, seen = make_pipe(name, layer_timesteps=GRID), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.full_like(tensors["latents"], 7.0)} if step == 2 else {}

    images = draw(pipe, num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [(0, 700), (1, 400), (2, 100)]
    assert torch.equal(images, torch.full_like(images, 7.0))
    assert pipe.num_timesteps == 3


@pytest.mark.parametrize(("strength", "layers"), [(1.0, 3), (0.7, 2), (0.4, 1)])
def test_img2img_runs_the_last_layers_from_the_noised_image(strength, layers):
    pipe, generator = make_pipe("img2img", layer_timesteps=GRID), seeded()
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=3, strength=strength)
    timesteps = GRID[:-1][-layers:]
    assert timesteps_of(calls) == timesteps

    image, noise = gaussian(2, 4, 8, 8, seed=3), torch.randn(2, 4, 8, 8, generator=generator)
    abar = pipe.scheduler.alphas_cumprod[timesteps[0]]
    start = calls[0][1]
    torch.testing.assert_close(start, abar.sqrt() * image + (1 - abar).sqrt() * noise)
    x = run_by_hand(pipe, start, generator, timesteps, encoder_hidden_states=gaussian(2, 3, 8))
    assert torch.equal(images, x)


@pytest.mark.parametrize(("grid", "strength"), [(GRID, 0.3), ([700, 0], 0.8)])
def test_img2img_says_so_when_its_strength_leaves_no_layer(grid, strength):
    pipe = make_pipe("img2img", layer_timesteps=grid)
    with pytest.raises(ValueError, match="no layer is left.*raise `strength`"):
        draw(pipe, num_inference_steps=len(grid) - 1, strength=strength)


def test_img2img_leaves_no_trace_in_a_scheduler_that_pipelines_share():
    pipe = make_pipe("sd", layer_timesteps=GRID)
    before = draw(pipe, num_inference_steps=3)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    draw(other, num_inference_steps=3, strength=0.4)
    assert torch.equal(draw(pipe, num_inference_steps=3), before)


def test_sdxl_may_hand_over_to_a_refiner_between_two_layers():
    pipe, generator = make_pipe("sdxl", layer_timesteps=GRID), seeded()
    whole = draw(pipe, num_inference_steps=3)
    calls = watch(pipe)
    half = draw(pipe, num_inference_steps=3, generator=generator, denoising_end=0.5)
    assert timesteps_of(calls) == [700]
    refiner = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    options = {**arguments(pipe), "image": half, "generator": generator, "denoising_start": 0.5}
    assert torch.equal(refiner(num_inference_steps=3, **options).images, whole)
    assert timesteps_of(calls) == GRID[:-1]


def test_half_precision_stays_half_precision():
    pipe = make_pipe("sd", layer_timesteps=GRID).to(torch.bfloat16)
    prompts = dict.fromkeys(["prompt_embeds", "negative_prompt_embeds"], gaussian(2, 3, 8).bfloat16())
    images = draw(pipe, num_inference_steps=3, guidance_scale=3.0, **prompts)
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()


# ----- files -----


@pytest.mark.parametrize("name", ["ddpm", "sd", "img2img", "sdxl", "pixart", "dit"])
def test_a_saved_pipeline_loads_with_our_scheduler_and_gives_the_same_pixels(name, tmp_path):
    pipe = make_pipe(name, layer_timesteps=GRID, noise_scale=[1.0, 0.9, 0.8])
    pipe.save_pretrained(tmp_path)
    absent = [part for part in pipe.components if getattr(pipe, part) is None]
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert type(loaded.scheduler) is HSIVIScheduler
    torch.manual_seed(0)
    images = draw(pipe, num_inference_steps=3)
    torch.manual_seed(0)
    assert torch.equal(draw(loaded, num_inference_steps=3), images)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("ddpm", ""),
        ("sd", '"a prompt", '),
        ("img2img", '"a prompt", image=image, '),
        ("dit", "class_labels=[0], "),
    ],
)
def test_the_card_gives_a_stock_pipeline_what_its_call_needs(name, inputs):
    pipe = make_pipe(name, layer_timesteps=GRID)
    card = make_card(pipe, "alice/stock", {"options": {}, "training": {}, "report": {}})
    call = f"pipeline({inputs}num_inference_steps=3{', guidance_scale=1' * (name != 'ddpm')}).images"
    assert card.text.count(f"images = {call}") == 2
    if name in ("ddpm", "dit"):
        assert len(eval(call, {"pipeline": pipe})) == 1
