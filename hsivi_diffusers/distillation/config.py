"""Configuration of a distillation: `HSIVIConfig`, its presets, and how a run records it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..runs.artifacts import DEFAULT, read_record
from ..runs.options import did_you_mean, option, renamed
from .validation import check_choices, check_ranges, check_together, check_types

FOLDER = {"output_dir", "overwrite_output_dir"}
# Hardware, checkpointing and reporting, which do not decide what is trained.
MAY_CHANGE = {"gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "allow_tf32", "shard_base"}
MAY_CHANGE |= {"checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to"}
FIRST_BY_PAIRS = 3  # steps; from so many on the first learns from pairs alone
NUM_PAIRS = 6400  # of preset "one_call", and of "fast" if a number of steps is FIRST_BY_PAIRS or more
NUM_PAIRS_OF_LATENTS = 1920  # of preset "latent" for one step

FAST: dict[str, Any] = {
    "timestep_spacing": "uniform",
    "noise_eta": 1.0,
    "noise_scale_type": "config",
    "objective": "KL",
    "scoring": "between",
    "level_min": 5,
    "critic_updates": 1,
    "critic_first": 0,
    "num_pairs": 0,
    "train_batch_size": 64,
    "learning_rate": 1e-4,
    "critic_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "max_grad_norm": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "one_call": {
        **FAST,
        "critic_updates": 2,
        "critic_first": 50,
        "num_pairs": NUM_PAIRS,
        "learning_rate": 3e-5,
        "critic_learning_rate": 5e-4,
        "max_grad_norm": 20.0,
    },
    "paper": {
        **FAST,
        "timestep_spacing": "quadratic",
        "noise_eta": 0.2,
        "noise_scale_type": "per_pixel",
        "objective": "SM",
        "scoring": "own",
        "critic_updates": 20,
        "critic_learning_rate": 1e-4,
        "lr_scheduler": "constant_with_warmup",
    },
    "latent": {
        **FAST,
        "level_min": 20,
        "critic_updates": 5,
        "train_batch_size": 4,
        "learning_rate": 5e-5,
        "critic_learning_rate": 2e-4,
        "max_grad_norm": 20.0,
    },
}
# Where the first step starts without `start_timestep`, see `Clock.start`.
START_RULES: dict[str | None, tuple[str, float] | None] = {
    "fast": ("signal", 3.2),
    "one_call": ("noise", 2.5),
    "paper": None,
    "latent": ("noise", 4.15),
}
BY_PRESET: Any = ...  # the default of what the preset decides; a copy or a pickle of it is itself


@dataclass
class HSIVIConfig:
    """Settings of a distillation. The preset gives those that are left out; `print` a config to see all values.

    The recipe "paper" is that of arXiv 2310.17153; "fast" is our best for several steps, "one_call" for one step, and
    "latent" is for text-to-image models, put together from published recipes. A changed copy by
    `dataclasses.replace` keeps what was given, and its preset gives the rest.

    Raises:
        ValueError: An option is unknown, or has another type or value than it may have.

    Example:
        >>> HSIVIConfig(num_inference_steps=4, output_dir="runs/c4").preset
        'fast'
    """

    _group = "distillation"
    # ----- the sampler -----
    num_inference_steps: int | list[int] | tuple[int, ...] = option(
        5, "T, network calls of the sampler; several, such as 1 2 4 8, train one student for all of them"
    )
    preset: Literal["fast", "one_call", "paper", "latent"] | None = option(
        None, "recipe for what is not given; by default latent with prompts, one_call for 1 step, else fast"
    )
    timestep_spacing: Literal["quadratic", "uniform"] = option(BY_PRESET, "spacing of the timesteps", common=False)
    start_timestep: int | None = option(
        None,
        "tau_T, the timestep of the first step; by default it follows from preset and image size; of "
        "several step counts that of the fewest, lowered where those of the others would not fit above",
        common=False,
    )
    noise_eta: float = option(BY_PRESET, "eta of DDIM layers, 0 to 1; with 0 sampling needs no noise")
    noise_scale_type: Literal["config", "per_pixel"] = option(
        BY_PRESET, "config: the noise scale stays 1; per_pixel: one is learned for each pixel", common=False
    )
    guidance_scale: float | list[float] | None = option(None, "guidance scale or scales to distil; 1 is none")
    decay_guidance: bool = option(
        True, "decrease guidance linearly with noise during training, to none at the first step"
    )
    prompts: str | list[str] | None = option(
        None, "of a text-to-image teacher: text file with one prompt per line, a list, or default for 3,000 of our own"
    )
    resolution: list[int] | None = option(
        None, "height and width of the images, of a text-to-image teacher; those of its pipeline by default"
    )
    max_sequence_length: int | None = option(
        None,
        "tokens that prompts are cut to, of a text-to-image teacher whose pipeline takes it; by default the pipeline's",
        common=False,
    )
    negative_prompt: str = option("", "negative prompt used for guidance, of a text-to-image teacher", common=False)
    class_shares: list[float] | None = option(
        None, "share of each class among the images of training, in proportion; equal by default"
    )
    # ----- the objective -----
    objective: Literal["SM", "KL"] = option(
        BY_PRESET, "HSIVI-SM (score matching, with the paper's weight) or HSIVI-KL", common=False
    )
    scoring: Literal["own", "random", "between"] = option(
        BY_PRESET,
        "score a layer at its own level (and simulate fresh chains), a random one, or half the time between its ends",
        common=False,
    )
    level_min: int = option(BY_PRESET, "lowest timestep of random levels", common=False)
    critic_updates: int = option(BY_PRESET, "critic updates per student update", common=False)
    critic_first: int = option(BY_PRESET, "updates at the start in which only the critic is trained", common=False)
    num_pairs: int = option(
        BY_PRESET,
        "pairs of noise and where the teacher's ODE leads it, that the first step learns; 0 for none",
        common=False,
    )
    noise_cutoff: float | None = option(
        None,
        "of one step to pixels: spatial frequency, in cycles per image, such as 8, above which its noise is left out, "
        "against grain; by default none is",
        common=False,
    )
    # ----- training -----
    seed: int = option(0, "seed of batches, noise and dropout")
    max_train_steps: int = option(1000, "student updates")
    train_batch_size: int = option(BY_PRESET, "images of an update, per process and accumulation step")
    learning_rate: float = option(BY_PRESET, "Adam learning rate of the student")
    critic_learning_rate: float = option(BY_PRESET, "Adam learning rate of the critic")
    adam_beta1: float = option(0.0, "first-moment decay of both optimizers", common=False)
    lr_scheduler: str = option(BY_PRESET, "learning-rate schedule of student and critic, as in diffusers", common=False)
    lr_warmup_steps: int = option(50, "student updates of warm-up", common=False)
    max_grad_norm: float | None = option(BY_PRESET, "clip the gradient of either network to this norm", common=False)
    ema_decay: float = option(0.995, "decay of the averaged student, which is saved", common=False)
    lora_rank: int | None = option(
        None,
        "train LoRA adapters of this rank, which share the teacher's weights; 0 trains copies; by default 64 where "
        "the stock pipeline loads them, else 0",
    )
    # ----- hardware -----
    gradient_accumulation_steps: int = option(1, "micro-batches per update in each process")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the networks; by default that of `accelerate config`"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    shard_base: bool = option(
        False, "split the frozen weights under adapters over the processes (FSDP2), to save memory", common=False
    )
    use_8bit_adam: bool = option(False, "keep Adam's moments in 8 bits, by bitsandbytes, to save memory", common=False)
    allow_tf32: bool = option(False, "use TF32 for matrix products on Ampere GPUs and later", common=False)
    # ----- the run -----
    output_dir: str | None = option(None, "folder of the run")
    overwrite_output_dir: bool = option(False, "start over in a folder that is not empty; removes the earlier run")
    init_from: str | None = option(
        None,
        "what to start from: folder of a finished run (student, critic and noise scale, on any grid), or a published "
        "student: a LoRA as file, folder, ORG/REPO or ORG/REPO/FILE, or a network of diffusers",
        common=False,
    )
    checkpointing_steps: int = option(500, "student updates between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints to keep", common=False)
    validation_steps: int | None = option(
        None, "student updates between sample grids; a tenth of the run by default, 0 for none"
    )
    report_to: str | None = option(None, "trackers of accelerate: tensorboard, wandb, comet_ml or all", common=False)
    # What was filled in, as (given, value): `dataclasses.replace` passes all fields, and this tells which were given.
    _filled: Mapping[str, tuple[Any, Any]] | None = field(default=None, repr=False, compare=False)

    def __new__(cls, *args: Any, **given: Any) -> HSIVIConfig:
        known = {each.name for each in fields(cls)}
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{unknown[0]} is no option of HSIVIConfig{did_you_mean(unknown[0], known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("output_dir", "init_from", "prompts"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
                if name == "prompts" and self.prompts == DEFAULT:  # a path is a file
                    self.prompts = os.path.join(os.curdir, DEFAULT)
        if isinstance(self.resolution, tuple):
            self.resolution = list(self.resolution)
        for name, (given, value) in (self._filled or {}).items():
            if getattr(self, name) == value:
                setattr(self, name, given)
        filled = {each.name: BY_PRESET for each in fields(self) if getattr(self, each.name) is BY_PRESET}
        check_types(self, filled)
        self.num_inference_steps = sorted(self.depths)
        if self.scales:
            self.guidance_scale = sorted(self.scales) if len(self.scales) > 1 else self.scales[0]
        if self.preset not in (None, *PRESETS):
            raise ValueError(f"preset={self.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        if self.preset in (None, "fast"):
            filled["preset"] = self.preset
            self.preset = self._usual_preset()
        for name, value in self._of_preset().items():
            if name in filled:
                setattr(self, name, value)
        self._filled = {name: (given, getattr(self, name)) for name, given in filled.items()}

    def _usual_preset(self) -> Literal["fast", "one_call", "latent"]:
        if self.preset is None and self.prompts is not None:
            return "latent"
        return "one_call" if self.depths == [1] else "fast"

    def _of_preset(self) -> dict[str, Any]:
        """The values of the preset for as many steps and updates."""
        values, per_pixel = dict(PRESETS[str(self.preset)]), self.noise_scale_type == "per_pixel"
        if self.preset == "fast" and max(self.depths, default=0) >= FIRST_BY_PAIRS and not per_pixel:
            values["num_pairs"] = min(NUM_PAIRS, 16 * self.max_train_steps)
        elif self.preset == "latent" and self.depths == [1] and not self.init_from:
            values["num_pairs"] = NUM_PAIRS_OF_LATENTS
        elif self.preset == "one_call" and self.init_from and per_pixel:
            values["num_pairs"] = 0
        values["critic_first"] = min(values["critic_first"], self.max_train_steps // 6)  # in short runs a sixth at most
        if self.init_from:  # the critic has learned already, but for levels of a first step that has pairs alone
            values["critic_first"] = 0
        return values

    @property
    def depths(self) -> list[int]:
        """The step counts that are trained, ascending."""
        counts = self.num_inference_steps
        return list(counts) if isinstance(counts, list | tuple) else [counts]

    @property
    def scales(self) -> list[float]:
        """The guidance scales to distil; none without guidance."""
        scales = self.guidance_scale
        return scales if isinstance(scales, list) else [] if scales is None else [scales]

    @property
    def has_guidance(self) -> bool:
        """Whether a guidance scale is another than 1, none: a step of the teacher is two network calls then."""
        return any(w != 1 for w in self.scales)

    @property
    def precision(self) -> str:
        """The precision of the run: that of the launcher where none is named."""
        return self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def settings(self) -> dict[str, Any]:
        """What decides which student is trained, flat, as JSON types."""
        return {name: value for name, value in self.record().items() if name not in MAY_CHANGE}

    def record(self) -> dict[str, Any]:
        """What a run keeps of its options: all but its folder, with the precision that the launcher has set."""
        names = (each.name for each in fields(self) if each.name not in FOLDER | {"_filled"})
        return {**{name: getattr(self, name) for name in names}, "mixed_precision": self.precision}

    def usual(self) -> HSIVIConfig:
        """Returns what the preset gives for as many steps."""
        return HSIVIConfig(num_inference_steps=self.num_inference_steps, preset=self.preset)

    def check(self) -> None:
        """Refuses, before any work, what cannot run.

        Raises:
            ValueError: A value is out of range, or has no effect beside the others.
        """
        check_choices(self)
        check_ranges(self)
        check_together(self, self.usual())


def usual_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a run would have recorded, given what decides its preset alone; empty for a record that is damaged."""
    names = ("num_inference_steps", "preset", "max_train_steps", "init_from", "noise_scale_type")
    try:
        config = HSIVIConfig(**{name: recorded[name] for name in names if name in recorded})
    except (ValueError, TypeError):
        return {}
    return {**config.record(), "init_from": None, "mixed_precision": "no"}


def removed(config: HSIVIConfig) -> dict[str, Any]:
    """Options of version 0.2 that were removed, with what follows now from the options that are left."""
    several, led_to_images = len(config.depths) > 1, not config.num_pairs or max(config.depths) < FIRST_BY_PAIRS
    rule = START_RULES[config.preset]
    kind, value = ("", None) if rule is None or config.start_timestep is not None else rule
    return {
        "pair_steps": 500 if led_to_images else None,  # None: those of version 0.2 do not follow, whatever they were
        "pair_weight": 0.005,
        "start_signal": value if kind == "signal" else None,
        "start_noise": value if kind == "noise" else None,
        "start_spacing": 20 if several and (rule is not None or config.start_timestep is not None) else 0,
        "clip_images": config.objective == "KL",
        "loss_weight": "sigma2" if config.objective == "SM" else "unit",
        "source": "simulate" if config.scoring == "own" else "pool",
        "critic_lr_scheduler": config.lr_scheduler,
    }


def read_settings(record: Path) -> dict[str, Any]:
    """The options of a run by its options.json, see `complete`.

    Raises:
        ValueError: The file is damaged, or as `complete`.
    """
    return complete(read_record(record))


def complete(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings as a run of today writes them.

    Raises:
        ValueError: The run had an option of version 0.2 that was removed, at another value than follows now.
    """
    recorded = renamed(recorded)
    config = HSIVIConfig(**{each.name: recorded[each.name] for each in fields(HSIVIConfig) if each.name in recorded})
    now_follows = removed(config)
    if now_follows.keys() & recorded.keys() and config.scales and not config.has_guidance and config.prompts is None:
        raise ValueError(
            "the run was trained with guidance_scale=1 by version 0.2, which left the last class out: finish it with "
            "the version that began it, or start over"
        )
    for name, now in now_follows.items():
        if (value := recorded.pop(name, now)) != now:
            raise ValueError(
                f"the run was trained with {name}={value!r}, and the option was removed: finish it with the "
                "version that began it, or start over"
            )
    return {**recorded, **config.settings()}
