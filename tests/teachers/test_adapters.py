"""`teachers/adapters.py`: the names in the file of a LoRA, of diffusers, and of ComfyUI and those that follow it."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.teachers.adapters import UNET, add_adapter, factor_names, in_file, of_file, save_adapter
from hsivi_diffusers.teachers.stable_diffusion import StableDiffusion, StableDiffusionXL
from slow import others_slow
from tiny_text import MIDDLE, make_text

# Modules of a UNet that ComfyUI changes by `lora_unet_NAME`: UNET_MAP_RESNET, UNET_MAP_ATTENTIONS, TRANSFORMER_BLOCKS,
# UNET_MAP_BASIC and the samplers in `unet_to_diffusers` of comfy/utils.py, as `model_lora_keys_unet` of comfy/lora.py
# names them, a dot as "_" (github.com/comfyanonymous/ComfyUI, commit 00728eb).
BLOCK = r"(?:(?:down|up)_blocks\.\d+|mid_block)"
ATTENTION = rf"{BLOCK}\.attentions\.\d+"
LAYER = rf"{ATTENTION}\.transformer_blocks\.\d+"
COMFYUI = [
    rf"{BLOCK}\.resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)",
    rf"{BLOCK}\.(?:down|up)samplers\.0\.conv",
    rf"{ATTENTION}\.(?:proj_in|proj_out)",
    rf"{LAYER}\.attn[12]\.(?:to_q|to_k|to_v|to_out\.0)",
    rf"{LAYER}\.ff\.net\.(?:0\.proj|2)",
    r"(?:time|add|class)_embedding\.linear_[12]",
    r"conv_in",
    r"conv_out",
]
KINDS = {"sd": StableDiffusion, "sdxl": StableDiffusionXL}


def make_unet(kind, rank=2):
    """A UNet with a LoRA that changes it a good deal."""
    unet = add_adapter(make_text(kind, **MIDDLE).unet, KINDS[kind].adapter, rank)
    for name, weight in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return unet


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_the_file_of_a_unet_has_a_name_that_comfyui_knows_and_does_there_what_it_does_here(
    kind, tmp_path
):
    unet = make_unet(kind)
    save_adapter(unet, tmp_path, UNET, "hash")
    file, plain = load_file(tmp_path / ADAPTER), make_text(kind, **MIDDLE).unet
    known = [name for name, _ in plain.named_modules() if any(re.fullmatch(pattern, name) for pattern in COMFYUI)]
    wrapped = {name.split(".lora_A")[0] for name in unet.state_dict() if "lora_A" in name}
    assert wrapped <= {*known}
    for name in wrapped:
        up, down, alpha = (file.pop(f"lora_unet_{name.replace('.', '_')}.{each}") for each in UP_DOWN_ALPHA)
        weight = plain.get_submodule(name).weight
        weight.data += (alpha / len(down)) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    assert file == {}
    told = (
        {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}}
        if kind == "sdxl"
        else {}
    )
    given = torch.randn(2, plain.config.in_channels, 8, 8), 500, torch.randn(2, 7, plain.config.cross_attention_dim)
    with torch.no_grad():
        wanted, found = (network(*given, **told).sample for network in (unet, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


UP_DOWN_ALPHA = ("lora_up.weight", "lora_down.weight", "alpha")


@pytest.mark.parametrize("kind", others_slow(KINDS, "sd"))
def test_an_adapter_is_read_from_its_file_and_from_one_of_version_0_2(kind, tmp_path, same_tensors):
    unet = make_unet(kind)
    save_adapter(unet, tmp_path / "now", UNET, "hash")
    (tmp_path / "before").mkdir()
    state = {name.replace(".default", ""): weight for name, weight in unet.state_dict().items() if "lora_" in name}
    save_file({f"unet.{name}": weight for name, weight in state.items()}, tmp_path / "before" / ADAPTER)
    for folder in ("now", "before"):
        assert same_tensors(of_file(load_file(tmp_path / folder / ADAPTER), factor_names(unet), UNET), state)
        pipeline = make_text(kind, **MIDDLE)
        pipeline.load_lora_weights(tmp_path / folder, weight_name=ADAPTER)
        found = {name.replace("default_0", "default"): weight for name, weight in pipeline.unet.state_dict().items()}
        assert same_tensors(found, unet.state_dict())
    assert not {*load_file(tmp_path / "now" / ADAPTER)} & {*load_file(tmp_path / "before" / ADAPTER)}


def test_names_of_a_transformer_are_those_of_diffusers():
    assert in_file({"blocks.0.to_q.lora_A.weight": 1}, "transformer") == {"transformer.blocks.0.to_q.lora_A.weight": 1}


def test_published_shapes_have_no_module_that_comfyui_drops():
    """The UNet of Stable Diffusion 1 and 2 in its default shapes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    ends = tuple(f".{target}" for target in StableDiffusion.adapter.targets)
    targets = [name for name, _ in unet.named_modules() if f".{name}".endswith(ends)]
    assert len(targets) > 200
    assert [name for name in targets if not any(re.fullmatch(pattern, name) for pattern in COMFYUI)] == []
