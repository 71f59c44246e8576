"""Published students as the start of ours: a LoRA in any notation that diffusers reads, or a whole network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer

from ..runs.artifacts import ADAPTER
from .adapters import add_adapter, idle_names, share
from .latents import Latents
from .teacher import Teacher

NAME = "default"  # of the adapter, as that of `add_adapter`
ACCEPTED = (
    "give the folder of a finished run; or a LoRA of such a network, as a file, folder, ORG/REPO or ORG/REPO/FILE; or, "
    "where all weights are trained, a network of diffusers, as a folder or ORG/REPO"
)


def with_lora(teacher: Teacher, source: str) -> Any:
    r"""Returns a network that shares the tensors of a teacher's, with the adapter of a file, in float32.

    It has the modules of the file, all with its highest rank r, and W + B A is what the stock pipeline computes: B has
    the scale $\alpha / r$ of the file, and is 0 at further ranks.

    Args:
        teacher: Whose pipeline reads the file. Its network is frozen.
        source: File, folder, ORG/REPO or ORG/REPO/FILE; without a file it is `pytorch_lora_weights.safetensors`.

    Raises:
        ValueError: There is none, it is damaged, has weights that are not finite, or is of another network.
    """
    network, adapter = teacher.network, teacher.adapter
    assert isinstance(teacher, Latents)
    assert adapter is not None
    loaded, (place, file) = share(network.requires_grad_(False)), _place_of(source)
    options = {"use_safetensors": True, "return_lora_metadata": True, "return_alphas": True}
    idle = tuple(f"{adapter.prefix}.{name}." for name in idle_names(network, adapter))
    with _naming(source), torch.device("cpu"):  # also where the network has no values, for a plan
        read, *alphas, metadata = teacher.pipeline_class.lora_state_dict(
            place, weight_name=file or ADAPTER, unet_config=network.config, **options
        )
        read = {name: value for name, value in read.items() if not name.startswith(idle)}
        given = {"network_alphas": alphas[0] if alphas else None, "metadata": metadata}
        loaded.load_lora_adapter(read, prefix=adapter.prefix, adapter_name=NAME, low_cpu_mem_usage=True, **given)
    _check_finite(source, read)
    layers: dict[str, Any] = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, LoraLayer)}
    if not layers or len(read) > 2 * len(layers):
        raise ValueError(
            f"init_from={source!r} has {len(read) - 2 * len(layers)} of {len(read)} weights that are no LoRA of the "
            f"teacher's {adapter.prefix}: {ACCEPTED}"
        )
    rank = max(layer.r[NAME] for layer in layers.values())
    adapted = add_adapter(network, adapter._replace(targets="|".join(map(re.escape, layers))), rank)
    for name, layer in layers.items():
        own: Any = adapted.get_submodule(name)
        down, up = (factors[NAME].weight.data for factors in (layer.lora_A, layer.lora_B))
        own.lora_A[NAME].weight.data[: len(down)] = down
        own.lora_B[NAME].weight.data.zero_()[:, : len(down)] = up * layer.scaling[NAME]
    return adapted


def load_weights(network: Any, source: str) -> None:
    """Loads the weights of a network of diffusers, from a folder, ORG/REPO or ORG/REPO/SUBFOLDER, into a like one.

    Raises:
        ValueError: There is none, it is damaged, has weights that are not finite, or is of another kind or shape.
    """
    place, subfolder = _place_of(source)
    with _naming(source):
        state = type(network).from_pretrained(place, subfolder=subfolder).state_dict()
        network.load_state_dict(state)
    _check_finite(source, state)


def _place_of(source: str) -> tuple[str, str | None]:
    """Folder or repo, and what is named in it."""
    path = Path(source)
    if path.is_file():
        return str(path.parent), path.name
    if path.exists() or path.is_absolute():
        return source, None
    owner, *repo = source.split("/", 2)
    return "/".join([owner, *repo[:1]]), "/".join(repo[1:]) or None


def _check_finite(source: str, state: dict[str, torch.Tensor]) -> None:
    if damaged := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"init_from={source!r} has {len(damaged)} weights that are not finite, such as {damaged[0]}")


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
