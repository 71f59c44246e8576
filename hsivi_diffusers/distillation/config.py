"""What a distillation is told: `HSIVIConfig`, its presets, and what of it cannot run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..runs.artifacts import read_prompts, read_record
from ..runs.options import option
from .presets import PRESETS, ByPreset, by_preset
from .validation import check_choices, check_ranges, check_shares, check_together, check_types, takes_negative_prompt

FOLDER = {"output_dir", "overwrite_output_dir"}
# Hardware, checkpointing and reporting, which do not decide what is trained.
MAY_CHANGE = {"gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "allow_tf32"}
MAY_CHANGE |= {"checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to"}
STARTS = ("start_timestep", "start_noise", "start_signal")  # ways to say where the first call is
# Old names of options: in a YAML file, on the command line, and in the options.json of a run.
ALIASES = {
    "num_layers": "num_inference_steps",
    "clip_pictures": "clip_images",
    "layer_weight": "loss_weight",
    "ode_pairs": "num_pairs",
    "ode_steps": "pair_steps",
    "ode_weight": "pair_weight",
}
# Options that runs of earlier versions recorded and that were removed, and the value with which they changed nothing.
GONE = {
    "kernel": "ddim",
    "level_power": 1.0,
    "teacher_share": 0.0,
    "train_data": None,
    "adversarial_weight": 0.0,
    "prediction_type": None,
    "pair_learning_rate": 5e-4,
    "ode_learning_rate": 5e-4,
}


ONE_CALL_PAIRS = 1920  # num_pairs of preset "latent" for one call


@dataclass
class HSIVIConfig:
    """Settings of a distillation. What is not given is that of the preset; `print` one to see all values.

    The recipe "paper" is that of arXiv 2310.17153; "fast" is our best for several steps, "one_call" for one step, and
    "latent" is for text-to-image models, put together from published recipes.

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
    timestep_spacing: Literal["quadratic", "uniform"] = by_preset(
        "uniform", "uniform", "quadratic", "spacing of the timesteps"
    )
    start_timestep: int | None = option(None, "tau_T, the timestep of the first call", common=False)
    start_signal: float | None = by_preset(
        3.2, None, None, "start where sqrt(channels height width) alpha / sigma falls to this", latent=None
    )
    start_noise: float | None = by_preset(
        None, 2.5, None, "start where sigma / (sqrt(channels) alpha) rises to this, at any image size", latent=4.15
    )
    start_spacing: int = option(
        0, "with several step counts, timesteps from the start of one grid to that of the next", common=False
    )
    noise_eta: float = by_preset(
        1.0, 1.0, 0.2, "eta of DDIM layers, 0 to 1; with 0 sampling needs no noise", common=True
    )
    noise_scale_type: Literal["config", "per_pixel"] = by_preset(
        "config", "config", "per_pixel", "config: the noise scale stays 1; per_pixel: one is learned for each pixel"
    )
    clip_images: bool = by_preset(
        True, True, False, "clip the last mean to [-1, 1] in training too, but not latents; its gradient passes"
    )
    guidance_scale: float | list[float] | None = option(None, "scale or scales of guidance to take in; 1 is none")
    guidance_falls: bool = option(True, "in training guide less the more noise there is, not at all at the first call")
    prompts: str | list[str] | None = option(
        None, "of a text-to-image teacher: text file with one prompt in a line; from Python a list will do"
    )
    negative_prompt: str = option("", "what guidance leads away from, of a text-to-image teacher", common=False)
    class_shares: list[float] | None = option(
        None, "share of each class among the images of training, in proportion; equal by default"
    )
    # ----- the objective -----
    objective: Literal["SM", "KL"] = by_preset("KL", "KL", "SM", "HSIVI-SM (score matching) or HSIVI-KL")
    scoring: Literal["own", "random", "between"] = by_preset(
        "between", "between", "own", "score a layer at its own level, a random one, or half the time between its ends"
    )
    level_min: int = by_preset(5, 5, 5, "lowest timestep of random levels", latent=20)
    loss_weight: Literal["unit", "sigma2"] = by_preset(
        "unit", "unit", "sigma2", "weight of the losses of student and critic, on squared noise"
    )
    source: Literal["pool", "simulate"] = by_preset(
        "pool", "pool", "simulate", "inputs of the layers: a pool of live chains, or fresh chains"
    )
    critic_updates: int = by_preset(1, 2, 20, "critic updates per student update", latent=5)
    critic_first: int = by_preset(0, 50, 0, "updates at the start in which only the critic is trained")
    # ----- pairs of the teacher's ODE -----
    num_pairs: int = by_preset(
        0, 6400, 0, "pairs of noise and the teacher's image of it, fitted first; 0 for none; latent: 1920 for one step"
    )
    pair_steps: int = option(500, "updates of the fit to pairs", common=False)
    pair_weight: float = option(
        0.005,
        "weight of the pairs in the student's loss after that fit; falls as the student's learning rate does",
        common=False,
    )
    # ----- training -----
    seed: int = option(0, "seed of batches, noise and dropout")
    max_train_steps: int = option(1000, "student updates")
    train_batch_size: int = by_preset(
        64, 64, 64, "images of an update, per process and accumulation step", common=True, latent=4
    )
    learning_rate: float = by_preset(1e-4, 3e-5, 1e-4, "Adam learning rate of the student", common=True, latent=5e-5)
    critic_learning_rate: float = by_preset(
        1e-3, 5e-4, 1e-4, "Adam learning rate of the critic", common=True, latent=2e-4
    )
    adam_beta1: float = option(0.0, "first-moment decay of both optimizers", common=False)
    lr_scheduler: str = by_preset(
        "cosine", "cosine", "constant_with_warmup", "learning-rate schedule of the student, as in diffusers"
    )
    critic_lr_scheduler: str = by_preset("cosine", "cosine", "constant_with_warmup", "that of the critic")
    lr_warmup_steps: int = option(50, "student updates of warm-up", common=False)
    max_grad_norm: float | None = by_preset(
        None, 20.0, None, "clip the gradient of either network to this norm", latent=20.0
    )
    ema_decay: float = option(0.995, "decay of the averaged student, which is saved", common=False)
    lora_rank: int | None = option(
        None,
        "train LoRA adapters of this rank, which share the teacher's weights; 0 trains copies; by default 64 for "
        "Stable Diffusion and SDXL, else 0",
    )
    # ----- hardware -----
    gradient_accumulation_steps: int = option(1, "micro-batches per update in each process")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the networks; by default that of `accelerate config`"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    use_8bit_adam: bool = option(False, "keep Adam's moments in 8 bits, by bitsandbytes, to save memory", common=False)
    allow_tf32: bool = option(False, "use TF32 for matrix products on Ampere GPUs and later", common=False)
    # ----- the run -----
    output_dir: str | None = option(None, "folder of the run")
    overwrite_output_dir: bool = option(False, "start over in a folder that is not empty; removes the earlier run")
    init_from: str | None = option(
        None, "folder of a finished run whose student, critic and noise scale to start from, on any grid", common=False
    )
    checkpointing_steps: int = option(500, "student updates between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints to keep", common=False)
    validation_steps: int | None = option(
        None, "student updates between sample grids; a tenth of the run by default, 0 for none"
    )
    report_to: str | None = option(None, "trackers of accelerate: tensorboard, wandb, comet_ml or all", common=False)

    def __post_init__(self) -> None:
        for name in ("output_dir", "init_from", "prompts"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        check_types(self)
        self.num_inference_steps = sorted(self.depths)
        if self.scales:
            self.guidance_scale = sorted(self.scales) if len(self.scales) > 1 else self.scales[0]
        if self.preset not in (None, *PRESETS):
            raise ValueError(f"preset={self.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        if self.preset is None and self.prompts is not None:
            self.preset = "latent"
        if self.preset in (None, "fast"):
            self.preset = "one_call" if self.depths == [1] else "fast"
        named = any(not isinstance(start, ByPreset) for start in self.starts.values())
        chosen = [each.name for each in fields(self) if isinstance(getattr(self, each.name), ByPreset)]
        for name in chosen:
            value = getattr(getattr(self, name), self.preset)
            setattr(self, name, None if named and name in STARTS else value)
        if "num_pairs" in chosen and self.preset == "latent" and self.depths == [1]:
            self.num_pairs = ONE_CALL_PAIRS
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
    def scales(self) -> list[float]:
        """The scales of guidance to take in; none without guidance."""
        scales = self.guidance_scale
        return scales if isinstance(scales, list) else [] if scales is None else [scales]

    @property
    def starts(self) -> dict[str, float]:
        """What says where the first call is: one of STARTS, or nothing."""
        return {name: start for name in STARTS if (start := getattr(self, name)) is not None}

    @property
    def has_guidance(self) -> bool:
        """Whether a scale of guidance is another than 1, none: a step of the teacher is two network calls then."""
        return any(w != 1 for w in self.scales)

    @property
    def is_guided(self) -> bool:
        """Whether the pairs have a weight in the loss after the fit to them, too."""
        return bool(self.num_pairs and self.pair_weight)

    @property
    def precision(self) -> str:
        """The precision of the run: that of the launcher where none is named."""
        return self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def settings(self) -> dict[str, Any]:
        """What decides which student is trained, flat, as JSON types."""
        return {name: value for name, value in self.record().items() if name not in MAY_CHANGE}

    def record(self) -> dict[str, Any]:
        """What a run keeps of its options: all but its folder, with the precision that the launcher has told."""
        kept = {name: value for name, value in asdict(self).items() if name not in FOLDER}
        return {**kept, "mixed_precision": self.precision}

    def check(self) -> None:
        """Refuses, before any work, what cannot run.

        Raises:
            ValueError: A value is out of range, or has no effect beside the others.
        """
        check_choices(self)
        check_ranges(self)
        check_together(self)
        if self.prompts is not None:
            check_shares(self, len(read_prompts(self.prompts)))


def read_settings(record: Path) -> dict[str, Any]:
    """The options of a run by its options.json, see `complete`.

    Raises:
        ValueError: The file is damaged, or as `complete`.
    """
    return complete(read_record(record))


def complete(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings as a run of today writes them: under today's names, and what is missing as the default.

    But the guidance of a run that does not tell did not fall. What had no effect, and is refused today, is left out.

    Raises:
        ValueError: The run had an option that is gone, and not at its default.
    """
    recorded = {ALIASES.get(name, name): value for name, value in recorded.items()}
    for name, usual in GONE.items():
        if (value := recorded.pop(name, usual)) != usual:
            raise ValueError(
                f"the run was trained with {name}={value!r}, and the option was removed: finish it with the "
                "version that began it, or start over"
            )
    given = {each.name: recorded[each.name] for each in fields(HSIVIConfig) if each.name in recorded}
    config = HSIVIConfig(**given)
    if "guidance_falls" not in given:
        config.guidance_falls = not config.has_guidance
    if not takes_negative_prompt(config):
        config.negative_prompt = ""
    for name in [*config.starts][1:]:
        setattr(config, name, None)
    return {**recorded, **config.settings()}


def usual_settings(config: HSIVIConfig) -> HSIVIConfig:
    """Returns what the preset of a config gives for as many steps."""
    return HSIVIConfig(num_inference_steps=config.num_inference_steps, preset=config.preset)
