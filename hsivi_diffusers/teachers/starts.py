"""Published students as the start of ours: a LoRA in any notation that diffusers reads, or a whole network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from peft.tuners.lora import LoraLayer

from ..runs.artifacts import ADAPTER
from ..runs.folders import check_spelling
from ..share.push import check_repo_id
from .adapters import check_finite, idle_names, share
from .latents import Latents
from .teacher import Teacher

NAME = "default"  # of the adapter, as that of `add_adapter`
ACCEPTED = (
    "give the folder of a finished run; or a LoRA of such a network, as a file, folder, ORG/REPO or ORG/REPO/FILE; or, "
    "where all weights are trained, a network of diffusers, as a folder or ORG/REPO"
)


def check_start(source: str) -> None:
    """Refuses, with ValueError, what is not here and has no name of the Hub: before a teacher is loaded."""
    place, _ = _place_of(source)
    if not Path(source).exists():
        with _naming(source):
            if Path(place).is_dir():
                raise FileNotFoundError(f"the folder {place} has no such file")
            check_spelling(place)
            check_repo_id(place)


def read_lora(teacher: Teacher, source: str) -> dict[str, torch.Tensor]:
    r"""Reads a LoRA as the stock pipeline of a teacher does.

    Args:
        teacher: Its network may have no values, for a plan.
        source: File, folder, ORG/REPO or ORG/REPO/FILE; without a file it is `pytorch_lora_weights.safetensors`.

    Returns:
        A and B by their names in the network, in float32; the scale $\alpha / r$ of the file is in B.

    Raises:
        ValueError: There is none, it is damaged, has weights that are not finite, or is of another network.
    """
    adapter = teacher.adapter
    if not isinstance(teacher, Latents) or adapter is None:
        raise ValueError(f"init_from={source!r}: no stock pipeline loads a LoRA of a {teacher.name}: give a run")
    network, (place, file) = share(teacher.network.requires_grad_(False)), _place_of(source)
    options = {"use_safetensors": True, "return_lora_metadata": True, "return_alphas": True}
    idle = tuple(f"{adapter.prefix}.{name}." for name in idle_names(network, adapter))
    with _naming(source), torch.device("cpu"):
        read, *alphas, metadata = teacher.pipeline_class.lora_state_dict(
            place, weight_name=file or ADAPTER, unet_config=network.config, **options
        )
        read = {name: value.float() for name, value in read.items() if not name.startswith(idle)}
        given = {"network_alphas": alphas[0] if alphas else None, "metadata": metadata}
        network.load_lora_adapter(read, prefix=adapter.prefix, adapter_name=NAME, low_cpu_mem_usage=True, **given)
        own = {name.removeprefix(f"{adapter.prefix}."): value for name, value in read.items()}
        state = own if any(".lora_A." in name for name in own) else convert_unet_state_dict_to_peft(own)
    layers: dict[str, Any] = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    scales = {
        f"{name}.lora_{factor}.weight": layer.scaling[NAME] if factor == "B" else 1.0
        for name, layer in layers.items()
        for factor in "AB"
    }
    if odd := sorted(scales.keys() ^ state.keys()):
        raise ValueError(
            f"init_from={source!r} lacks weights of its LoRA, or has others than those of the teacher's "
            f"{adapter.prefix}: {len(odd)} of {len(scales.keys() | state.keys())}, such as {odd[0]}: {ACCEPTED}"
        )
    check_finite(read, f"init_from={source!r}")
    return {name: state[name] * scale for name, scale in scales.items()}


def load_weights(network: Any, source: str) -> None:
    """Loads the weights of a network of diffusers, from a folder, ORG/REPO or ORG/REPO/SUBFOLDER, into a like one.

    Raises:
        ValueError: There is none, it is damaged, has weights that are not finite, or is of another kind or shape.
    """
    place, subfolder = _place_of(source)
    with _naming(source):
        state = type(network).from_pretrained(place, subfolder=subfolder).state_dict()
        network.load_state_dict(state)
    check_finite(state, f"init_from={source!r}")


def _place_of(source: str) -> tuple[str, str | None]:
    """Folder or repo, and what is named in it."""
    path = Path(source)
    if path.is_file():
        return str(path.parent), path.name
    if path.exists() or path.is_absolute():
        return source, None
    owner, *repo = source.split("/", 2)
    return "/".join([owner, *repo[:1]]), "/".join(repo[1:]) or None


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Refuses in one line, with ValueError, what diffusers, peft or the Hub refuse with many errors, and in many."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"init_from={source!r} cannot be read ({type(error).__name__}: {reason}): {ACCEPTED}"
        ) from error
    finally:
        logging.set_verbosity(level)
