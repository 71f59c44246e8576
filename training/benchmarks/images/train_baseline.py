"""Trains a baseline of train_hsivi.py: consistency or progressive distillation, regression on pairs, or LCM-LoRA.

    python -m training.benchmarks.images.train_baseline --pretrained_teacher_model assets/digits_ddpm \
        --train_data digits --method progressive --max_train_seconds 120 --output_dir runs/digits_progressive

See `consistency`, `progressive`, `regression` and `latent_consistency` for the losses; all but regression use real
images. AdamW has a learning rate that is warmed up and falls as a cosine, in each stage of a progressive distillation;
gradients are clipped at norm 1, and the weights that are saved are averaged with decay 0.995. The teacher makes pixels;
where it has classes, the images of --train_data have the same ones, and nothing is guided. For lcm_lora it is a
text-to-image teacher of a rectified flow, and --train_data is `scenes`.

Writes OUTPUT_DIR/pipeline, OUTPUT_DIR/checkpoints and OUTPUT_DIR/training.json. It is one process. With
--max_train_steps a run is a function of its seed; with --max_train_seconds the clock ends it. A run that is stopped
continues with --resume_from_checkpoint latest.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from hsivi_diffusers import load_teacher
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.distillation.pairs import PAIR_CALLS
from hsivi_diffusers.distillation.state import trained
from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.artifacts import OPTIONS, TRAINING
from hsivi_diffusers.runs.folders import remove_folder, replace_folder, write_json
from hsivi_diffusers.runs.options import flatten, option
from hsivi_diffusers.runs.output import Output, check_inputs, start_run
from hsivi_diffusers.teachers.pixels import Pixels
from hsivi_diffusers.teachers.teacher import Teacher as Model
from hsivi_diffusers.vi import cosine

from .baseline import Baseline
from .consistency import ConsistencyDistillation
from .latent_consistency import LatentConsistency, load_latents
from .progressive import ProgressiveDistillation
from .regression import PairRegression
from .sets import load_images
from .training_loop import TrainingLoop, claimed_alone

EMA_DECAY, MAX_GRAD_NORM = 0.995, 1.0
WRITTEN = (TRAINING, "pipeline")
OF_METHOD = {"num_inference_steps": "progressive", "num_stages": "progressive", "num_pairs": "regression"}
OF_METHOD |= {"guidance_scale": "lcm_lora", "lora_rank": "lcm_lora"}
# What a benchmark gives, see `settings_of`.
GIVEN = (
    *("pretrained_teacher_model", "num_inference_steps", "guidance_scale", "seed"),
    *("max_train_steps", "max_train_seconds", "min_network_calls"),
)


@dataclass
class Teacher:
    _group = "teacher and data"
    pretrained_teacher_model: str | None = option(None, "folder or repo id of a diffusers pipeline")
    train_data: str = option("digits", "`digits`, a folder, a dataset's name, or for lcm_lora `scenes`")


@dataclass
class Training:
    _group = "training"
    method: Literal["consistency", "progressive", "regression", "lcm_lora"] = option("consistency", "which baseline")
    num_inference_steps: int = option(4, "of --method progressive: network calls of the student")
    num_stages: int = option(4, "of --method progressive: stages, each of which halves the number of steps")
    num_pairs: int = option(20_000, "of --method regression: pairs")
    guidance_scale: float = option(1.0, "of --method lcm_lora: scale of guidance of the teacher")
    lora_rank: int = option(64, "of --method lcm_lora: rank of the adapter")
    start_timestep: int | None = option(None, "not of --method lcm_lora: first timestep; by default that of the method")
    seed: int = option(0, "seed of batches and noise")
    max_train_steps: int = option(1000, "number of updates")
    max_train_seconds: float | None = option(None, "wall-clock seconds of updates, instead of their number")
    min_network_calls: int = option(0, "forward passes in updates that max_train_seconds does not cut short")
    train_batch_size: int = option(64, "images in an update")
    learning_rate: float = option(1e-3, "AdamW's")
    lr_warmup_steps: int = option(50, "updates of linear warm-up")
    mixed_precision: Literal["no", "bf16"] = option("no", "precision of the networks")


def recorded(teacher: Teacher, training: Training) -> dict[str, Any]:
    """The settings of a run, but for those of other methods."""
    settings = flatten([teacher, training])
    return {name: value for name, value in settings.items() if OF_METHOD.get(name, training.method) == training.method}


def settings_of(config: str) -> dict[str, Any]:
    """The settings of a config, but for those that a benchmark gives."""
    teacher, training, _ = parse_options([Teacher, Training, Output], "", ["--config", *shlex.split(config)])
    return {name: value for name, value in recorded(teacher, training).items() if name not in GIVEN}


def recipe_of(config: str) -> dict[str, Any]:
    """Method and settings of a config that are not the defaults, but for those that a benchmark gives."""
    settings, usual = settings_of(config), flatten([Teacher(), Training()])
    return {name: value for name, value in settings.items() if name == "method" or value != usual[name]}


def hash_teacher(teacher: Model) -> str:
    """The SHA-256 of a teacher, as training.json of its students and baselines has it."""
    return teacher.identity()["teacher_sha256"]


def prepare(teacher: Teacher, training: Training, device: torch.device) -> tuple[Baseline, Tensor, Tensor | None]:
    """Loads the teacher, and the data: images or latents, and their classes or the numbers of their prompts."""
    name = str(teacher.pretrained_teacher_model)
    model = load_teacher(name)
    if training.method != "lcm_lora":
        return make_distillation(name, model.to(device), training), *load_data(teacher.train_data, model, device)
    if not (model.takes_text and model.schedule.is_flow) or model.adapter is None:
        raise ValueError(f"--method lcm_lora adapts a rectified flow that takes text, by a LoRA, and {name} is not one")
    if training.start_timestep is not None:
        raise ValueError(
            f"start_timestep={training.start_timestep}: --method lcm_lora starts at pure noise, leave it out"
        )
    latents, numbers = load_latents(model.to(device), teacher.train_data, device)
    return LatentConsistency(model, training.guidance_scale, training.lora_rank), latents, numbers


def make_distillation(name: str, teacher: Model, training: Training) -> Baseline:
    """Makes the baseline of a teacher of pixels."""
    channels, height, width = teacher.shape
    if (
        not isinstance(teacher, Pixels)
        or teacher.network.config.out_channels != channels
        or channels not in (1, 3)
        or height != width
    ):
        raise ValueError(
            f"teacher {name!r} has a learned variance, or images of another shape than --train_data: give one of "
            "square images with 1 or 3 channels, which predicts as many"
        )
    if teacher.schedule.is_flow and training.method != "regression":
        raise ValueError(
            f"teacher {name!r} is a rectified flow, and --method {training.method} needs betas: give regression"
        )
    if training.method == "consistency":
        return ConsistencyDistillation(teacher, start=training.start_timestep)
    if training.method == "regression":
        return PairRegression(teacher, training.num_pairs, start=training.start_timestep, seed=training.seed)
    steps = training.num_inference_steps, training.num_stages
    return ProgressiveDistillation(teacher, *steps, start=training.start_timestep)


def load_data(source: str, teacher: Model, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1] of the shape of a teacher's, (N, C, H, W), and, if it has classes, theirs, (N,)."""
    channels, size, _ = teacher.shape
    images, labels = load_images(source, size, channels)
    number, found = teacher.num_rows, 0 if labels is None else int(labels.max()) + 1
    if number and not 0 < found <= number:
        raise ValueError(
            f"--train_data {source} has {found or 'no'} classes, and the teacher {number}: give images of the classes "
            "of the teacher"
        )
    return to_model_range(images).to(device), None if labels is None or not number else labels.to(device)


def learning_rate(step: int, share: float, training: Training) -> float:
    """Learning rate of an update, after a share of the run from 0 to 1: the number of updates may not be known."""
    warm_up = min(1.0, (step + 1) / max(training.lr_warmup_steps, 1))
    stages = training.num_stages if training.method == "progressive" else 1
    return training.learning_rate * warm_up * cosine(share * stages % 1)


def train(
    distillation: Baseline,
    images: Tensor,
    classes: Tensor | None,
    training: Training,
    run: Output,
    accelerator: Accelerator,
    identity: dict[str, Any],
) -> tuple[int, float]:
    """Trains on images, (N, C, H, W), and their classes, (N,), if the teacher has any.

    Leaves the student the averaged weights; returns updates and seconds.
    """
    student = distillation.student
    optimizer = torch.optim.AdamW(trained(student), lr=training.learning_rate, weight_decay=0.0)
    loop = TrainingLoop(run, accelerator, student, optimizer, EMA_DECAY, identity, **distillation.parts)
    least = training.min_network_calls / (distillation.calls_per_image * training.train_batch_size)
    precise = partial(torch.autocast, images.device.type, torch.bfloat16, enabled=training.mixed_precision == "bf16")

    def restore() -> None:
        with precise():  # as when it was made
            distillation.restore()

    for share in loop.updates(training.max_train_steps, training.max_train_seconds, least, restore):
        distillation.begin_update(share)
        optimizer.param_groups[0]["lr"] = learning_rate(loop.steps, share, training)
        rows = torch.randint(len(images), (training.train_batch_size,), device=images.device)
        condition = None if classes is None else classes[rows]
        with precise():
            loss = distillation.loss(images[rows], condition)
        loop.descend(loss, MAX_GRAD_NORM)
    return loop.steps, loop.seconds


def check_options(teacher: Teacher, training: Training, run: Output) -> None:
    """Refuses, before any work, what could not run, or is of another method."""
    if not teacher.pretrained_teacher_model:
        raise ValueError("--pretrained_teacher_model is missing: give a folder or repo id of a diffusers pipeline")
    for name, method in OF_METHOD.items():
        value, default = getattr(training, name), getattr(Training, name)
        if value != default and training.method != method:
            raise ValueError(
                f"--{name} {value} has no effect with --method {training.method}: it belongs to {method}, leave it out"
            )
        if value < 1:
            raise ValueError(f"--{name} {value}: give a number of at least 1")
    check_inputs(run, WRITTEN, pretrained_teacher_model=teacher.pretrained_teacher_model)


def save(distillation: Baseline, output_dir: Path) -> None:
    """Saves the student as OUTPUT_DIR/pipeline, which is there whole or not at all."""
    partial = output_dir / "pipeline.partial"
    remove_folder(partial)  # of a run that was killed here
    distillation.pipeline().save_pretrained(partial)
    replace_folder(partial, output_dir / "pipeline")


def main(args: list[str] | None = None) -> None:
    teacher, training, run = parse_options([Teacher, Training, Output], __doc__ or "", args=args)
    check_options(teacher, training, run)
    output_dir = Path(str(run.output_dir))
    with claimed_alone(run, training.seed) as accelerator:
        distillation, images, classes = prepare(teacher, training, accelerator.device)
        settings = recorded(teacher, training)
        start_run(run, settings, WRITTEN)
        write_json(output_dir / OPTIONS, settings)
        identity = {**settings, "teacher_sha256": hash_teacher(distillation.teacher)}
        steps, seconds = train(distillation, images, classes, training, run, accelerator, identity)
        save(distillation, output_dir)
        calls = distillation.calls_per_image * steps * training.train_batch_size  # forward passes of an image
        calls += training.num_pairs * PAIR_CALLS if training.method == "regression" else 0
        record = {**identity, "max_train_steps": steps, "seconds": seconds, "network_calls": calls}
        write_json(output_dir / TRAINING, record)
    print(f"{steps} updates in {seconds:.0f} s; the pipeline is in {output_dir / 'pipeline'}")


if __name__ == "__main__":
    run_command(main)
