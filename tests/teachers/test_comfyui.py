"""`teachers/comfyui.py`: workflows of known nodes, with the samplers of diffusers that ComfyUI's equal, and refusals.

ComfyUI does not run here. Its nodes, names of modules and the way it starts and ends were read in its source.
"""

import math
import re
from functools import cache

import diffusers
import pytest
import torch
from peft import get_peft_model_state_dict

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.teachers.adapters import add_adapter, in_file
from hsivi_diffusers.teachers.comfyui import equal_sampler, find_workflow, make_workflow
from hsivi_diffusers.teachers.flow_transformers import FlowTransformer
from hsivi_diffusers.teachers.loading import load_teacher
from slow import others_slow
from tiny_flows import FLOWS, make_flow
from tiny_text import KINDS as TEXT
from tiny_text import make_text

PROMPT = "a red cat"
WITHOUT_NOISE = {"noise_eta": 0.0}
KINDS = ("sd", "sdxl", "playground", "sd3", "flux", "qwen", "auraflow", "zimage")


@cache
def pipeline_of(kind):
    return make_text(kind) if kind in (*TEXT, "playground") else make_flow(kind)


@cache
def teacher_of(kind):
    """With prompts in single precision, as its pipeline encodes them."""
    teacher = load_teacher(pipeline_of(kind))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FlowTransformer, "prompt_dtype", None)
        teacher.encode_prompts([PROMPT], "", torch.device("cpu"))
    return teacher


def student_of(kind, grid, **settings):
    return HSIVIScheduler.from_config(teacher_of(kind).schedule.config, layer_timesteps=grid, **settings)


# ----- the nodes -----

# Inputs that a node must be given, with their types, and types of its outputs. Of ComfyUI 0.38 (github.com/Comfy-Org/
# ComfyUI): nodes.py at 02217e3, comfy_extras/nodes_custom_sampler.py at 4be318a, nodes_sd3.py at 45e9c52,
# nodes_model_advanced.py at 691e827; of 0.3.64 (a125cd8) nodes_flux.py and nodes_cond.py.
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": "COMBO"}, ["MODEL", "CLIP", "VAE"]),
    "UNETLoader": ({"unet_name": "COMBO", "weight_dtype": "COMBO"}, ["MODEL"]),
    "CLIPLoader": ({"clip_name": "COMBO", "type": "COMBO"}, ["CLIP"]),
    "DualCLIPLoader": ({"clip_name1": "COMBO", "clip_name2": "COMBO", "type": "COMBO"}, ["CLIP"]),
    "TripleCLIPLoader": ({"clip_name1": "COMBO", "clip_name2": "COMBO", "clip_name3": "COMBO"}, ["CLIP"]),
    "VAELoader": ({"vae_name": "COMBO"}, ["VAE"]),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": "COMBO", "strength_model": "FLOAT"}, ["MODEL"]),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": "COMBO", "zsnr": "BOOLEAN"}, ["MODEL"]),
    "T5TokenizerOptions": ({"clip": "CLIP", "min_padding": "INT", "min_length": "INT"}, ["CLIP"]),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ["CONDITIONING"]),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "FLOAT"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ["LATENT"]),
    "EmptySD3LatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ["LATENT"]),
    "RandomNoise": ({"noise_seed": "INT"}, ["NOISE"]),
    "ManualSigmas": ({"sigmas": "STRING"}, ["SIGMAS"]),
    "AddNoise": ({"model": "MODEL", "noise": "NOISE", "sigmas": "SIGMAS", "latent_image": "LATENT"}, ["LATENT"]),
    "KSamplerSelect": ({"sampler_name": "COMBO"}, ["SAMPLER"]),
    "SamplerEulerAncestral": ({"eta": "FLOAT", "s_noise": "FLOAT"}, ["SAMPLER"]),
    "SamplerCustom": (
        {
            **{"model": "MODEL", "add_noise": "BOOLEAN", "noise_seed": "INT", "cfg": "FLOAT"},
            **{"positive": "CONDITIONING", "negative": "CONDITIONING", "sampler": "SAMPLER", "sigmas": "SIGMAS"},
            "latent_image": "LATENT",
        },
        ["LATENT", "LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, []),
}
VALUES = {"COMBO": str, "STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}
CHOICES = {
    ("KSamplerSelect", "sampler_name"): {"euler", "lcm"},
    ("ModelSamplingDiscrete", "sampling"): {"v_prediction"},
    ("UNETLoader", "weight_dtype"): {"default"},
    ("CLIPLoader", "type"): {"qwen_image", "lumina2"},
    ("DualCLIPLoader", "type"): {"flux"},
}


def workflows():
    """A workflow of each kind, and of each sampler and start."""
    for kind in KINDS:
        eta = 1.0 if kind in ("sd", "sdxl", "playground") else 0.0
        yield make_workflow(teacher_of(kind), student_of(kind, [999, 500, 0], noise_eta=eta))
    for settings in ({"prediction_type": "v_prediction"}, WITHOUT_NOISE, {"kernel": "renoise"}):
        yield make_workflow(teacher_of("sd"), student_of("sd", [899, 500, 0], **settings))


def test_nodes_have_the_inputs_that_comfyui_asks_for_and_every_link_comes_from_an_output_of_its_type():
    seen = set()
    for nodes in workflows():
        used = set()
        for number, node in nodes.items():
            inputs, _ = NODES[node["class_type"]]
            assert node["inputs"].keys() == inputs.keys(), node
            for name, wanted in inputs.items():
                value = node["inputs"][name]
                if wanted in VALUES:
                    assert type(value) is VALUES[wanted], (node, name)
                    assert value in CHOICES.get((node["class_type"], name), [value])
                else:
                    source, place = value
                    assert NODES[nodes[source]["class_type"]][1][place] == wanted, (node, name)
                    assert int(source) < int(number)
                    used.add(source)
            seen.add(node["class_type"])
        (last,) = nodes.keys() - used  # all others are of use
        assert nodes[last]["class_type"] == "SaveImage"
    assert seen == {*NODES}


def test_a_workflow_has_the_size_text_and_guidance_of_the_student():
    nodes = make_workflow(teacher_of("flux"), student_of("flux", [999, 0], guidance_scale=3.5))
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert given["FluxGuidance"]["guidance"] == 3.5
    assert given["SamplerCustom"]["cfg"] == 1.0
    assert given["T5TokenizerOptions"]["min_length"] == 512  # of the pipeline; ComfyUI pads to 256 by itself
    _, height, width = teacher_of("flux").image_shape
    assert given["EmptySD3LatentImage"] == {"width": width, "height": height, "batch_size": 1}
    teacher = load_teacher(pipeline_of("sd3"))
    teacher.set_size([16, 24])
    teacher.set_length(77)
    schedule = HSIVIScheduler.from_config(teacher.schedule.config, layer_timesteps=[999, -1], noise_eta=0.0)
    given = {node["class_type"]: node["inputs"] for node in make_workflow(teacher, schedule).values()}
    assert given["T5TokenizerOptions"]["min_length"] == 77
    assert given["EmptySD3LatentImage"] == {"width": 24, "height": 16, "batch_size": 1}


# ----- the sampler -----


def sigmas_in(nodes, link):
    """What ManualSigmas reads: the numbers of a text, without exponents."""
    text = nodes[link[0]]["inputs"]["sigmas"]
    found = re.findall(r"[-+]?(?:\d*\.*\d+)", text)
    assert ", ".join(found) == text
    return torch.tensor([float(number) for number in found])


def draw_there(kind, nodes, noise, generator):
    """Returns the latents that ComfyUI would decode, by the scheduler of diffusers that its sampler equals.

    It starts and ends as `noise_scaling` and `inverse_noise_scaling` of comfy/model_sampling.py, `max_denoise` of
    comfy/samplers.py and AddNoise do, and asks the network at the time that `timestep` gives for a sigma.
    """
    teacher, (custom,) = teacher_of(kind), [n["inputs"] for n in nodes.values() if n["class_type"] == "SamplerCustom"]
    flow = teacher.schedule.is_flow
    sigmas, node = sigmas_in(nodes, custom["sigmas"]), nodes[custom["sampler"][0]]
    highest = {"playground": 80.0}.get(kind, 1.0 if flow else 14.6146)
    if custom["add_noise"]:
        scale = sigmas[0] if flow else (1 + sigmas[0] ** 2).sqrt() if sigmas[0] > 0.99999 * highest else sigmas[0]
    else:
        scale = sigmas_in(nodes, nodes[custom["latent_image"][0]]["inputs"]["sigmas"])[0] * (1 - sigmas[0] * flow)
    y = scale * noise
    name = node["inputs"].get("sampler_name", "ancestral")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    table = (1 / diffusers.DDPMScheduler(**betas).alphas_cumprod - 1).sqrt().log()
    if flow:
        scheduler, times = getattr(diffusers, f"FlowMatch{FLOW_SAMPLERS[name]}Scheduler")(), 1000 * sigmas[:-1]
    elif kind == "playground":
        scheduler, times = diffusers.EDMEulerScheduler(prediction_type="epsilon"), sigmas[:-1].log() / 4
    else:
        times = (sigmas[:-1].log()[:, None] - table).abs().argmin(1)
        model = nodes[custom["model"][0]]["inputs"]  # by itself ComfyUI takes the network to predict noise
        given = {**betas, "prediction_type": model.get("sampling", "epsilon")}
        if name == "lcm":  # with weights of consistency models that leave the clean image as it is
            scheduler, y = diffusers.LCMScheduler(**given, timestep_scaling=1e9), y / (1 + sigmas[0] ** 2).sqrt()
        else:
            times = times.float()  # integers would be places
            kinds = {"euler": "EulerDiscrete", "ancestral": "EulerAncestralDiscrete"}
            scheduler = getattr(diffusers, f"{kinds[name]}Scheduler")(**given)
            assert node["inputs"].get("eta", 1.0) == node["inputs"].get("s_noise", 1.0) == 1.0
    scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps = sigmas, times, len(times)
    told = teacher.arguments(torch.zeros(len(noise), dtype=torch.long), noise)
    for time in times:
        given = y if flow else scheduler.scale_model_input(y, time)
        output = teacher.forward(teacher.network, given, time.expand(len(y)), **told)
        y = scheduler.step(output, time, y, generator=generator, return_dict=False)[0]
    return y / (1 - sigmas[-1]) if flow else y


FLOW_SAMPLERS = {"euler": "EulerDiscrete", "lcm": "LCM"}


def draw_here(kind, scheduler, noise, generator):
    """Latents of the stock pipeline of the teacher with our scheduler."""
    step = scheduler.step  # to which the pipelines of flows pass no generator
    scheduler.step = lambda *given, **more: step(*given, **{**more, "generator": generator})
    given = {"prompt": [PROMPT] * len(noise), "num_inference_steps": scheduler.depths[-1], "guidance_scale": 1.0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline_of(kind), "scheduler", scheduler)
        return pipeline_of(kind)(**given, latents=noise.clone(), output_type="latent").images


EQUAL = [
    ("sd", [899, 600, 200, 0], WITHOUT_NOISE),
    ("sd", [999, 600, 200, -1], WITHOUT_NOISE),
    ("sd", [899, 600, 200, 0], {"noise_eta": 1.0}),
    ("sd", [999, 600, 200, 0], {"noise_eta": 1.0}),
    ("sd", [625, 300, 0], {"kernel": "renoise"}),
    ("sd", [899, 0], {"noise_eta": 1.0}),  # one step has no noise
    ("sd", [899, 500, 0], {"prediction_type": "v_prediction", "noise_eta": 1.0}),
    ("sdxl", [899, 600, 200, 0], {"noise_eta": 1.0}),
    ("sdxl", [899, 600, 200, 0], WITHOUT_NOISE),
    ("playground", [899, 600, 200, 0], WITHOUT_NOISE),
    ("playground", [999, 600, 200, 0], WITHOUT_NOISE),
    ("sd3", [999, 600, 200, -1], WITHOUT_NOISE),
    ("sd3", [999, 600, 200, 0], WITHOUT_NOISE),
    ("sd3", [800, 600, 200, -1], WITHOUT_NOISE),
    ("sd3", [999, 600, 200, -1], {"kernel": "renoise"}),
    ("sd3", [999, -1], {"noise_eta": 1.0}),
]


@pytest.mark.parametrize(("kind", "grid", "settings"), EQUAL)
@torch.no_grad()
def test_the_sampler_of_comfyui_draws_the_images_of_the_student(kind, grid, settings):
    """But for the factor 1 / alpha of the last level, and at eta 1 noise of std s_0^2 / s, as the page says."""
    teacher, scheduler = teacher_of(kind), student_of(kind, grid, **settings)
    noise = torch.randn(2, *teacher.shape)
    ours = draw_here(kind, scheduler, noise, torch.Generator().manual_seed(1))
    theirs = draw_there(kind, make_workflow(teacher, scheduler), noise, torch.Generator().manual_seed(1))
    (alpha_before, sigma_before), (alpha, sigma) = ends_of(scheduler)
    assert 0.997 < alpha <= 1
    is_ancestral = equal_sampler(scheduler).node == "SamplerEulerAncestral"
    lost = 5 * is_ancestral * (sigma / alpha) ** 2 * alpha_before / sigma_before  # no number drawn is above 5
    torch.testing.assert_close(theirs, ours / alpha, rtol=1e-5, atol=2e-6 * float(ours.abs().max()) + lost)
    images, wanted = teacher.decode(theirs), teacher.decode(ours)
    assert (images - wanted).abs().max() < 0.003
    assert (images - teacher.decode(ours / alpha)).abs().max() < 1e-4 + lost
    fewer = student_of(kind, [grid[0], 1, 0], **{**settings, **WITHOUT_NOISE, "kernel": "ddim"})
    other = draw_there(kind, make_workflow(teacher, fewer), noise, None)
    assert (other - theirs).abs().max() > 0.01  # so the steps matter


def ends_of(scheduler):
    """Alpha and sigma of the last two levels of a student's grid."""
    return [
        [float(each) for each in scheduler.alpha_sigma(end[None], torch.zeros(1))] for end in scheduler.layers.grid[-2:]
    ]


def ancestral(y, x0, s, down_to, eta, s_noise, noise):
    """A step of k-diffusion's `sample_euler_ancestral`, by the formulas of Karras et al. (2022) and of DDIM."""
    up = eta * down_to * math.sqrt(s**2 - down_to**2) / s
    down = math.sqrt(down_to**2 - up**2)
    return x0 + down / s * (y - x0) + up * s_noise * noise


@pytest.mark.parametrize("kind", others_slow(["sd", "sdxl", "playground"], "sd", "playground"))
@pytest.mark.parametrize(("eta", "s_noise"), [(0.2, 1.0), (0.7, 1.0), (1.0, 1.3), (0.5, 0.8)])
@torch.no_grad()
def test_any_eta_and_one_scale_of_noise_are_settings_of_the_sampler(kind, eta, s_noise):
    """All layers but the last are equal, and the last sigma is the nearest."""
    teacher, scheduler = teacher_of(kind), student_of(kind, [899, 600, 200, 0], noise_eta=eta, noise_scale=s_noise)
    sampler = equal_sampler(scheduler)
    assert sampler.node == "SamplerEulerAncestral"
    assert sampler.settings == {"eta": eta, "s_noise": s_noise}
    sigmas = [float(text) for text in sampler.sigmas.split(", ")]
    x, condition = torch.randn(2, *teacher.shape), torch.zeros(2, dtype=torch.long)
    y = float(sampler.first_noise) * x
    levels = scheduler.layers.grid
    for place, (time, level) in enumerate(zip(scheduler.timesteps, levels[:-1], strict=True)):
        noise = torch.randn_like(x)
        x0, _ = scheduler.predict(output := teacher.call(teacher.network, x, time, condition), int(level), x)
        x = scheduler.step(output, time, x, variance_noise=noise).prev_sample
        y = ancestral(y, x0, *sigmas[place : place + 2], eta, s_noise, noise)
        alpha, sigma = (float(each) for each in scheduler.alpha_sigma(levels[place + 1 : place + 2], torch.zeros(1)))
        if place < 2:  # the last has its own
            torch.testing.assert_close(y, x / alpha, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    # Of the last step: what its noise adds, and what it leaves of eps, both of variance 1.
    level = scheduler.layers.by_time[float(scheduler.timesteps[-1])]

    def lost(s):
        up = eta * s * math.sqrt(1 - (s / sigmas[-2]) ** 2)
        return math.hypot(s_noise * up, math.sqrt(s**2 - up**2) - level.direction / alpha)

    end = sigma / alpha
    assert lost(sigmas[-1]) < 1.001 * min(lost(end * share / 100) for share in range(101))
    assert lost(sigmas[-1]) <= 0.51 * end * max(1, s_noise)


def test_the_first_noise_would_be_too_small_without_its_factor():
    """By what the page says, at timesteps 899 and 625 of Stable Diffusion."""
    for start, share in ((899, 0.0072), (625, 0.0769)):
        sampler = equal_sampler(student_of("sd", [start, 0]))
        assert float(sampler.first_noise) / float(sampler.sigmas.split(",")[0]) == pytest.approx(1 + share, abs=1e-4)
    assert equal_sampler(student_of("sd", [999, 0])).first_noise is None


# ----- the names in the file -----

# Modules that ComfyUI changes by `transformer.NAME`, a number as N, of attention and feed-forward: those that
# `model_lora_keys_unet` of comfy/lora.py takes from `mmdit_to_diffusers`, `flux_to_diffusers`, `auraflow_to_diffusers`
# (comfy/utils.py at a125cd8, the same at 09708ea) and `z_image_to_diffusers` (09708ea). For Qwen-Image they are the
# names of its own network, comfy/ldm/qwen_image/model.py at a125cd8. Those of UNets are in test_adapters.py.
JOINT = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
JOINT += [f"attn.add_{name}_proj" for name in "qkv"]
FEED_FORWARD = [f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")]
GATED = [f"{part}.{name}" for part in ("ff", "ff_context") for name in ("linear_1", "linear_2", "out_projection")]
SINGLE = ["attn.to_q", "attn.to_k", "attn.to_v"]
ZIMAGE = [*(f"attention.to_{name}" for name in ("q", "k", "v", "out.0")), *(f"feed_forward.w{i}" for i in (1, 2, 3))]
KNOWN = {
    "sd3": {
        "transformer_blocks": [*JOINT, *FEED_FORWARD, *(f"attn2.to_{name}" for name in ("q", "k", "v", "out.0"))],
    },
    "flux": {"transformer_blocks": [*JOINT, *FEED_FORWARD], "single_transformer_blocks": [*SINGLE, "proj_mlp"]},
    "auraflow": {
        "joint_transformer_blocks": [*JOINT, *GATED],
        "single_transformer_blocks": [*SINGLE, "attn.to_out.0", *GATED[:3]],
    },
    "qwen": {
        "transformer_blocks": [
            *JOINT,
            *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
        ],
    },
    "zimage": dict.fromkeys(("layers", "noise_refiner", "context_refiner"), ZIMAGE),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_comfyui_knows_every_name_in_the_file_of_a_transformer(kind):
    teacher = teacher_of(kind)
    names = get_peft_model_state_dict(add_adapter(teacher.network, teacher.adapter, 1))
    file = in_file(names, teacher.adapter.prefix)
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in file}
    assert len(modules) == len(names) / 2 > 5
    known = {f"transformer.{block}.N.{name}" for block, each in KNOWN[kind].items() for name in each}
    assert {re.sub(r"(blocks|layers|refiner)\.\d+\.", r"\1.N.", name) for name in modules} <= known


# ----- refusals -----


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sd3", {"noise_eta": 1.0}, "noise_eta=1 of a rectified flow: .* distil with --noise_eta 0, or draw with"),
        ("sd", {"noise_scale": [1.0, 1.2, 0.9]}, "noise_scale differs between layers or pixels"),
        ("sd", {"noise_scale_type": "per_pixel"}, "noise_scale differs between layers or pixels"),
        ("sd", {"kernel": "renoise", "noise_scale": 1.1}, "or is not 1 with kernel 'renoise'"),
        ("sd", {"beta_end": 0.02}, "ComfyUI has other noise levels"),
        ("sd", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "ComfyUI has other noise levels"),
        ("sd", {"prediction_type": "sample"}, "or other predictions of the network"),
        ("sd", {"edm": {}}, "ComfyUI has other noise levels"),
        ("playground", {"edm": {"sigma_data": 1.0}}, "ComfyUI has other noise levels"),
        ("sdxl", {"clip_sample": True}, "clips its clean latents, which ComfyUI does not"),
        ("sd3", {"thresholding": True, **WITHOUT_NOISE}, "clips its clean latents"),
    ],
)
def test_a_student_without_an_equal_in_comfyui_is_refused_with_a_remedy(kind, settings, message):
    teacher, scheduler = teacher_of(kind), student_of(kind, [899, 600, 200, 0], **settings)
    (refused,) = find_workflow(teacher, scheduler).values()
    assert re.search(message, refused)
    assert "\n" not in refused
    with pytest.raises(ValueError, match="`hsivi sample`, or in diffusers as the model card says"):
        make_workflow(teacher, scheduler)


@pytest.mark.parametrize("kind", sorted({*FLOWS} - {*KINDS}) + ["pixart"])
def test_a_kind_without_a_known_workflow_is_refused_by_name(kind):
    teacher = load_teacher(pipeline_of(kind))
    found = find_workflow(teacher, HSIVIScheduler.from_config(teacher.schedule.config, layer_timesteps=[999, 0]))
    name = type(teacher.network).__name__
    assert found["refused"].startswith(f"no workflow of ComfyUI is known for a {name}: draw with `hsivi sample`")
