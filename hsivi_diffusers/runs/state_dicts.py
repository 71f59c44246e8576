"""Tensors and state dicts on the disk without pickles: safetensors, with the rest as JSON in the header."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; a full disk is an OSError that names it.

    Of tensors that share their memory, which safetensors refuses, all but the first are copied.
    """
    single, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        single[name] = (tensor.clone() if storage in seen else tensor).contiguous()
        seen.add(storage)
    try:
        save_file(single, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): make room on the disk, or name another folder") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, mapped into memory; a damaged one is a ValueError that names it."""
    with naming_damage_of(path):
        return load_file(path)


@contextmanager
def naming_damage_of(path: Path) -> Iterator[None]:
    """Turns the error of a damaged safetensors file into a ValueError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): make it again, or remove it") from error


def save_state_dict(state: Mapping[Any, Any], path: Path) -> None:
    """Writes mappings, lists and tuples of tensors, numbers, text, booleans and None as one safetensors file.

    A tensor is named by its keys, joined by `/`; the rest is JSON in the header, where tuples become lists.

    Raises:
        OSError: The disk is full.
        TypeError: Something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_take_tensors(state, "", tensors))
    save_tensors(tensors, path, {"rest": rest})


def load_state_dict(path: Path) -> dict[Any, Any]:
    """Returns what `save_state_dict` wrote, on the CPU, bit for bit.

    Raises:
        ValueError: The file is damaged.
    """
    with naming_damage_of(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # it is no mapping
        state: dict[Any, Any] = _put_tensors(json.loads(file.metadata()["rest"]), tensors)
    return state


def _take_tensors(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a tree to a flat dictionary; mappings become pairs, since JSON has no numbers as keys."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        start = f"{name}/" if name else ""
        return {"pairs": [[key, _take_tensors(value, f"{start}{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_take_tensors(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `_take_tensors`."""
    if isinstance(tree, list):
        return [_put_tensors(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _put_tensors(value, tensors) for key, value in tree["pairs"]}
    return tree


class TrainedWeights:
    """The trainable weights of a module, and its buffers, as a part of a checkpoint; the others are the teacher's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        """Returns weights and buffers by name."""
        saved = self.module.state_dict().keys()
        return {**self._weights(), **{name: each for name, each in self.module.named_buffers() if name in saved}}

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores them; buffers may be missing.

        Raises:
            RuntimeError: A weight is missing, or has another shape.
        """
        # Version 0.2 called the network of layers and critic so.
        state = {re.sub("^unet[.]", "network.", name): value for name, value in state.items()}
        if missing := self._weights().keys() - state.keys():
            raise RuntimeError(f"the state lacks {', '.join(sorted(missing))}")
        self.module.load_state_dict(state, strict=False)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of all tensors in the safetensors files of a model, without variants; None if there are several."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        if path.name.count(".") == 1:
            with naming_damage_of(path), safe_open(path, "pt") as file:
                dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(*dtypes) if len(dtypes) == 1 else None


def hash_weights(hash: hashlib._Hash, module: nn.Module, single: bool = False) -> None:
    """Adds the names, types, shapes and bytes of the weights of a module to a hash; `single` as in single precision."""
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.float() if single and tensor.is_floating_point() else tensor
        hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hash.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators of this process as JSON: of Python, NumPy, torch on the CPU, and torch on its device."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # the global one, which libraries use
    state = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    state["cpu"] = torch.get_rng_state().tolist()
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state().tolist()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores what `random_state` returned; a device of another type keeps its generator."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(torch.tensor(state[device.type], dtype=torch.uint8))
