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
    UNet2DConditionModel,
    VQModel,
)
from safetensors.torch import load_file, save_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, load_teacher
from hsivi_diffusers.teachers.configs import read_configs
from hsivi_diffusers.teachers.loading import read_teacher
from tiny_unet import make_unet


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler_class"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_a_teacher_is_loaded_with_its_schedule(unet, tmp_path, pipeline_class, scheduler_class):
    scheduler = scheduler_class(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline_class(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.schedule.config.prediction_type == "v_prediction"
    assert torch.equal(teacher.schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.parameters(), unet.parameters(), strict=True))
    assert load_teacher(teacher).identity() == teacher.identity()


def test_identity_is_of_weights_and_configs(teacher, tmp_path):
    copy = load_teacher(str(shutil.copytree(teacher, tmp_path / "elsewhere")))
    before = copy.identity()
    assert before == load_teacher(str(teacher)).identity()
    copy.network.half()
    assert copy.identity() != before


def test_a_repo_that_cannot_be_reached_is_reported():
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder here, and was not loaded from the Hub"):
        load_teacher("nobody/nothing")


def test_a_mistyped_folder_is_refused_with_the_one_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "digits_ddpm").mkdir()
    monkeypatch.chdir(tmp_path)
    for read in (load_teacher, lambda name: read_configs(name, None)):
        with pytest.raises(ValueError, match="'digit_ddpm' is no folder here.*; did you mean digits_ddpm\\?"):
            read("digit_ddpm")
    for name in (str(tmp_path / "nothing"), "./nothing"):
        with pytest.raises(ValueError, match="is no folder here"):
            load_teacher(name)


def test_an_empty_folder_and_damaged_weights_are_refused(teacher_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' cannot be loaded"):
        load_teacher(str(tmp_path / "empty"))
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
    ids=["betas", "flow", "solver"],
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


def conditional():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )


def latent():
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, num_vq_embeddings=8)
    return LDMPipeline(vqvae=vae, unet=make_unet(), scheduler=DDIMScheduler())


def of(scheduler, **options):
    return DDPMPipeline(unet=make_unet(**options), scheduler=scheduler)


REFUSED = {
    "another unet": (
        lambda: DDPMPipeline(unet=conditional(), scheduler=DDPMScheduler()),
        "unet of type UNet2DConditionModel, a UNet2DModel is needed",
    ),
    "latents": (latent, "is a LDMPipeline with vqvae"),
    "a student": (
        lambda: HSIVIPipeline(unet=make_unet(), scheduler=HSIVIScheduler(layer_timesteps=[440, 220, 10])),
        "a sampler that was distilled: give the teacher it had",
    ),
    "dynamic shifting": (
        lambda: of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
        "its FlowMatchEulerDiscreteScheduler has use_dynamic_shifting, so its noise",
    ),
    "other levels": (lambda: of(CogVideoXDDIMScheduler(snr_shift_scale=3.0)), "CogVideoXDDIMScheduler"),
    "zero terminal SNR and noise": (
        lambda: of(DDIMScheduler(rescale_betas_zero_snr=True)),
        "rescale_betas_zero_snr goes with prediction_type 'v_prediction' or 'sample'",
    ),
    "channels": (lambda: of(DDPMScheduler(), out_channels=3), "takes 1 channels and returns 3"),
    "clock": (
        lambda: of(DDPMScheduler(), num_train_timesteps=500),
        "made for 500 timesteps, the scheduler counts 1000",
    ),
    "time embedding": (
        lambda: of(DDPMScheduler(), class_embed_type="timestep"),
        "class_embed_type='timestep' and num_class_embeds=None of the unet",
    ),
    "vectors": (
        lambda: of(DDPMScheduler(), class_embed_type="identity", num_class_embeds=4),
        "which are no class labels: give a te",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_teacher_is_refused_before_its_weights_are_loaded(tmp_path, name):
    make, message = REFUSED[name]
    make().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for read in (load_teacher, read_teacher):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path))


EDITED = [
    (
        "dit",
        "model_index.json",
        {"_class_name": "SanaSprintPipeline"},
        "is a SanaSprintPipeline, which cannot be distilled: it is distilled already",
    ),
    ("dit", "model_index.json", {"_class_name": "Flux2KleinKVPipeline"}, "it is distilled already"),
    (
        "dit",
        "model_index.json",
        {"_class_name": "CogView4Pipeline"},
        "its network takes the times of unshifted noise levels",
    ),
    ("dit", "model_index.json", {"_class_name": "HiDreamImagePipeline"}, "its text takes 67 MB a prompt"),
    ("dit", "model_index.json", {"_class_name": "StableCascadeCombinedPipeline"}, "several networks in turn"),
    ("dit", "model_index.json", {"_class_name": "WanPipeline"}, "it draws video, and only images"),
    ("dit", "model_index.json", {"_class_name": "LTXPipeline"}, "it draws video"),
    ("dit", "model_index.json", {"_class_name": "HunyuanVideoPipeline"}, "it draws video"),
    ("dit", "model_index.json", {"_class_name": "MochiPipeline"}, "it draws video"),
    ("dit", "model_index.json", {"_class_name": "CogVideoXPipeline"}, "it draws video"),
    ("dit", "model_index.json", {"_class_name": "FluxKontextPipeline"}, "takes an image beside the text"),
    ("dit", "model_index.json", {"is_distilled": True}, "is_distilled=True, so it is distilled already: give the base"),
    (
        "dit",
        "model_index.json",
        {"_class_name": "DDPMPipeline", "vae": [None, None]},
        "DDPMPipeline with transformer: only",
    ),
    ("dit", "transformer/config.json", {"sample_size": [8, 8]}, "sample_size=.8, 8. of the transformer: it must"),
    ("dit", "transformer/config.json", {"out_channels": 3}, "the transformer takes 2 channels and returns 3"),
    (
        "dit",
        "transformer/config.json",
        {"_class_name": "SD3Transformer2DModel"},
        "a transformer of type SD3Transformer",
    ),
    (
        "dit",
        "scheduler/scheduler_config.json",
        {"_class_name": "EDMEulerScheduler"},
        "neither betas nor a rectified flow",
    ),
    ("sd", "unet/config.json", {"in_channels": 9}, "the unet takes 9 channels and returns 2"),
    (
        "sd",
        "unet/config.json",
        {"time_cond_proj_dim": 8},
        "time_cond_proj_dim=8 of the unet, and only None is supported",
    ),
    ("sd", "unet/config.json", {"_class_name": "UNet2DModel"}, "unet of type UNet2DModel, a UNet2DConditionModel is"),
    (
        "sdxl",
        "unet/config.json",
        {"addition_embed_type": "image"},
        "addition_embed_type='image' of the unet, and only None",
    ),
]


@pytest.mark.parametrize(("kind", "file", "change", "message"), EDITED)
def test_what_the_configs_refuse_is_refused_before_weights_are_loaded(
    dit_teacher, text_teachers, tmp_path, kind, file, change, message
):
    folder = shutil.copytree(dit_teacher if kind == "dit" else text_teachers(kind), tmp_path / "other")
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
