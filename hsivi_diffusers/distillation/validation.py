"""Validates `HSIVIConfig`: types, choices, ranges, incompatible options."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..runs.artifacts import read_prompts


def check_types(config: Any, by_preset: Collection[str]) -> None:
    """Refuses a value of another type than its field; the command-line parser converts."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name[0] != "_" and each.name not in by_preset and not _has_type(value, hints[each.name]):
            raise ValueError(f"{each.name}={value!r} has the type {type(value).__name__}: give {each.type}")


def _has_type(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, kind) for kind in inner)
    if origin is Literal:
        return value is not None  # the rest is for check_choices
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_has_type(each, inner[0]) for each in value)
    accepted = int | float if hint is float else hint
    return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))


def check_choices(config: Any) -> None:
    """Refuses a value outside the choices of its field; the command-line parser has its own check."""
    for name, hint in get_type_hints(type(config)).items():
        kinds = [hint, *get_args(hint)]
        choices = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def _is_guidance(value: Any) -> bool:
    scales = value if isinstance(value, list) else [value]
    return bool(scales) and all(0 <= w < math.inf for w in scales) and len(set(scales)) == len(scales)


Range = tuple[str, Callable[[Any], bool]]  # the words of the error, and the test
AT_LEAST_1: Range = ("a number of at least 1", lambda value: value >= 1)
FROM_0: Range = ("a number from 0 on", lambda value: value >= 0)
FROM_0_BELOW_1: Range = ("a number from 0 to below 1", lambda value: 0 <= value < 1)
ABOVE_0: Range = ("a number above 0", lambda value: value > 0)
ABOVE_0_OR_NONE: Range = ("a number above 0, or leave it out", lambda value: value > 0)
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SCHEDULE: Range = (f"one of {', '.join(SCHEDULES)}", lambda value: value in SCHEDULES)
RANGES: dict[str, Range] = {
    "noise_eta": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "max_sequence_length": AT_LEAST_1,
    "critic_updates": AT_LEAST_1,
    "guidance_scale": ("numbers from 0 on that differ, 1 for none", lambda value: _is_guidance(value)),
    "class_shares": (
        "a number from 0 on for each class, not all 0",
        lambda value: all(0 <= share < 1e30 for share in value) and sum(value) > 0,
    ),
    "level_min": FROM_0,
    "num_pairs": FROM_0,
    "noise_cutoff": ABOVE_0_OR_NONE,
    "lora_rank": ("a number from 0 on, or leave it out", lambda value: value >= 0),
    "max_train_steps": AT_LEAST_1,
    "train_batch_size": AT_LEAST_1,
    "learning_rate": ABOVE_0,
    "critic_learning_rate": ABOVE_0,
    "adam_beta1": FROM_0_BELOW_1,
    "lr_scheduler": SCHEDULE,
    "lr_warmup_steps": FROM_0,
    "max_grad_norm": ABOVE_0_OR_NONE,
    "ema_decay": FROM_0_BELOW_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "checkpointing_steps": AT_LEAST_1,
    "checkpoints_total_limit": AT_LEAST_1,
    "seed": ("a whole number from 0 to 4,294,967,295", lambda value: 0 <= value < 2**32),
    "validation_steps": ("a number of at least 1, or 0 for no images", lambda value: value >= 0),
}


def check_ranges(config: Any) -> None:
    counts = config.depths
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(
            f"num_inference_steps={counts}: give one number of steps of at least 1, or several that differ, such as "
            "1 2 4 8"
        )
    for name, (accepted, good) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise ValueError(f"{name}={value}: give {accepted}")
    if config.lr_warmup_steps > max(config.max_train_steps, 50):
        raise ValueError(
            f"lr_warmup_steps={config.lr_warmup_steps}: give a number of updates up to "
            f"max_train_steps={config.max_train_steps}"
        )
    if not 0 <= config.critic_first < config.max_train_steps:
        raise ValueError(
            f"critic_first={config.critic_first}: give a number of updates from 0 to below "
            f"max_train_steps={config.max_train_steps}"
        )


def check_together(config: Any, usual: Any) -> None:
    """Refuses settings that exclude each other, or have no effect; `usual` are those of the preset."""
    if config.prompts is not None:
        number = len(read_prompts(config.prompts))
        if config.guidance_scale is None:
            raise ValueError("guidance_scale is missing: with prompts give one, such as 4.5, or 1 for none")
        if config.class_shares is not None and len(config.class_shares) != number:
            raise ValueError(f"class_shares has {len(config.class_shares)} numbers for {number} prompts: give as many")
    if not (config.decay_guidance or config.has_guidance):
        raise ValueError("decay_guidance=False has no effect without a guidance_scale other than 1: leave it out")
    if config.negative_prompt and (config.prompts is None or not config.has_guidance):
        raise ValueError(
            f"negative_prompt={config.negative_prompt!r} has no effect without prompts and a guidance_scale other than "
            "1: leave it out"
        )
    if config.preset == "one_call" and config.depths != [1]:
        raise ValueError(
            f"preset='one_call' with num_inference_steps={config.num_inference_steps}: it is for 1 step: leave the "
            "preset out"
        )
    if config.num_pairs and config.noise_scale_type != "config":
        raise ValueError(
            f"noise_scale_type={config.noise_scale_type!r} has nothing to learn from pairs, whose ends have no noise: "
            "leave it out, or set num_pairs to 0"
        )
    if config.noise_cutoff is not None and config.depths != [1]:
        raise ValueError(
            f"noise_cutoff={config.noise_cutoff} is of one step: leave it out, or set num_inference_steps to 1"
        )
    if config.scoring == "between" and config.objective != "KL":
        raise ValueError(
            f"scoring='between' with objective={config.objective!r}: score matching is biased by the rows between the "
            "ends of a layer: set objective to 'KL', or scoring to 'random'"
        )
    if config.noise_eta == 0 and (config.objective, config.scoring == "own") != ("KL", False):
        raise ValueError("noise_eta=0, and outputs without noise have no score: set objective 'KL', scoring 'between'")
    if config.noise_eta == 0 and config.noise_scale_type != "config":
        raise ValueError("noise_eta=0 leaves noise_scale_type='per_pixel' nothing to scale: leave one of them out")
    if config.level_min != usual.level_min and config.scoring == "own":
        raise ValueError(
            f"level_min={config.level_min} has no effect with scoring='own', which has no random levels: set scoring "
            "to 'random' or 'between', or leave level_min out"
        )
