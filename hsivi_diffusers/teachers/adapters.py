"""LoRA adapters (arXiv 2106.09685): student and critic as small changes of the teacher, whose weights they share."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

from ..runs.artifacts import ADAPTER
from ..runs.state_dicts import save_tensors

T = TypeVar("T")
UNET = "unet"  # prefix of the names of its weights
BASE = "teacher_weights_sha256"  # entry of the file of an adapter


class Adapter(NamedTuple):
    """Where the adapters of a kind of teacher go."""

    targets: list[str] | str  # ends of names of modules, or a pattern for whole ones, as in peft
    prefix: str  # of the names in the file that `load_lora_weights` of diffusers loads, see `in_file`
    rank: int = 64  # the default
    idle: tuple[str, ...] = ()  # names in the last block of modules that get no gradient, and no adapter


def share(module: Any) -> Any:
    """Returns a copy that shares frozen parameters and buffers with the original."""
    kept = [*(each for each in module.parameters() if not each.requires_grad), *module.buffers()]
    return copy.deepcopy(module, {id(each): each for each in kept})


def add_adapter(network: Any, adapter: Adapter, rank: int) -> Any:
    """Returns a network that shares the tensors of another, with an adapter that changes nothing yet, in float32.

    Each of two players gets its own: to switch adapters of one network between forward and backward loses gradients.

    Args:
        network: The teacher's; it is frozen.
        adapter: Where the adapter goes.
        rank: r of the adapter W + B A, with A of shape (r, inputs) and B of shape (outputs, r); alpha is r.
    """
    from peft import LoraConfig  # of the extra train, which drawing and measuring do not need

    adapted = share(network.requires_grad_(False))
    left_out = idle_names(network, adapter) or None
    adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=adapter.targets, exclude_modules=left_out))
    cast_training_params(adapted)
    return adapted


def idle_names(network: Any, adapter: Adapter) -> list[str]:
    """The names of the modules of a network that an adapter leaves out, for nothing depends on them."""
    return [f"transformer_blocks.{len(network.transformer_blocks) - 1}.{name}" for name in adapter.idle]


def with_factors(network: Any, adapter: Adapter, state: Mapping[str, torch.Tensor]) -> Any:
    """Returns a network that shares the tensors of another, with an adapter of given weights, in float32.

    Args:
        network: The teacher's; it is frozen.
        adapter: For what gets no adapter.
        state: A and B by their names in the network. All modules get the highest rank; B is 0 where it has less.
    """
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in state)
    rank = max(len(value) for name, value in state.items() if ".lora_A." in name)
    adapted = add_adapter(network, adapter._replace(targets="|".join(map(re.escape, modules))), rank)
    for name, weight in weights_of(adapted).items():
        if ".lora_B." in name:
            weight.zero_()
        weight[tuple(map(slice, state[name].shape))] = state[name].to(weight)
    return adapted


def weights_of(network: Any) -> dict[str, torch.Tensor]:
    """A and B of the adapter of a network, by their names in it, as its state by peft."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(network))


def factor_names(network: Any) -> list[str]:
    """The names that A and B of all modules of a network would have, see `weights_of`."""
    return [f"{name}.lora_{factor}.weight" for name, _ in network.named_modules() for factor in "AB"]


def read_adapter(tensors: Mapping[str, T], network: Any, prefix: str, source: str) -> dict[str, T]:
    """Returns the weights of an adapter by their names in the network, of those in the file that `save_adapter` wrote.

    Raises:
        ValueError: Some are missing, not finite, or of another network.
    """
    state = of_file(tensors, factor_names(network), prefix)
    given = sum(not name.endswith(".alpha") for name in tensors)
    modules = {name.rpartition(".lora_")[0] for name in state}
    if len(state) < max(given, 2 * len(modules), 1):
        raise ValueError(
            f"{source} has {given} weights of an adapter, of which {len(state)} fit the teacher's network, for "
            f"{len(modules)} modules with two each: copy the file again from the run, or give the teacher it had"
        )
    check_finite(tensors, source)
    return state


def check_finite(tensors: Mapping[str, Any], source: str) -> None:
    """Refuses, with ValueError, weights that are not finite."""
    if damaged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source} has {len(damaged)} weights that are not finite, such as {damaged[0]}")


def in_file(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the weights of an adapter under the names of its file, all of which diffusers loads.

    Those of a UNet are kohya's, `lora_unet_MODULE.lora_down.weight`, with the rank as `alpha`, for ComfyUI and the like
    know no others; those of a transformer have its prefix, which they know. So have those of a UNet with a module whose
    name diffusers does not make out of kohya's.
    """
    named = {f"{prefix}.{name}": value for name, value in state.items()}
    if prefix != UNET:
        return named
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # not without transformers

    kohya = convert_state_dict_to_kohya(named)
    read, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(kohya))
    again = convert_unet_state_dict_to_peft({name.removeprefix(f"{prefix}."): value for name, value in read.items()})
    return kohya if again.keys() == state.keys() else named


def of_file(file: Mapping[str, T], names: Collection[str], prefix: str) -> dict[str, T]:
    """Returns what a file has of the weights of an adapter, by their names; in 0.2 all had the prefix."""
    places = {f"{prefix}.{name}": name for name in names}
    if prefix == UNET:
        kohya = convert_state_dict_to_kohya(dict.fromkeys(places, torch.empty(1)))
        keys = [key for key in kohya if not key.endswith(".alpha")]
        places |= dict(zip(keys, names, strict=True))
    return {name: file[place] for place, name in places.items() if place in file}


def save_adapter(network: Any, folder: Path, prefix: str, weights_sha256: str) -> None:
    """Writes an adapter as the file that `load_lora_weights` of diffusers loads, with the hash of its base's weights.

    The file says nothing more, for the order of its entries is not fixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in weights_of(network).items()}
    save_tensors(in_file(tensors, prefix), folder / ADAPTER, {BASE: weights_sha256})


def has_adapter(network: Any) -> bool:
    """Whether it has an adapter."""
    return hasattr(network, "peft_config")


def rank_of(network: Any) -> int:
    """The highest rank of its adapter."""
    return max(len(value) for name, value in weights_of(network).items() if ".lora_A." in name)
