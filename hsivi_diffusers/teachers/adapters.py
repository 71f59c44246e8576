"""LoRA adapters (arXiv 2106.09685): student and critic as small changes of the teacher, whose weights they share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ..runs.artifacts import ADAPTER

# Attention, feed-forward and convolutions: those of diffusers' LCM-LoRA example.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
TARGETS += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]


WEIGHTS = "teacher_weights_sha256"  # entry of the file of an adapter


def share(module: Any) -> Any:
    """Returns a copy of a module with the very tensors of those weights that are not trained, and of all buffers."""
    kept = [*(each for each in module.parameters() if not each.requires_grad), *module.buffers()]
    return copy.deepcopy(module, {id(each): each for each in kept})


def add_adapter(teacher: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """Returns a network of the teacher's tensors with an adapter that changes nothing yet, in single precision.

    Two networks are made, and no adapter of one is switched: to switch between forward and backward loses gradients.

    Args:
        teacher: It is frozen.
        rank: r of the adapter W + B A, with A of shape (r, inputs) and B of shape (outputs, r); alpha is r.
    """
    network: UNet2DConditionModel = share(teacher.requires_grad_(False))
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    cast_training_params(network)
    return network


def save_network(network: Any, folder: Path, weights_sha256: str) -> None:
    """Writes a network, or its adapter, if it has one, as the file that `load_lora_weights` of diffusers loads.

    That file has the hash of the weights that it is for. It says nothing more, for the order of entries is by chance.
    """
    if not has_adapter(network):
        network.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(network)
    tensors = {f"unet.{name}": value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / ADAPTER, {WEIGHTS: weights_sha256})


def load_adapter(network: UNet2DConditionModel, folder: Path) -> None:
    """Loads what `save_network` wrote into a network with an adapter of that rank.

    Raises:
        ValueError: There is none, or one of another rank or network.
    """
    if not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} holds no {ADAPTER}: give a run that was trained with lora_rank")
    state = {name.removeprefix("unet."): value for name, value in load_file(folder / ADAPTER).items()}
    own = get_peft_model_state_dict(network)
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError(f"{folder} has an adapter of another rank or network: give the lora_rank that it has")
    set_peft_model_state_dict(network, state)


def has_adapter(network: Any) -> bool:
    """Whether `add_adapter` made it."""
    return hasattr(network, "peft_config")
