"""What a run starts from: teacher, student and critic, the grid of the student, and an earlier run's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..runs.artifacts import ADAPTER, TRAINING, read_record
from ..runs.output import starting_run
from ..runs.state_dicts import load_tensors
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.adapters import add_adapter, has_adapter, rank_of, read_adapter, with_factors
from ..teachers.levels import clock_of
from ..teachers.loading import load_student
from ..teachers.starts import load_weights, read_lora
from ..teachers.teacher import Teacher, network_of
from .config import START_RULES, HSIVIConfig
from .game import label_layers, label_scales
from .sharding import check_sharding, shard_base

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Networks:
    """What a run starts from."""

    teacher: Teacher  # its network is frozen by the bridge
    student: Any
    critic: Any
    scheduler: HSIVIScheduler  # schedule of the teacher, grid of the student; it does not clip
    noise_scale: HSIVINoiseScale | None


def load_networks(teacher: Teacher, config: HSIVIConfig, accelerator: Accelerator) -> tuple[Networks, dict[str, str]]:
    """Copies student and critic from the teacher, whose network is cast to the precision of its calls.

    With `init_from` they start where an earlier run ended, or the student as one that was published. The second value
    identifies teacher and prompts by hashes.
    """
    teacher.set_sizes(config)
    teacher.check_students(config)  # before prompts are encoded, which may take hours
    identity, run = teacher.identity(), starting_run(config.init_from)
    if run is not None:
        check_same_teacher(run, identity["teacher_sha256"])
    adapted = make_student_and_critic(teacher, config) if teacher.rank(config.lora_rank) else None  # may be refused
    teacher.encode_prompts(config.prompts, config.negative_prompt, accelerator.device)
    if teacher.takes_text:
        identity["prompts_sha256"] = teacher.conditions.digest
    networks = make_networks(teacher, *(adapted or make_student_and_critic(teacher, config)), config)
    if run is not None and adapted is None:
        carry_over(networks, run)
    if has_adapter(networks.student):
        _ = teacher.weights_sha256  # of the weights as they are now
    half = HALF.get(accelerator.mixed_precision)
    if config.shard_base:
        check_sharding(networks.student, accelerator)
        nn.Module.to(teacher.network, dtype=half)  # on the CPU, for a device need not have room for it
        shard_base([teacher.network, networks.student, networks.critic], accelerator.device)
    teacher.to(accelerator.device, half)
    return networks, identity


def make_student_and_critic(teacher: Teacher, config: HSIVIConfig) -> tuple[Any, Any]:
    """Returns copies of the teacher's network, or its own weights with an adapter each.

    The adapters are those that `init_from` names, and so are the weights of a copy, unless it names a run.

    Raises:
        ValueError: See `read_adapter`, `read_lora` and `load_weights`.
    """
    start, network, rank = config.init_from, teacher.network, teacher.rank(config.lora_rank)
    run = starting_run(start)
    if not rank or teacher.adapter is None:
        student, critic = copy.deepcopy(network), copy.deepcopy(network)
        if start is not None and run is None:
            load_weights(student, start)
        return student, critic
    states: list[Mapping[str, Tensor] | None] = [None, None]
    if run is not None:
        paths = [run / name / ADAPTER for name in ("pipeline", "critic")]
        if not paths[0].is_file():
            raise ValueError(f"init_from={start!r} holds no {ADAPTER}: give a run that was trained with lora_rank")
        states = [read_adapter(load_tensors(path), network, teacher.adapter.prefix, str(path)) for path in paths]
    elif start is not None:
        states = [read_lora(teacher, start), None]
    student, critic = (
        add_adapter(network, teacher.adapter, rank) if state is None else with_factors(network, teacher.adapter, state)
        for state in states
    )
    if start is not None and config.lora_rank not in (None, found := rank_of(student)):
        raise ValueError(
            f"init_from={start!r} has a LoRA of rank {found}, and lora_rank={config.lora_rank}: leave that out"
        )
    return student, critic


def make_networks(teacher: Teacher, student: Any, critic: Any, config: HSIVIConfig) -> Networks:
    """Returns the networks with the grid of the student; the noise scale is 1."""
    for network in (teacher.network, student, critic):
        teacher.prepare(network)
    scheduler = make_scheduler(teacher.schedule, config, teacher.shape, teacher.clips)
    if len(scales := scheduler.guidance_scales) > 1:  # which the labels of student and critic hold
        student, critic = (label_scales(teacher, network, scales) for network in (student, critic))
    noise_scale = HSIVINoiseScale(teacher.shape) if config.noise_scale_type == "per_pixel" else None
    if len(config.depths) > 1:  # grids, whose layers are scored at the same levels
        critic = label_layers(teacher, critic, sum(scheduler.depths))
    return Networks(teacher, student, critic, scheduler, noise_scale)


def make_scheduler(
    schedule: HSIVIScheduler, config: HSIVIConfig, shape: tuple[int, ...], is_pixels: bool = True
) -> HSIVIScheduler:
    """Returns the teacher's noise schedule with the grid, or grids, of a student."""
    rule, counts, last = START_RULES[config.preset], config.depths, len(schedule) - 1
    if config.start_timestep is not None and not max(counts) <= config.start_timestep <= last:
        raise ValueError(
            f"start_timestep={config.start_timestep}: give a timestep from {max(counts)} (the steps) to {last}"
        )
    clock = clock_of(schedule)
    starts = clock.starts(config.start_timestep, rule, shape, len(counts))
    for count, start in zip(counts, starts, strict=True):
        if count > (highest := last if start is None else start):
            raise ValueError(
                f"num_inference_steps={count}: the first step starts at timestep {highest}: take at most {highest} "
                f"steps{'' if highest == last else ', or set a higher start_timestep'}"
            )
    end = clock.end(config.noise_eta)
    grids = [
        [*HSIVIScheduler.make_layer_timesteps(count, config.timestep_spacing, len(schedule), first)[:-1], end]
        for count, first in zip(counts, starts, strict=True)
    ]
    cutoff, nyquist = config.noise_cutoff, min(shape[-2:]) / 2
    if cutoff is not None and not is_pixels:
        raise ValueError(f"noise_cutoff={cutoff:g} is not for latents: leave it out")
    if cutoff is not None and cutoff >= nyquist:
        raise ValueError(
            f"noise_cutoff={cutoff:g} leaves nothing out from {nyquist:g} on in these images: leave it out, or give "
            "less"
        )
    return HSIVIScheduler.from_config(
        schedule.config,
        noise_cutoff=cutoff,
        layer_timesteps=grids,
        timestep_spacing=config.timestep_spacing,
        kernel="ddim",
        noise_eta=config.noise_eta,
        noise_scale_type=config.noise_scale_type,
        guidance_scale=config.guidance_scale if config.has_guidance else None,
        clip_sample=False,  # a clamp would stop the gradient of every pixel at black or white
        thresholding=False,
    )


def check_same_teacher(run: Path, teacher_sha256: str) -> None:
    """Refuses, with ValueError, a run whose record names another teacher."""
    record = read_record(run / TRAINING) if (run / TRAINING).is_file() else {}
    if record.get("teacher_sha256", teacher_sha256) != teacher_sha256:
        raise ValueError(
            f"init_from={str(run)!r} was trained with another teacher, of other weights, noise levels or size of "
            "images: give a run of the same teacher"
        )


def carry_over(networks: Networks, run: Path) -> None:
    """Lets copies and the noise scale start where those of a finished run ended; refuses those that do not fit."""
    teacher = networks.teacher
    if (run / "pipeline" / ADAPTER).is_file():
        raise ValueError(f"init_from={str(run)!r} was trained with lora_rank, and the new run has copies: set its rank")
    pipeline = load_student(run / "pipeline", teacher)
    student = network_of(pipeline)
    if type(student) is not type(networks.student):
        raise ValueError(
            f"init_from={str(run)!r} has a {type(student).__name__}, and the teacher is a "
            f"{type(networks.student).__name__}: give a run of the same teacher"
        )
    critic = teacher.load(networks.critic, run / "critic")
    old, new = (each.guidance_scales for each in (pipeline.scheduler, networks.scheduler))
    if old != new and max(len(old), len(new)) > 1:
        raise ValueError(
            f"init_from={str(run)!r} was trained with guidance_scale={pipeline.scheduler.config.guidance_scale}, and "
            f"the new run has {networks.scheduler.config.guidance_scale}: of several scales give the same"
        )
    try:
        networks.student.load_state_dict(student.state_dict())
        networks.critic.load_state_dict(_fitting_labels(critic, networks, pipeline.scheduler))
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
    scale, learned = pipeline.scheduler.config.noise_scale, getattr(pipeline, "unet_noise_scale", None)
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
    """The state of a critic; its labels of layers start over if the grids are others."""
    name, own = "class_embedding.weight", networks.critic.state_dict()
    if name not in own:
        return {key: value for key, value in state.items() if key != name}
    has_layers = len(networks.scheduler.depths) > 1
    same = not has_layers or before.trained_grids == networks.scheduler.trained_grids
    return state if same and name in state and state[name].shape == own[name].shape else {**state, name: own[name]}
