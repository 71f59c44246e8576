"""Students as workflows of ComfyUI 0.38: the sampler that equals the layers, its sigmas, and the nodes.

Its samplers are those of k-diffusion (Karras et al. 2022, arXiv 2206.00364). They work on y = x / alpha, of noise s =
sigma / alpha; of a rectified flow on x itself, of noise s = sigma. From s to s' with clean image x0 and noise eps,
`euler_ancestral` of eta e gives

    up   = e s' sqrt(s^2 - s'^2) / s
    down = sqrt(s'^2 - up^2)
    y'   = x0 + down eps + s_noise up noise

which is the layer of kernel "ddim" with noise_eta e and noise_scale s_noise, divided by alpha'. `euler` is the same
with e = 0, of flows too, and `lcm`, which re-noises x0, is kernel "renoise". ComfyUI divides the last y of a flow by
its alpha as well: the latents that it decodes are ours divided by the last alpha.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..scheduling_hsivi import BETAS, HSIVIScheduler

REMEDY = "draw with `hsivi sample`, or in diffusers as the model card says"
LORA = "LoraLoaderModelOnly"  # the node whose `lora_name` says the file of the student
# Noise levels that ComfyUI gives to Stable Diffusion 1 and 2 and to SDXL.
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# sigma_data and prediction type of the EDM models that it knows by keys in their checkpoints: Playground 2.5 and CosXL.
EDM = ((0.5, "epsilon"), (1.0, "v_prediction"))

Link = list[Any]  # an input of a node: number of another node, and place among the outputs of that


class Files(NamedTuple):
    """How ComfyUI loads a kind of model: from one checkpoint, or from files of its parts."""

    encoders: tuple[str, ...] = ()  # usual names; none if they are in the checkpoint
    decoder: str = ""  # likewise, of the VAE
    type: str = ""  # of the node that loads one encoder or two
    latent: str = "EmptyLatentImage"  # node that makes empty latents
    pads_text: bool = False  # the network sees the padding of prompts, whose length ComfyUI chooses otherwise
    knows_edm: bool = False  # it may have noise levels of EDM


class Sampler(NamedTuple):
    """The sampler of ComfyUI that equals the layers of a student.

    Attributes:
        node: Name of its node.
        settings: Inputs of that node.
        sigmas: T + 1 numbers s, for the node ManualSigmas, which reads no exponents.
        first_noise: Factor on the first noise, where ComfyUI would take s instead of 1 / alpha; else None.
    """

    node: str
    settings: dict[str, Any]
    sigmas: str
    first_noise: str | None


def equal_sampler(scheduler: HSIVIScheduler) -> Sampler:
    """Returns the sampler that equals the layers of the grid that is set.

    The last layer returns its mean, x0 + d eps, and `euler_ancestral` x0 + down eps + s_noise up noise: the last sigma
    is the one with the least (down - d)^2 + (s_noise up)^2, if the input of the layer has much more noise. At eta 0 it
    is exact, s' = d. At eta 1 it is 0, and what is lost has std s_0^2 / s, s_0 at the end of the grid and s at the
    input. Between them it has at most s_0 / 2, for s_noise 1.

    Raises:
        ValueError: There is none.
    """
    config, layers = scheduler.config, [*scheduler.layers.by_time.values()]
    flow, eta = scheduler.is_flow, config.noise_eta if config.kernel == "ddim" else 0.0
    sigmas = [layer.sigma_next / (1 if flow else layer.alpha_next) for layer in layers]
    last = layers[-1].direction / (1 if flow else layers[-1].alpha)
    node = "KSamplerSelect"
    settings: dict[str, Any] = {"sampler_name": "euler"}
    if any(layer.c for layer in layers[:-1]):
        if flow and eta:
            raise ValueError(
                f"noise_eta={eta:g} of a rectified flow: no sampler of ComfyUI equals these layers: distil with "
                f"--noise_eta 0, or {REMEDY}"
            )
        given = config.noise_scale
        scale, *others = {*given} if isinstance(given, list | tuple) else {given}
        if others or config.noise_scale_type == "per_pixel" or (scale != 1 and not eta):
            raise ValueError(
                "noise_scale differs between layers or pixels, or is not 1 with kernel 'renoise': no sampler of "
                f"ComfyUI equals these layers: {REMEDY}"
            )
        settings = {"sampler_name": "lcm"}
        if eta:
            node, settings = "SamplerEulerAncestral", {"eta": float(eta), "s_noise": float(scale)}
            rest = math.sqrt(1 - eta**2)
            last *= rest / (rest**2 + (scale * eta) ** 2)
    at_the_top = int(scheduler.layers.grid[0]) == len(scheduler) - 1  # there ComfyUI's own factor is 1 / alpha
    first = None if at_the_top else _decimal(1 / layers[0].alpha_next)
    return Sampler(node, settings, ", ".join(map(_decimal, [*sigmas, last])), first)


def find_workflow(teacher: Any, scheduler: HSIVIScheduler) -> dict[str, Any]:
    """Returns the workflow of a student for the record of its run: its "nodes", or why there is none, as "refused"."""
    try:
        return {"nodes": make_workflow(teacher, scheduler)}
    except ValueError as error:
        return {"refused": str(error)}


def make_workflow(teacher: Any, scheduler: HSIVIScheduler) -> dict[str, Any]:
    """Returns the nodes that draw with the LoRA of a student, by number, in the format of ComfyUI's API.

    Its window opens this format, too. The user chooses the files of the teacher in the nodes whose titles say so.

    Raises:
        ValueError: ComfyUI does not load such a student, or has no equal sampler.
    """
    files = teacher.comfyui
    if files is None:
        raise ValueError(f"no workflow of ComfyUI is known for a {teacher.name}: {REMEDY}")
    _check_levels(teacher, scheduler)
    sampler = equal_sampler(scheduler)
    _, height, width = teacher.image_shape
    nodes: dict[str, Any] = {}

    def add(name: str, title: str = "", **inputs: Any) -> Link:
        number = str(len(nodes) + 1)
        nodes[number] = {"class_type": name, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}
        return [number, 0]

    model, clip, vae = _load(add, files)
    model = add(LORA, model=model, lora_name="", strength_model=1.0)
    if not scheduler.is_edm and scheduler.config.prediction_type == "v_prediction":
        model = add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
    if files.pads_text:
        clip = add("T5TokenizerOptions", clip=clip, min_padding=0, min_length=teacher.longest)
    text = add("CLIPTextEncode", "Prompt", text="a prompt", clip=clip)
    if teacher.embeds_guidance:
        text = add("FluxGuidance", conditioning=text, guidance=teacher.unguided(scheduler)["guidance_scale"])
    latent = add(files.latent, width=width, height=height, batch_size=1)
    if sampler.first_noise is not None:
        noise = add("RandomNoise", "Seed of the first noise", noise_seed=0)
        scale = add("ManualSigmas", "Factor on the first noise", sigmas=sampler.first_noise)
        latent = add("AddNoise", model=model, noise=noise, sigmas=scale, latent_image=latent)
    drawn = add(
        "SamplerCustom",
        model=model,
        add_noise=sampler.first_noise is None,
        noise_seed=0,
        cfg=1.0,
        positive=text,
        negative=text,  # at cfg 1 it is not looked at
        sampler=add(sampler.node, **sampler.settings),
        sigmas=add("ManualSigmas", "Sigmas of the student", sigmas=sampler.sigmas),
        latent_image=latent,
    )
    images = add("VAEDecode", samples=drawn, vae=vae)
    add("SaveImage", images=images, filename_prefix="hsivi")
    return nodes


def _load(add: Any, files: Files) -> tuple[Link, Link, Link]:
    """Adds the loaders of the teacher; returns network, text encoders and VAE."""
    if files.decoder:
        title = "Choose the network of the teacher"
        model = add("UNETLoader", title, unet_name="choose.safetensors", weight_dtype="default")
        vae = add("VAELoader", "Choose its VAE", vae_name=files.decoder)
    else:
        model = add("CheckpointLoaderSimple", "Choose the checkpoint of the teacher", ckpt_name="choose.safetensors")
        clip, vae = [model[0], 1], [model[0], 2]
    if count := len(files.encoders):
        named = {f"clip_name{place if count > 1 else ''}": name for place, name in enumerate(files.encoders, 1)}
        named |= {"type": files.type} if files.type else {}
        clip = add(("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader")[count - 1], "Choose its text encoders", **named)
    return model, clip, vae


def _check_levels(teacher: Any, scheduler: HSIVIScheduler) -> None:
    """Refuses, with ValueError, noise levels, predictions and clipping that ComfyUI does not have."""
    config = scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError(f"this student clips its clean latents, which ComfyUI does not: {REMEDY}")
    if scheduler.is_edm:
        known = teacher.comfyui.knows_edm and (scheduler.sigma_data, config.prediction_type) in EDM
    elif scheduler.is_flow:
        known = True
    else:
        is_usual = {name: config[name] for name in BETAS} == STABLE_DIFFUSION
        known = is_usual and config.prediction_type in ("epsilon", "v_prediction")
    if not known:
        raise ValueError(
            "ComfyUI has other noise levels, or other predictions of the network, for models of this kind than this "
            f"student: {REMEDY}"
        )


def _decimal(number: float) -> str:
    text = f"{number:.7f}".rstrip("0")
    return f"{text}0" if text.endswith(".") else text
