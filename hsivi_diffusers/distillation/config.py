"""What a distillation is told: `HSIVIConfig`, its presets, and what of it cannot run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..options import option
from .trials import Trials

PRESETS = ("fast", "one_call", "paper")
# Old names of options: in a YAML file, on the command line, and in the options.json of a run.
ALIASES = {
    "num_layers": "num_inference_steps",
    "clip_pictures": "clip_images",
    "layer_weight": "loss_weight",
    "ode_pairs": "num_pairs",
    "ode_calls": "pair_calls",
    "ode_steps": "pair_steps",
    "ode_learning_rate": "pair_learning_rate",
    "ode_weight": "pair_weight",
}


class ByPreset(NamedTuple):
    """A default that the preset decides."""

    fast: Any
    one_call: Any
    paper: Any


def by_preset(help: str, *, fast: Any, one_call: Any, paper: Any, common: bool = False) -> Any:
    """A field whose default the preset decides."""
    return option(ByPreset(fast, one_call, paper), help, common)


@dataclass
class HSIVIConfig:
    """Settings of a distillation. What is not given is that of the preset; `print` one to see all values.

    The recipe "paper" is that of arXiv 2310.17153; "fast" is our best for several steps, "one_call" for one step.

    Example:
        >>> HSIVIConfig(num_inference_steps=4, output_dir="runs/c4").preset
        'fast'
    """

    _group = "distillation"
    # ----- the sampler -----
    num_inference_steps: int | list[int] | tuple[int, ...] = option(
        5, "T, network calls of the sampler; several, such as 1 2 4 8, train one student for all of them"
    )
    preset: Literal["fast", "one_call", "paper"] | None = option(
        None, "recipe that sets what is not given: fast, one_call or paper; by default one_call for 1 step, else fast"
    )
    timestep_spacing: Literal["quadratic", "uniform"] = by_preset(
        "how the grid is spread over the clock", fast="uniform", one_call="uniform", paper="quadratic"
    )
    start_timestep: int | None = option(None, "tau_T, the timestep of the first call", common=False)
    start_signal: float | None = by_preset(
        "start where sqrt(channels height width) alpha / sigma has fallen to this",
        fast=3.2,
        one_call=None,
        paper=None,
    )
    start_noise: float | None = by_preset(
        "start where sigma / (sqrt(channels) alpha) has risen to this, whatever the size of the images",
        fast=None,
        one_call=2.5,
        paper=None,
    )
    start_spacing: int = option(
        0, "with several step counts, timesteps from the start of one grid to that of the next", common=False
    )
    noise_eta: float = by_preset("eta of DDIM layers, above 0, up to 1", fast=1.0, one_call=1.0, paper=0.2)
    noise_scale_type: Literal["config", "per_pixel"] = by_preset(
        "config: the noise scale stays 1; per_pixel: one is learned for each pixel",
        fast="config",
        one_call="config",
        paper="per_pixel",
    )
    clip_images: bool = by_preset(
        "clip the mean of the last layer to [-1, 1] in training too; its gradient passes",
        fast=True,
        one_call=True,
        paper=False,
    )
    # ----- the objective -----
    objective: Literal["SM", "KL"] = by_preset(
        "HSIVI-SM (score matching) or HSIVI-KL", fast="KL", one_call="KL", paper="SM"
    )
    scoring: Literal["own", "random", "between"] = by_preset(
        "score a layer at its own level, diffused to a random one, or, half of the rows, at one between its ends",
        fast="between",
        one_call="between",
        paper="own",
    )
    level_min: int = option(5, "lowest timestep of random levels", common=False)
    loss_weight: Literal["unit", "sigma2"] = by_preset(
        "weight of the losses of student and critic, on squared noise", fast="unit", one_call="unit", paper="sigma2"
    )
    source: Literal["pool", "simulate", "data"] = by_preset(
        "inputs of the layers: a pool of live chains, fresh chains, or noised images of train_data",
        fast="pool",
        one_call="pool",
        paper="simulate",
    )
    critic_updates: int = by_preset("critic updates for each student update", fast=1, one_call=2, paper=20)
    critic_first: int = by_preset(
        "student updates at the start in which the critic alone learns", fast=0, one_call=50, paper=0
    )
    # ----- pairs of the teacher's ODE -----
    num_pairs: int = by_preset(
        "pairs of noise and the teacher's image of it, on which the student is fitted first; 0 is none",
        fast=0,
        one_call=6400,
        paper=0,
    )
    pair_calls: int = option(8, "network calls of the teacher for a pair", common=False)
    pair_steps: int = option(500, "updates of that fit", common=False)
    pair_learning_rate: float = option(5e-4, "Adam's in that fit; it falls to 0", common=False)
    pair_weight: float = option(
        0.005, "weight of the pairs in the student's loss after it; it falls as the student's rate does", common=False
    )
    # ----- training -----
    seed: int = option(0, "seed of everything")
    max_train_steps: int = option(1000, "student updates")
    train_batch_size: int = option(64, "images of an update, per process and accumulation step")
    learning_rate: float = by_preset("Adam's, of the student", fast=1e-4, one_call=3e-5, paper=1e-4, common=True)
    critic_learning_rate: float = by_preset("Adam's, of the critic", fast=1e-3, one_call=5e-4, paper=1e-4, common=True)
    adam_beta1: float = option(0.0, "first-moment decay of both optimizers", common=False)
    lr_scheduler: str = by_preset(
        "of the student, a name known to diffusers' get_scheduler",
        fast="cosine",
        one_call="cosine",
        paper="constant_with_warmup",
    )
    critic_lr_scheduler: str = by_preset(
        "of the critic", fast="cosine", one_call="cosine", paper="constant_with_warmup"
    )
    lr_warmup_steps: int = option(50, "student updates of warm-up", common=False)
    max_grad_norm: float | None = by_preset(
        "clip the gradient of either network to this norm", fast=None, one_call=20.0, paper=None
    )
    ema_decay: float = option(0.995, "decay of the averaged student, which is saved", common=False)
    # ----- hardware -----
    gradient_accumulation_steps: int = option(1, "batches of an update, one after the other, in each process")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the networks; that of `accelerate config` by default"
    )
    gradient_checkpointing: bool = option(False, "compute activations twice rather than keep them")
    allow_tf32: bool = option(False, "let matrix products of an Ampere GPU round to TF32", common=False)
    # ----- the run -----
    output_dir: str | None = option(None, "folder of the run")
    overwrite_output_dir: bool = option(False, "start anew in a folder that is not empty, removing an earlier run")
    init_from: str | None = option(
        None, "folder of a finished run: student, critic and noise scale start from its, on any grid", common=False
    )
    checkpointing_steps: int = option(500, "student updates between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints that are kept", common=False)
    validation_steps: int | None = option(
        None, "student updates between sample grids; a tenth of the run by default, 0 for none"
    )
    report_to: str | None = option(None, "trackers of accelerate: tensorboard, wandb, comet_ml or all", common=False)
    trials: Trials = field(default_factory=Trials)

    def __post_init__(self) -> None:
        counts = self.num_inference_steps
        self.num_inference_steps = sorted(counts) if isinstance(counts, list | tuple) else [counts]
        for group, name in ((self, "output_dir"), (self, "init_from"), (self.trials, "train_data")):
            if getattr(group, name) is not None:
                setattr(group, name, os.fspath(getattr(group, name)))
        if self.preset not in (None, *PRESETS):
            raise ValueError(f"preset={self.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        if self.preset in (None, "fast"):
            self.preset = "one_call" if self.depths == [1] else "fast"
        starts = {name: getattr(self, name) for name in ("start_timestep", "start_signal", "start_noise")}
        named = any(not isinstance(start, ByPreset | None) for start in starts.values())
        chosen = [each.name for each in fields(self) if isinstance(getattr(self, each.name), ByPreset)]
        for name in chosen:
            value = getattr(getattr(self, name), self.preset)
            setattr(self, name, None if named and name in starts else value)
        if "critic_first" in chosen:  # a short run leaves the critic a sixth at most
            self.critic_first = 0 if self.init_from else min(self.critic_first, self.max_train_steps // 6)
        if "num_pairs" in chosen and self.init_from:  # student and critic have learned already
            self.num_pairs = 0

    @property
    def depths(self) -> list[int]:
        """The step counts that are trained, ascending."""
        counts = self.num_inference_steps
        return list(counts) if isinstance(counts, list | tuple) else [counts]

    @property
    def is_guided(self) -> bool:
        """Whether the pairs have a weight in the loss after the fit to them, too."""
        return bool(self.num_pairs and self.pair_weight)

    def settings(self) -> dict[str, Any]:
        """What decides which student is trained: all but folders, hardware and reporting, flat, as JSON types."""
        apart = {"output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpoints_total_limit", "trials"}
        apart |= {"validation_steps", "report_to", "gradient_checkpointing", "allow_tf32", "mixed_precision"}
        apart |= {"gradient_accumulation_steps"}
        return {name: value for name, value in asdict(self).items() if name not in apart} | asdict(self.trials)

    def check(self) -> None:
        """Refuses, before any work, what cannot run.

        Raises:
            ValueError: A value is out of range, or has no effect beside the others.
        """
        _check_choices(self)
        _check_ranges(self)
        _check_start(self)
        _check_pairs(self)
        _check_objective(self)
        self.trials.check(self.objective, self.scoring, self.source, self.depths)
        if self.init_from and self.output_dir and Path(self.init_from).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"init_from={self.init_from!r} is the output_dir too: name another, or it would be lost")


def read_settings(record: Path) -> dict[str, Any]:
    """The settings of a run by its options.json, see `complete`."""
    return complete(json.loads(record.read_text(encoding="utf-8")))


def complete(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings as a run of today writes them: under today's names, and what is missing as the default."""
    recorded = {ALIASES.get(name, name): value for name, value in recorded.items()}
    config, trials = (
        {each.name: recorded[each.name] for each in fields(group) if each.name in recorded}
        for group in (HSIVIConfig, Trials)
    )
    return {**recorded, **HSIVIConfig(**config, trials=Trials(**trials)).settings()}


def _check_choices(config: HSIVIConfig) -> None:
    """Refuses a value outside the choices of its field; the command-line parser has its own check."""
    for group in (config, config.trials):
        for name, hint in get_type_hints(type(group)).items():
            kinds = [hint, *get_args(hint)]
            choices = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
            value = getattr(group, name, None)
            if choices and value is not None and value not in choices:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def _check_ranges(config: HSIVIConfig) -> None:
    counts = config.depths
    if (
        not counts
        or not all(isinstance(count, int) for count in counts)
        or min(counts) < 1
        or len(set(counts)) < len(counts)
    ):
        raise ValueError(
            f"num_inference_steps={counts}: give one number of steps of at least 1, or several that differ, such as "
            "1 2 4 8"
        )
    counted = ("critic_updates", "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
    for name in (*counted, "checkpointing_steps", "checkpoints_total_limit"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: give a number of at least 1")
    for name in ("learning_rate", "critic_learning_rate"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: give a number above 0")
    for name in ("ema_decay", "adam_beta1"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: give a number from 0 to below 1")
    if config.lr_warmup_steps < 0:
        raise ValueError(f"lr_warmup_steps={config.lr_warmup_steps}: give a number of updates from 0 on")
    if config.validation_steps is not None and config.validation_steps < 0:
        raise ValueError(f"validation_steps={config.validation_steps}: give a number of at least 1, or 0 for no images")
    if not 0 < config.noise_eta <= 1:
        raise ValueError(
            f"noise_eta={config.noise_eta}: give a number above 0, up to 1; layers without noise have no score to "
            "train on"
        )
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={config.max_grad_norm}: give a number above 0, or leave it out")
    if not 0 <= config.critic_first < config.max_train_steps:
        raise ValueError(
            f"critic_first={config.critic_first}: give a number of updates from 0 to below "
            f"max_train_steps={config.max_train_steps}"
        )


def _check_start(config: HSIVIConfig) -> None:
    for name, usual in (("start_signal", 3.2), ("start_noise", 2.5)):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: give a number above 0, such as {usual}")
    started = any(start is not None for start in (config.start_timestep, config.start_signal, config.start_noise))
    if config.start_spacing and (not started or config.start_spacing < 0):
        raise ValueError(
            f"start_spacing={config.start_spacing}: give 0 or more, and with it start_timestep, start_signal or "
            "start_noise, where the first grid starts"
        )
    if config.start_spacing and len(config.depths) == 1:
        raise ValueError(
            f"start_spacing={config.start_spacing} has no effect with one step count, {config.depths[0]}: give "
            "several, such as 1 2 4 8, or leave it out"
        )


def _check_objective(config: HSIVIConfig) -> None:
    if config.scoring == "between" and config.objective != "KL":
        raise ValueError(
            f"scoring='between' with objective={config.objective!r}: score matching is biased by the rows between the "
            "ends of a layer: set objective to 'KL', or scoring to 'random'"
        )
    if config.scoring == "random" and config.trials.kernel == "renoise" and config.noise_scale_type != "config":
        raise ValueError(
            "scoring='random' with kernel='renoise' cannot learn a noise scale, which the law of a scored image does "
            "not depend on: set noise_scale_type to 'config'"
        )
    if config.level_min != 5 and config.scoring == "own":
        raise ValueError(
            f"level_min={config.level_min} has no effect with scoring='own', which has no random levels: set scoring "
            "to 'random' or 'between', or leave level_min out"
        )


def _check_pairs(config: HSIVIConfig) -> None:
    for name in ("num_pairs", "pair_weight"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name}={getattr(config, name)}: give a number from 0 on")
    for name in ("pair_calls", "pair_steps", "pair_learning_rate"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: give a number above 0")
    if config.num_pairs and config.noise_scale_type != "config":
        raise ValueError(
            f"noise_scale_type={config.noise_scale_type!r} has nothing to learn from pairs, whose ends have no noise: "
            "leave it out, or set num_pairs to 0"
        )
    usual = {each.name: each.default for each in fields(HSIVIConfig)}
    changed = [
        f"{name}={getattr(config, name)}"
        for name in ("pair_calls", "pair_steps", "pair_learning_rate", "pair_weight")
        if getattr(config, name) != usual[name]
    ]
    if changed and not config.num_pairs:
        raise ValueError(
            f"{' and '.join(changed)} has no effect without pairs: set num_pairs, say 6400, or leave it out"
        )
