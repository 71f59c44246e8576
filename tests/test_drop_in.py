"""Our scheduler inside the stock pipelines of diffusers, on networks of random weights."""

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DiTPipeline
from diffusers import StableDiffusionImg2ImgPipeline as Img2Img
from diffusers import StableDiffusionXLImg2ImgPipeline as XLImg2Img
from diffusers.utils import logging

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.share.card import make_card
from slow import others_slow
from tiny_dit import make_dit, make_vae
from tiny_text import PROMPTS, make_sd, make_text
from tiny_unet import make_unet

GRID = [700, 400, 100, 0]
WITH_PROMPTS = others_slow(["sd", "img2img", "sdxl", "pixart"], "sd", "img2img", "pixart")
# What the scheduler_config.json of Stable Diffusion 1.5 (PNDM) and XL (Euler) have.
LATENT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def make_classes():
    """A DiT with the thousand classes that its pipeline counts on for guidance."""
    pipe = make_dit()
    transformer = diffusers.DiTTransformer2DModel.from_config(pipe.transformer.config, num_embeds_ada_norm=1000)
    return DiTPipeline(transformer.eval(), pipe.vae, DDIMScheduler(clip_sample=False))


PNDM = diffusers.PNDMScheduler(**LATENT_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
# Each with the scheduler of its published weights.
MAKERS = {
    "ddpm": (lambda: DDPMPipeline(make_unet().eval(), DDPMScheduler()), None),
    "ddim": (lambda: DDIMPipeline(make_unet().eval(), DDPMScheduler()), None),
    "sd": (lambda: make_text("sd"), PNDM),
    "img2img": (lambda: Img2Img(**make_sd(channels=4).components, requires_safety_checker=False), PNDM),
    "sdxl": (lambda: make_text("sdxl"), diffusers.EulerDiscreteScheduler(**LATENT_BETAS, timestep_spacing="leading")),
    "pixart": (lambda: make_text("pixart"), diffusers.DPMSolverMultistepScheduler()),
    "dit": (make_classes, None),
}


def make_pipe(name, **options):
    """Makes a stock pipeline; the options are those of our scheduler, which takes the place of the stock one."""
    make, scheduler = MAKERS[name]
    pipe = make()
    pipe.scheduler = scheduler or pipe.scheduler
    if options:
        swap(pipe, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def swap(pipe, **options):
    pipe.scheduler = HSIVIScheduler.from_config(pipe.scheduler.config, **options)


@pytest.fixture(params=others_slow(MAKERS, *(name for name in MAKERS if name != "sdxl")))
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
    common = {"prompt": PROMPTS[:2], "guidance_scale": 1.0, "output_type": "latent"}
    if isinstance(pipe, Img2Img | XLImg2Img):
        return {**common, "image": gaussian(2, 4, 8, 8, seed=3), "strength": 1.0}
    return {**common, "use_resolution_binning": False} if hasattr(pipe, "transformer") else common


def draw(pipe, **options):
    return torch.as_tensor(pipe(**{**arguments(pipe), "generator": seeded(), **options}).images)


def watch(pipe):
    """Returns a list that gets the timestep, the state and the output of every network call."""
    calls = []

    def see(_, inputs, named, output):
        timestep = named["timestep"] if "timestep" in named else inputs[1]
        calls.append((int(timestep.reshape(-1)[0]), inputs[0].clone(), output[0].clone()))

    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    network.register_forward_hook(see, with_kwargs=True)
    return calls


def timesteps_of(calls):
    return [timestep for timestep, *_ in calls]


def replay(pipe, calls, generator):
    """Takes the steps from the outputs of the network, each from the state it saw; returns the last state."""
    _, x, _ = calls[0]
    for timestep, state, output in calls:
        torch.testing.assert_close(state, x, rtol=0, atol=0)
        x = pipe.scheduler.step(output, timestep, x, generator=generator).prev_sample
    return x


def shown(pipe, x):
    """What a pipeline returns of its last state."""
    if isinstance(pipe, DiTPipeline):
        with torch.no_grad():
            x = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * x).sample
    return x if "prompt" in arguments(pipe) else (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


# ----- every pipeline -----


def test_a_trained_grid_takes_one_network_call_and_one_step_for_each_layer(pipe):
    """The noise is that of the generator, but for DiTPipeline, which passes none to a step."""
    swap(pipe, layer_timesteps=GRID)
    calls, generator = watch(pipe), seeded()
    torch.manual_seed(7)
    images = draw(pipe, num_inference_steps=3)
    assert timesteps_of(calls) == GRID[:-1]
    assert images.isfinite().all()
    noise = torch.randn(calls[0][1].shape, generator=generator)
    if not isinstance(pipe, Img2Img):  # whose start is an image with noise
        assert torch.equal(calls[0][1], noise)
    torch.manual_seed(7)
    assert torch.equal(images, shown(pipe, replay(pipe, calls, None if isinstance(pipe, DiTPipeline) else generator)))


@pytest.mark.parametrize("name", [*WITH_PROMPTS, "dit"])
def test_guidance_doubles_the_batch_and_not_the_calls_and_half_precision_stays(name):
    pipe = make_pipe(name, layer_timesteps=GRID).to(torch.bfloat16)
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=3, guidance_scale=3.0)
    assert timesteps_of(calls) == GRID[:-1]
    assert all(len(state) == 4 and torch.equal(state[:2], state[2:]) for _, state, _ in calls)
    assert len(images) == 2
    assert images.dtype == (torch.float32 if name == "dit" else torch.bfloat16)  # an array of numpy
    assert images.isfinite().all()


@pytest.mark.parametrize("name", others_slow(["sd", "sdxl"], "sd"))
def test_a_student_of_guidance_that_is_guided_again_says_so_once(name, log):
    for held, guided, times in ((None, 3.0, 0), (3.0, 1.0, 0), (3.0, 3.0, 1)):
        pipe = make_pipe(name, layer_timesteps=GRID, guidance_scale=held)
        for _ in range(2):
            draw(pipe, num_inference_steps=3, guidance_scale=guided)
        messages = [message for message in log.messages if "guidance of scale 3.0 in its weights" in message]
        assert len(messages) == times
    assert messages[0].endswith("guides again: if it does, pass guidance_scale=1")


def test_what_the_sampler_was_not_trained_for_is_refused_before_any_network_call(pipe):
    """And so is a scheduler that lacks its per-pixel scale, before the first step."""
    swap(pipe, layer_timesteps=GRID, noise_scale_type="per_pixel")
    calls = watch(pipe)
    with pytest.raises(ValueError, match="trained for 3 steps.*: pass num_inference_steps=3"):
        draw(pipe)
    if "prompt" in arguments(pipe):
        with pytest.raises(ValueError, match=r"trained.*\[700, 400, 100"):
            draw(pipe, timesteps=[900, 500, 20])
    assert calls == []
    with pytest.raises(ValueError, match="no noise_scale was given: sample with HSIVIPipeline"):
        draw(pipe, num_inference_steps=3)


def test_without_noise_it_is_the_stock_ddim(pipe):
    common = {"timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config, calls, answers = pipe.scheduler.config, watch(pipe), []
    for make in (DDIMScheduler.from_config, HSIVIScheduler.from_config):
        pipe.scheduler = make(config, **common, **({"noise_eta": 0.0} if make.__self__ is HSIVIScheduler else {}))
        images = draw(pipe, num_inference_steps=4)
        answers.append((timesteps_of(calls), [*(state for _, state, _ in calls), images]))
        calls.clear()
    (stock_timesteps, stock), (our_timesteps, ours) = answers
    assert our_timesteps == stock_timesteps
    assert len(our_timesteps) == 4
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", *WITH_PROMPTS])
def test_the_eta_of_the_pipeline_neither_silences_nor_adds_noise(name):
    pipe = make_pipe(name, layer_timesteps=GRID)
    images = draw(pipe, num_inference_steps=3, eta=0.0)
    assert torch.equal(images, draw(pipe, num_inference_steps=3, eta=1.0))
    swap(pipe, noise_eta=0.0)
    assert not torch.equal(images, draw(pipe, num_inference_steps=3, eta=0.0))


def test_a_list_of_generators_gives_each_image_its_own():
    pipe = make_pipe("sd", layer_timesteps=GRID)
    together = draw(pipe, num_inference_steps=3, generator=[seeded(5), seeded(6)])
    alone = draw(pipe, num_inference_steps=3, generator=[seeded(6)], prompt=PROMPTS[1:2])
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_custom_timesteps_are_used_as_they_are_without_a_trained_grid(name):
    pipe = make_pipe(name, timestep_spacing="leading")
    calls = watch(pipe)
    images = draw(pipe, timesteps=[900, 500, 20])
    assert timesteps_of(calls) == [900, 500, 20]
    swap(pipe, layer_timesteps=[900, 500, 20, -1])
    for same in ({"num_inference_steps": 3}, {"timesteps": [900, 500, 20]}):
        assert torch.equal(images, draw(pipe, **same))


@pytest.mark.parametrize(
    "name", others_slow([name for name in MAKERS if name != "ddim"], "ddpm", "sd", "img2img", "pixart", "dit")
)
def test_a_saved_pipeline_loads_with_our_scheduler_and_gives_the_same_pixels(name, tmp_path):
    pipe = make_pipe(name, layer_timesteps=GRID, noise_scale=[1.0, 0.9, 0.8])
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert type(loaded.scheduler) is HSIVIScheduler
    drawn = []
    for each in (pipe, loaded):
        torch.manual_seed(0)
        drawn.append(draw(each, num_inference_steps=3))
    assert torch.equal(*drawn)


# ----- DDIMPipeline, which makes a DDIMScheduler of any scheduler -----


@pytest.fixture
def log(caplog):
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(level)


def test_ddim_pipeline_turns_our_scheduler_into_ddim_says_so_and_keeps_its_settings(tmp_path, log):
    pipe = make_pipe("ddim", layer_timesteps=GRID, noise_scale=[1.0, 0.9, 0.8])
    images = draw(pipe, num_inference_steps=3, use_clipped_model_output=True)
    log.clear()
    pipe.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMScheduler
    (message,) = [message for message in log.messages if "will be ignored" in message and "DDIMScheduler" in message]
    assert "'layer_timesteps': [700, 400, 100, 0]" in message
    assert "'noise_scale': [1.0, 0.9, 0.8]" in message
    calls = watch(loaded)
    draw(loaded, num_inference_steps=4)
    assert timesteps_of(calls) == [750, 500, 250, 0]
    swap(loaded)  # as a card says
    assert torch.equal(draw(loaded, num_inference_steps=3), images)


# ----- pipelines of latents -----


def test_pixart_returns_the_clean_image_of_a_single_layer_rather_than_its_output():
    pipe = make_pipe("pixart", layer_timesteps=[700, 100])
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=1)
    ((timestep, start, output),) = calls
    layer = pipe.scheduler.step(output, timestep, start)
    assert torch.equal(images, layer.pred_original_sample)
    assert not torch.equal(images, layer.prev_sample)


def test_sd_rewrites_our_config_but_neither_a_trained_grid_nor_its_samples():
    scheduler = HSIVIScheduler(**{**LATENT_BETAS, "steps_offset": 0}, layer_timesteps=GRID)
    output, sample = gaussian(2, 4, 8, 8), gaussian(2, 4, 8, 8, seed=2)

    def walk():
        return [scheduler.step(output, timestep, sample, generator=seeded()).prev_sample for timestep in GRID[:-1]]

    before, components = walk(), make_sd().components
    pipe = type(make_sd())(**{**components, "scheduler": scheduler}, requires_safety_checker=False)
    assert pipe.scheduler is scheduler
    scheduler.set_timesteps(3)
    assert (scheduler.config.steps_offset, scheduler.config.layer_timesteps) == (1, GRID)
    assert scheduler.timesteps.tolist() == GRID[:-1]
    assert torch.equal(torch.stack(before), torch.stack(walk()))
    # It switches a clamp off, though, and moves a generic grid by one.
    other = HSIVIScheduler(timestep_spacing="leading", clip_sample=True)
    type(pipe)(**{**components, "scheduler": other}, requires_safety_checker=False)
    other.set_timesteps(4)
    assert other.timesteps.tolist() == [751, 501, 251, 1]
    assert other.step(output, 751, sample).pred_original_sample.abs().max() > 1


@pytest.mark.parametrize("name", others_slow(["sd", "sdxl", "img2img"], "sd", "img2img"))
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
    """And leaves no trace in a scheduler that pipelines share."""
    pipe, generator = make_pipe("img2img", layer_timesteps=GRID), seeded()
    calls = watch(pipe)
    images = draw(pipe, num_inference_steps=3, strength=strength)
    assert timesteps_of(calls) == GRID[:-1][-layers:]
    image, noise = gaussian(2, 4, 8, 8, seed=3), torch.randn(2, 4, 8, 8, generator=generator)
    abar = pipe.scheduler.alphas_cumprod[calls[0][0]]
    torch.testing.assert_close(calls[0][1], abar.sqrt() * image + (1 - abar).sqrt() * noise)
    assert torch.equal(images, replay(pipe, calls, generator))
    calls.clear()
    draw(pipe, num_inference_steps=3)
    assert timesteps_of(calls) == GRID[:-1]


@pytest.mark.parametrize(("grid", "strength"), [(GRID, 0.3), ([700, 0], 0.8)])
def test_img2img_says_so_when_its_strength_leaves_no_layer(grid, strength):
    pipe = make_pipe("img2img", layer_timesteps=grid)
    with pytest.raises(ValueError, match="no layer is left.*raise `strength`"):
        draw(pipe, num_inference_steps=len(grid) - 1, strength=strength)


def test_sdxl_may_hand_over_to_a_refiner_between_two_layers():
    pipe, generator = make_pipe("sdxl", layer_timesteps=GRID), seeded()
    four = {"in_channels": 4, "out_channels": 4}  # by which a refiner knows latents from images
    pipe.register_modules(vae=make_vae(4), unet=type(pipe.unet).from_config(pipe.unet.config, **four).eval())
    whole = draw(pipe, num_inference_steps=3)
    calls = watch(pipe)
    half = draw(pipe, num_inference_steps=3, generator=generator, denoising_end=0.5)
    assert timesteps_of(calls) == [700]
    refiner = XLImg2Img(**pipe.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    options = {**arguments(pipe), "image": half, "generator": generator, "denoising_start": 0.5}
    assert torch.equal(refiner(num_inference_steps=3, **options).images, whole)
    assert timesteps_of(calls) == GRID[:-1]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("ddpm", ""),
        ("sd", 'prompt="a prompt", '),
        ("img2img", 'prompt="a prompt", image=image, '),
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
