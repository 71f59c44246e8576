"""What a run starts from: teacher, student and critic, the grid of the student, and an earlier run's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..runs.artifacts import ADAPTER
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.adapters import add_adapter, has_adapter, load_adapter
from ..teachers.denoisers import Network, give_prompts, keep_labels, sample_shape, signal_timestep
from ..teachers.teacher import (
    Parts,
    fingerprint,
    load_prompts,
    load_student,
    network_of,
    weights_sha256,
    without_encoders,
)
from .config import HSIVIConfig, usual_settings
from .student import check_labels, label_layers, label_scales

LORA_RANK = 64
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Networks:
    """What a run starts from."""

    teacher: Network  # frozen by the bridge
    student: Network
    critic: Network
    scheduler: HSIVIScheduler  # schedule of the teacher, grid of the student
    noise_scale: HSIVINoiseScale | None
    host: DiffusionPipeline | None = None  # the teacher's, if the student is to be put into one of its kind
    encoders: Callable[[], dict[str, Any]] = dict  # of text, which the host then lacks
    weights_sha256: str = ""  # of the teacher, for its adapters
    identity: dict[str, str] = field(default_factory=dict)  # hashes of the teacher as it was loaded, and of its prompts


def load_networks(parts: Parts, config: HSIVIConfig, accelerator: Accelerator) -> Networks:
    """Copies student and critic from the teacher, which is kept in the precision of its calls; or see `init_from`."""
    teacher, schedule, host, encoders = parts
    check_fit(teacher, config)  # before prompts are encoded, which may take hours
    identity = {"teacher_sha256": fingerprint(teacher, schedule)}
    prompts = load_prompts(host, config.prompts, config.negative_prompt, accelerator.device)
    if prompts is not None:
        give_prompts(teacher, prompts)
        identity["prompts_sha256"] = prompts.digest
        host = without_encoders(host)
    networks = make_networks((teacher, *make_players(teacher, config)), schedule, config)
    if config.init_from is not None:
        carry_over(networks, Path(config.init_from))
    networks.weights_sha256 = weights_sha256(teacher) if has_adapter(networks.student) else ""
    networks.identity, networks.host, networks.encoders = identity, host, dict if prompts is None else encoders
    # Not by `to` of diffusers, which warns of modules to keep in single precision where there are none.
    nn.Module.to(networks.teacher, accelerator.device, HALF.get(accelerator.mixed_precision))
    if host is not None:
        host.vae.requires_grad_(False).to(accelerator.device)
    return networks


def check_fit(teacher: Network, config: HSIVIConfig) -> None:
    """Refuses, with ValueError, settings that are not for such a teacher."""
    kind = type(teacher).__name__
    if config.noise_scale_type == "per_pixel" and not isinstance(teacher, UNet2DModel):
        raise ValueError(
            f"noise_scale_type='per_pixel' is for a UNet2DModel, and the teacher is a {kind}, whose pipeline takes no "
            "learned noise scale: set it to 'config'"
        )
    if config.lora_rank and not isinstance(teacher, UNet2DConditionModel):
        raise ValueError(
            f"lora_rank={config.lora_rank}: of a {kind} no stock pipeline loads an adapter: set lora_rank to 0, which "
            "trains all weights"
        )
    if getattr(teacher, "is_quantized", False) and not (adapter_rank(teacher, config) and _is_shareable(teacher)):
        raise ValueError(
            "the teacher has quantised weights, which are supported in 4 bits by bitsandbytes (load_in_4bit=True, "
            "bnb_4bit_quant_storage uint8), as the base of the adapters of Stable Diffusion and SDXL: load it so, or "
            "without quantization_config"
        )
    several: dict[str, list[Any]] = {"num_inference_steps": config.depths, "guidance_scale": config.scales}
    for name, values in several.items():
        if len(values) > 1:
            check_labels(teacher, f"{name}={values}")


def _is_shareable(teacher: Network) -> bool:
    """Whether networks may share quantised weights. With those of 8 bits all but the first would answer wrongly."""
    codes = [weight.dtype for weight in teacher.parameters() if type(weight).__name__ == "Params4bit"]
    return getattr(teacher, "is_loaded_in_4bit", False) and all(dtype == torch.uint8 for dtype in codes)


def make_players(teacher: Network, config: HSIVIConfig) -> tuple[Network, Network]:
    """Returns student and critic: copies of the teacher, or its own weights with adapters."""
    if rank := adapter_rank(teacher, config):
        return add_adapter(teacher, rank), add_adapter(teacher, rank)
    return copy.deepcopy(teacher), copy.deepcopy(teacher)


def adapter_rank(teacher: Network, config: HSIVIConfig) -> int:
    """The rank of the adapters, 0 for copies."""
    usual = LORA_RANK if isinstance(teacher, UNet2DConditionModel) else 0
    return usual if config.lora_rank is None else config.lora_rank


def make_networks(three: tuple[Network, Network, Network], schedule: HSIVIScheduler, config: HSIVIConfig) -> Networks:
    """Returns teacher, student and critic with the grid of the student; the noise scale is 1."""
    teacher, student, critic = three
    check_fit(teacher, config)
    for each in three:
        keep_labels(each)
    scheduler = make_scheduler(schedule, config, sample_shape(teacher))
    if len(scales := scheduler.guidance_scales) > 1:  # of which student and critic are told one beside the class
        student, critic = (label_scales(each, scales) for each in (student, critic))
    noise_scale = HSIVINoiseScale(sample_shape(teacher)) if config.noise_scale_type == "per_pixel" else None
    if len(config.depths) > 1:  # grids, whose layers are scored at the same levels
        critic = label_layers(critic, sum(scheduler.depths))
    return Networks(teacher, student, critic, scheduler, noise_scale)


def make_scheduler(schedule: HSIVIScheduler, config: HSIVIConfig, shape: tuple[int, ...]) -> HSIVIScheduler:
    """Returns the teacher's noise schedule with the grid, or grids, of a student.

    A rectified flow starts at its last level, the only one where what is there is the base N(0, I).
    """
    start, last = config.start_timestep, len(schedule) - 1
    if schedule.is_flow:
        if config.start_spacing or config.starts not in ({}, usual_settings(config).starts, {"start_timestep": last}):
            raise ValueError(f"a student of a rectified flow starts at {last}, pure noise: leave its start out")
        start = last
    elif start is None and config.start_noise is not None:
        start = signal_timestep(schedule, (shape[0], 1, 1), 1 / config.start_noise)
    elif start is None and config.start_signal is not None:
        start = signal_timestep(schedule, shape, config.start_signal)
    starts = [None if start is None else start + place * config.start_spacing for place in range(len(config.depths))]
    grids = [
        HSIVIScheduler.make_layer_timesteps(count, config.timestep_spacing, len(schedule), first)
        for count, first in zip(config.depths, starts, strict=True)
    ]
    return HSIVIScheduler.from_config(
        schedule.config,
        layer_timesteps=grids,
        timestep_spacing=config.timestep_spacing,
        kernel="ddim",
        noise_eta=config.noise_eta,
        noise_scale_type=config.noise_scale_type,
        guidance_scale=config.guidance_scale,
        clip_sample=False,  # a clamp would stop the gradient of every pixel at black or white
        thresholding=False,
    )


def carry_over(networks: Networks, run: Path) -> None:
    """Lets student, critic and noise scale start where a finished run ended; refuses those that do not fit."""
    if has_adapter(networks.student):
        for network, name in ((networks.student, "pipeline"), (networks.critic, "critic")):
            load_adapter(network, run / name)
        return
    if (run / "pipeline" / ADAPTER).is_file():
        raise ValueError(f"init_from={str(run)!r} was trained with lora_rank, and the new run has copies: set its rank")
    pipeline = load_student(run / "pipeline")
    student = network_of(pipeline)
    if type(student) is not type(networks.student):
        raise ValueError(
            f"init_from={str(run)!r} has a {type(student).__name__}, and the teacher is a "
            f"{type(networks.student).__name__}: give a run of the same teacher"
        )
    critic = type(networks.critic).from_pretrained(run / "critic")
    old, new = (each.guidance_scales for each in (pipeline.scheduler, networks.scheduler))
    if old != new and max(len(old), len(new)) > 1:
        raise ValueError(
            f"init_from={str(run)!r} was trained with guidance_scale={pipeline.scheduler.config.guidance_scale}, and "
            f"the new run has {networks.scheduler.config.guidance_scale}: of several scales give the same"
        )
    try:
        networks.student.load_state_dict(student.state_dict())
        networks.critic.load_state_dict(_fitting_labels(critic.state_dict(), networks, pipeline.scheduler))
    except RuntimeError as error:
        raise ValueError(
            f"init_from={str(run)!r} has networks of another shape than the teacher: give a run of the same teacher"
        ) from error
    before, now = (each.config.prediction_type for each in (pipeline.scheduler, networks.scheduler))
    if before != now:
        raise ValueError(
            f"init_from={str(run)!r} has a student that predicts {before!r}, and the teacher predicts {now!r}: give a "
            "run of the same teacher"
        )
    scale, learned = pipeline.scheduler.config.noise_scale, pipeline.components.get("unet_noise_scale")
    if learned is not None and networks.noise_scale is None:
        raise ValueError(f"init_from={str(run)!r} has a noise scale per pixel: set noise_scale_type to 'per_pixel'")
    if isinstance(scale, list):
        raise ValueError(f"init_from={str(run)!r} has a noise scale per layer, which cannot be trained further")
    if networks.noise_scale is None:
        networks.scheduler = HSIVIScheduler.from_config(networks.scheduler.config, noise_scale=scale)
    elif learned is not None:
        networks.noise_scale.load_state_dict(learned.state_dict())
    else:
        nn.init.constant_(networks.noise_scale.log_scale, float(torch.tensor(scale).log()))


def _fitting_labels(state: dict[str, Tensor], networks: Networks, before: HSIVIScheduler) -> dict[str, Tensor]:
    """The state of a critic that was told layers of other grids, or none: what it is told of them starts over."""
    name, own = "class_embedding.weight", networks.critic.state_dict()
    if name not in own:
        return {key: value for key, value in state.items() if key != name}
    tells = len(networks.scheduler.depths) > 1
    same = not tells or before.trained_grids == networks.scheduler.trained_grids
    return state if same and name in state and state[name].shape == own[name].shape else {**state, name: own[name]}
