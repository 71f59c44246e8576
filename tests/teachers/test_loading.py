"""Loading teachers: what is supported, and what is refused before weights are loaded."""

import json
import math
import shutil

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    VQModel,
)
from safetensors.torch import load_file, save_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, load_teacher
from hsivi_diffusers.teachers.configs import read_configs
from hsivi_diffusers.teachers.loading import read_teacher
from tiny_unet import make_unet


@pytest.mark.parametrize(("pipeline", "kind"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_a_teacher_is_loaded_with_its_schedule(unet, tmp_path, pipeline, kind):
    scheduler = kind(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.schedule.config.prediction_type == "v_prediction"
    assert torch.equal(teacher.schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.parameters(), unet.parameters(), strict=True))
    assert load_teacher(teacher).identity() == teacher.identity()


def test_identity_is_of_weights_and_configs(teacher, tmp_path):
    copy = load_teacher(str(shutil.copytree(teacher, tmp_path / "elsewhere")))
    before = copy.identity()
    assert before == load_teacher(str(teacher)).identity()
    copy.schedule = HSIVIScheduler.from_config(copy.schedule.config)  # as `set_size` does
    assert copy.identity() == before
    copy.network.half()
    assert copy.identity() != before


def test_a_mistyped_folder_is_refused_with_the_one_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "digits_ddpm").mkdir()
    monkeypatch.chdir(tmp_path)
    for read in (load_teacher, lambda name: read_configs(name, None)):
        with pytest.raises(ValueError, match="'digit_ddpm' is no folder here.*; did you mean digits_ddpm\\?"):
            read("digit_ddpm")
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "nothing"), "is no folder here"),
        ("./nothing", "is no folder here"),
        ("nothing", "is no folder here"),
        ("nobody/nothing", "'nobody/nothing' is no folder here, and was not loaded from the Hub .*ddpm-cifar10-32$"),
        ("empty/nothing", "was not loaded from the Hub .*; the folder empty is here, and has no nothing$"),
        (str(tmp_path / "empty"), "empty' cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            load_teacher(name)


def test_damaged_weights_are_refused(teacher_folder):
    weights = teacher_folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({**state, "conv_in.bias": state["conv_in.bias"] * math.nan}, weights)
    with pytest.raises(ValueError, match="the unet of teacher .* has weights that are NaN or infinite, the fir"):
        load_teacher(str(teacher_folder))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(teacher_folder))


@pytest.mark.parametrize(
    ("scheduler", "left_out"),
    [
        (DDPMScheduler(), {"beta_start", "trained_betas", "beta_end", "beta_schedule"}),
        (FlowMatchEulerDiscreteScheduler(), {"shift", "use_dynamic_shifting"}),
        (DPMSolverMultistepScheduler(), {"prediction_type", "use_flow_sigmas", "num_train_timesteps"}),
    ],
)
def test_a_config_that_leaves_defaults_out_is_read_as_diffusers_reads_it(teacher_folder, scheduler, left_out):
    named = {"scheduler": ["diffusers", type(scheduler).__name__], "feature_extractor": []}
    for file, change in (("model_index.json", named), ("unet/config.json", {})):
        content = {**json.loads((teacher_folder / file).read_text()), **change}
        content.pop("out_channels" if "unet" in file else "", None)
        (teacher_folder / file).write_text(json.dumps(content))
    config = {name: value for name, value in scheduler.config.items() if name not in left_out}
    (teacher_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="takes 1 channels and returns 3"):  # the default of a UNet2DModel
        load_teacher(str(teacher_folder))
    unet = teacher_folder / "unet" / "config.json"
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "out_channels": 1}))
    assert len(load_teacher(str(teacher_folder)).schedule) == 1000


def latent():
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, num_vq_embeddings=8)
    return LDMPipeline(vqvae=vae, unet=make_unet(), scheduler=DDIMScheduler())


def of(scheduler, **options):
    return DDPMPipeline(unet=make_unet(**options), scheduler=scheduler)


CONDITIONAL = {"_class_name": "UNet2DConditionModel"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
LABELS = {"class_embed_type": "identity", "num_class_embeds": 4}
STUDENT = HSIVIScheduler(layer_timesteps=[440, 220, 10])
DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
REFUSED = [
    (latent, "is a LDMPipeline with vqvae"),
    (lambda: HSIVIPipeline(make_unet(), STUDENT), "a sampler that was distilled: give the teacher it had"),
    (lambda: of(DYNAMIC), "its FlowMatchEulerDiscreteScheduler has use_dynamic_shifting, so its noise"),
    (lambda: of(CogVideoXDDIMScheduler(snr_shift_scale=3.0)), "CogVideoXDDIMScheduler"),
    (lambda: of(DDIMScheduler(**ZERO_SNR)), "goes with prediction_type 'v_prediction' or 'sample'"),
    (lambda: of(DDPMScheduler(), out_channels=3), "takes 1 channels and returns 3"),
    (lambda: of(DDPMScheduler(), num_train_timesteps=500), "made for 500 timesteps, the scheduler counts 1000"),
    (lambda: of(DDPMScheduler(), class_embed_type="timestep"), "class_embed_type='timestep' and num_class_embeds=None"),
    (lambda: of(DDPMScheduler(), **LABELS), "which are no class labels: give a te"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_teacher_is_refused_before_its_weights_are_loaded(tmp_path, make, message):
    make().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for read in (load_teacher, read_teacher):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path))


@pytest.mark.parametrize(("file", "kind"), [("options.json", "run"), ("pytorch_lora_weights.safetensors", "LoRA")])
def test_what_was_distilled_is_no_teacher(tmp_path, file, kind):
    (tmp_path / file).write_text("{}")
    for read in (load_teacher, read_teacher):
        with pytest.raises(ValueError, match=f"is the folder of a {kind}: give the teacher it had, .* by init_from"):
            read(str(tmp_path))


PIXELS = {"_class_name": "DDPMPipeline", "vae": [None, None]}
NOISE = "scheduler/scheduler_config.json"
EDITED = [
    *(
        ("dit", "model_index.json", {"_class_name": f"{kind}Pipeline"}, reason)
        for kind, reason in {
            "SanaSprint": "is a SanaSprintPipeline, which cannot be distilled: it is distilled already",
            "Flux2KleinKV": "it is distilled already",
            "CogView4": "its network takes the times of unshifted noise levels",
            "HiDreamImage": "its text takes 67 MB a prompt",
            "StableCascadeCombined": "several networks in turn",
            **dict.fromkeys(["Wan", "LTX", "HunyuanVideo", "Mochi", "CogVideoX"], "it draws video, and only images"),
            "FluxKontext": "takes an image beside the text",
        }.items()
    ),
    ("dit", "model_index.json", {"is_distilled": True}, "is_distilled=True, so it is distilled already: give the base"),
    ("dit", "model_index.json", PIXELS, "DDPMPipeline with transformer: only"),
    ("dit", "transformer/config.json", {"sample_size": [8, 8]}, "sample_size=.8, 8. of the transformer: it must"),
    ("dit", "transformer/config.json", {"out_channels": 3}, "the transformer takes 2 channels and returns 3"),
    ("dit", "transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "transformer of type SD3Transformer"),
    ("dit", NOISE, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, which is supported in pipelines of"),
    ("dit", NOISE, {"_class_name": "ScoreSdeVeScheduler"}, "no betas, and is neither of a rectified flow nor of EDM"),
    ("sd", "unet/config.json", {"in_channels": 9}, "the unet takes 9 channels and returns 2"),
    ("sd", "unet/config.json", {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8 of the unet, and only None is"),
    ("sd", "unet/config.json", {"_class_name": "UNet2DModel"}, "unet of type UNet2DModel, a UNet2DConditionModel is"),
    ("sdxl", "unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type='image' of the unet, and only"),
    ("pixels", "unet/config.json", CONDITIONAL, "unet of type UNet2DConditionModel, a UNet2DModel is needed"),
]


@pytest.mark.parametrize(("kind", "file", "change", "message"), EDITED)
def test_what_the_configs_refuse_is_refused_before_weights_are_loaded(
    teacher, dit_teacher, text_teachers, tmp_path, kind, file, change, message
):
    source = {"pixels": teacher, "dit": dit_teacher}.get(kind) or text_teachers(kind)
    folder = shutil.copytree(source, tmp_path / "other")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    config = {**json.loads((folder / file).read_text()), **change}
    if "scheduler" in file:
        config = {name: value for name, value in config.items() if not name.startswith(("beta", "trained"))}
    (folder / file).write_text(json.dumps(config))
    for read in (load_teacher, read_teacher):
        with pytest.raises(ValueError, match=message):
            read(str(folder))


def test_what_looks_like_it_is_loaded(unet, tmp_path):
    DDPMPipeline(unet=unet, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(tmp_path / "flow")
    schedule = load_teacher(str(tmp_path / "flow")).schedule
    assert (schedule.is_flow, schedule.config.shift) == (True, 3.0)
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = load_teacher(of(DDIMScheduler(**options))).schedule
    assert schedule.alphas_cumprod[-1] == 0
    assert load_teacher(of(DDPMScheduler(), class_embed_type="timestep", num_class_embeds=4)).num_conditions() == 4
