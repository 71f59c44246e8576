import json

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

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, load_teacher
from hsivi_diffusers.teachers.configs import read_configs
from hsivi_diffusers.teachers.denoisers import num_classes
from tiny_unet import make_unet

GRID = [440, 220, 10]


# ----- loading -----


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler_class"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_a_teacher_is_loaded_with_its_schedule(unet, tmp_path, pipeline_class, scheduler_class):
    scheduler = scheduler_class(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline_class(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    loaded, schedule = load_teacher(str(tmp_path))
    assert schedule.config.prediction_type == "v_prediction"
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))


def test_a_missing_folder_is_told_before_the_hub_is_asked(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: give a folder or repo id"):
        load_teacher(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is not a folder"):
        load_teacher("./nothing")


def test_a_mistyped_folder_is_told_with_the_one_that_is_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "digits_ddpm").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'digit_ddpm' is no folder here.*; did you mean digits_ddpm\\?"):
        load_teacher("digit_ddpm")
    assert capsys.readouterr().err.startswith("there is no folder digit_ddpm, so the Hub is asked; did you mean")
    with pytest.raises(OSError, match="'digit_ddpm' is no folder here.*; did you mean digits_ddpm\\?"):
        read_configs("digit_ddpm", None)


def test_a_repo_that_cannot_be_reached_is_told():
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder here, and was not loaded from the Hub"):
        load_teacher("nobody/nothing")


def test_an_empty_folder_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match=f"teacher '{tmp_path}' cannot be loaded"):
        load_teacher(str(tmp_path))


def test_a_damaged_teacher_is_refused(teacher_folder):
    weights = teacher_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(teacher_folder))


def test_a_teacher_of_a_rectified_flow_is_loaded_unless_its_levels_depend_on_the_image(unet, tmp_path):
    for name, options in (("static", {"shift": 3.0}), ("dynamic", {"use_dynamic_shifting": True})):
        DDPMPipeline(unet=unet, scheduler=FlowMatchEulerDiscreteScheduler(**options)).save_pretrained(tmp_path / name)
    _, schedule = load_teacher(str(tmp_path / "static"))
    assert (schedule.is_flow, schedule.config.shift) == (True, 3.0)
    with pytest.raises(ValueError, match="its FlowMatchEulerDiscreteScheduler has use_dynamic_shifting, so its noise"):
        load_teacher(str(tmp_path / "dynamic"))


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
    assert len(load_teacher(str(teacher_folder))[1]) == 1000


def test_another_kind_of_unet_is_refused(tmp_path):
    unet = UNet2DConditionModel(
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
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unet of type UNet2DConditionModel, a UNet2DModel is needed"):
        load_teacher(str(tmp_path))


def test_a_teacher_of_zero_terminal_snr_is_loaded_unless_it_predicts_noise(unet, tmp_path):
    for prediction_type in ("v_prediction", "epsilon"):
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / prediction_type)
    _, schedule = load_teacher(str(tmp_path / "v_prediction"))
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert schedule.alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="rescale_betas_zero_snr goes with prediction_type 'v_prediction' or 'sample'"):
        load_teacher(str(tmp_path / "epsilon"))


def test_a_schedule_that_cannot_be_rebuilt_is_refused(unet, tmp_path):
    DDPMPipeline(unet=unet, scheduler=CogVideoXDDIMScheduler(snr_shift_scale=3.0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="noise levels of its CogVideoXDDIMScheduler cannot be rebuilt from its betas"):
        load_teacher(str(tmp_path))


def test_a_latent_teacher_is_refused(unet, tmp_path):
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, num_vq_embeddings=8)
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LDMPipeline with vqvae"):
        load_teacher(str(tmp_path))


def test_a_distilled_sampler_is_no_teacher(unet, tmp_path):
    HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(layer_timesteps=GRID)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a sampler that was distilled: give the teacher it had"):
        load_teacher(str(tmp_path))


def test_a_unet_and_a_scheduler_that_disagree_are_refused(tmp_path):
    for name, options, message in (
        ("channels", {"out_channels": 3}, "takes 1 channels and returns 3"),
        ("clock", {"num_train_timesteps": 500}, "made for 500 timesteps, the scheduler counts 1000"),
        ("time", {"class_embed_type": "timestep"}, "class_embed_type='timestep' and num_class_embeds=None of the unet"),
        ("vector", {"class_embed_type": "identity", "num_class_embeds": 4}, "takes what is no class label: give a te"),
    ):
        path = tmp_path / name
        DDPMPipeline(unet=make_unet(**options), scheduler=DDPMScheduler()).save_pretrained(path)
        with pytest.raises(ValueError, match=message):
            load_teacher(str(path))
    unet = make_unet(class_embed_type="timestep", num_class_embeds=4)
    assert num_classes(load_teacher(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))[0]) == 4
