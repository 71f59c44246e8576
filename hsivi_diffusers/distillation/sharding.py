"""The frozen weights of a run with adapters, split over its processes by FSDP2 of torch (arXiv 2304.11277)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..teachers.adapters import has_adapter


def check_sharding(student: Any, accelerator: Accelerator) -> None:
    """Refuses, with ValueError, a run whose weights cannot be split."""
    if "ignored_params" not in signature(fully_shard).parameters:
        raise ValueError(f"shard_base=True needs torch 2.7, and {torch.__version__} is installed: update it")
    if not has_adapter(student):
        raise ValueError(
            "shard_base=True splits the frozen weights under LoRA adapters, and this run trains all weights: set "
            "lora_rank, or leave it out"
        )
    if getattr(student, "is_quantized", False):
        raise ValueError("shard_base=True cannot split quantised weights: take either one")
    if accelerator.num_processes == 1:
        raise ValueError(
            "shard_base=True splits weights over processes, and there is one: start several, see "
            "training/accelerate_configs, or set it to False"
        )


def shard_base(networks: Sequence[Any], device: torch.device) -> None:
    """Splits the frozen weights of networks that share them over the processes of each machine.

    A block of a network is whole while it runs. Trained weights stay whole, and the networks go on sharing the rest.

    Args:
        networks: The first has frozen weights alone, and the others have them too. The weights may be on the CPU.
        device: Where they go.
    """
    mesh, (base, *others) = _mesh_of_machine(device), networks
    names = {id(weight): name for name, weight in base.named_parameters()}
    shared = [
        {name: names[id(weight)] for name, weight in network.named_parameters() if id(weight) in names}
        for network in others
    ]
    for network in networks:
        _shard(network, mesh)
    split = dict(base.named_parameters())
    for network, named in zip(others, shared, strict=True):
        network.load_state_dict({name: split[of_base] for name, of_base in named.items()}, strict=False, assign=True)


def leave_to_fsdp(module: nn.Module) -> None:
    """Has data parallelism pass over the frozen weights of a module, which are not the same in all processes."""
    frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)


def _mesh_of_machine(device: torch.device) -> DeviceMesh:
    """The processes of this machine: weights are gathered often, and the way to other machines is slower."""
    world = torch.distributed.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("machine", "process"))["process"]


def _shard(network: Any, mesh: DeviceMesh) -> None:
    """Splits block by block, so that no more than a block is whole on the device at any time."""
    trained = {weight for weight in network.parameters() if weight.requires_grad}
    kinds = network._no_split_modules or ()
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    for module in [*reversed(blocks), network]:  # inner ones first
        fully_shard(module, mesh=mesh, ignored_params=trained)
