"""Distils a consistency model, the baseline of train_hsivi.py, and saves it as a DDPMPipeline with an LCMScheduler.

    python -m training.benchmarks.images.train_consistency --pretrained_teacher_model assets/digits_ddpm \
        --train_data digits --max_train_seconds 120 --output_dir runs/digits_lcm

The recipe is that of diffusers' examples/consistency_distillation, for a teacher of pixels without classes, and so
without guidance (Luo et al. 2023, arXiv 2310.04378, alg. 1): on a grid of timesteps,

    f(x, t) = c_skip(t) x + c_out(t) x0(x, t),      x0: the clean image that the network predicts
    loss    = E mean [sqrt((f(x_t, t) - f_target(x_s, s))^2 + c^2) - c],      c = 0.001

where x_t is a noised real image, x_s the teacher's DDIM step from it to the timestep s below t, and f_target has
averaged weights. c_skip and c_out are those of LCMScheduler, which makes f(x, 0) = x. As in the example, the target's
decay is 0.95 and the gradient is clipped at norm 1. What differs: the grid has 20 timesteps (50 in the example), the
learning rate falls as a cosine (constant), and the weights that are saved are averaged with decay 0.995.

Writes OUTPUT_DIR/pipeline, to be sampled in a few steps by num_inference_steps, OUTPUT_DIR/checkpoints and
OUTPUT_DIR/training.json. It is one process. With --max_train_steps a run is a function of its seed; with
--max_train_seconds the clock ends it. A run that is stopped continues with --resume_from_checkpoint latest.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, LCMScheduler, UNet2DModel
from torch import Tensor

from hsivi_diffusers import HSIVIScheduler, load_teacher
from hsivi_diffusers.distillation.denoisers import fingerprint, sample_shape
from hsivi_diffusers.distillation.output import Output, check_output, check_teacher, claimed, start_run
from hsivi_diffusers.folders import remove_folder, replace_folder, write_json
from hsivi_diffusers.images import to_model_range
from hsivi_diffusers.options import flatten, option, parse_options, run_command
from hsivi_diffusers.vi import cosine

from .sets import load_images
from .training_loop import TrainingLoop

# sqrt(abar) at the last timestep of Stable Diffusion, where the example's grid starts. A noise prediction becomes a
# clean image by a division by it; at the last timestep of a DDPM of pixels it is 0.006, and errors dominate.
START_ALPHA = 0.068
HUBER_C, TARGET_DECAY, EMA_DECAY, MAX_GRAD_NORM = 0.001, 0.95, 0.995, 1.0
WRITTEN = ("training.json", "pipeline")


@dataclass
class Teacher:
    _group = "teacher and data"
    pretrained_teacher_model: str | None = option(None, "folder or repo id of a diffusers pipeline with a UNet2DModel")
    train_data: str = option("digits", "`digits`, a folder of images, or a dataset's name")


@dataclass
class Training:
    _group = "training"
    seed: int = option(0, "seed of batches and noise")
    max_train_steps: int = option(1000, "number of updates; 1,000 in the example's command line")
    max_train_seconds: float | None = option(None, "wall-clock seconds of updates, instead of their number")
    train_batch_size: int = option(64, "images in an update; 12 in the example's command line")
    learning_rate: float = option(1e-3, "AdamW's; 1e-6 in the example's command line, for Stable Diffusion")
    lr_warmup_steps: int = option(50, "updates of linear warm-up; 500 in the example")
    mixed_precision: Literal["no", "bf16"] = option(
        "no", "precision of the networks; fp16 in the example's command line"
    )


@dataclass
class Distiller:
    """Teacher, student and averaged student; the teacher's schedule; the student's sampler, with grid and scalings."""

    teacher: UNet2DModel
    student: UNet2DModel
    target: UNet2DModel
    schedule: HSIVIScheduler
    sampler: LCMScheduler

    def __post_init__(self) -> None:
        config = self.schedule.config
        self.unclipped = HSIVIScheduler.from_config(config, clip_sample=False, thresholding=False)
        steps = self.sampler.config.original_inference_steps
        self.sampler.set_timesteps(steps)
        self.grid = self.sampler.timesteps.to(self.teacher.device)
        self.stride = len(self.sampler.betas) // steps
        self.teacher.requires_grad_(False).eval()
        self.target.requires_grad_(False).eval()
        self.student.requires_grad_(True).train()

    def consistency(self, unet: UNet2DModel, schedule: HSIVIScheduler, x: Tensor, timestep: Tensor) -> Tensor:
        """Returns f(x, t) = c_skip(t) x + c_out(t) x0(x, t), shape (B, C, H, W), for timesteps (B,)."""
        x0, _ = schedule.predict(unet(x, timestep).sample, timestep, x)
        c_skip, c_out = self.sampler.get_scalings_for_boundary_condition_discrete(timestep[:, None, None, None])
        f: Tensor = c_skip * x + c_out * x0
        return f

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Returns f of the student, shape (B, C, H, W). No clipping, which would stop the gradient."""
        return self.consistency(self.student, self.unclipped, x, timestep)

    @torch.no_grad()
    def aim(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Returns f of the target one step of the teacher further down, as it would be sampled."""
        below = (timestep - self.stride).clamp_min(0)
        x0, noise_pred = self.schedule.predict(self.teacher(x, timestep).sample, timestep, x)
        return self.consistency(self.target, self.schedule, self.schedule.add_noise(x0, noise_pred, below), below)

    def loss(self, clean: Tensor) -> Tensor:
        """Returns the loss of a batch of real images, shape (B, C, H, W)."""
        timestep = self.grid[torch.randint(len(self.grid), (len(clean),), device=clean.device)]
        x = self.schedule.add_noise(clean, torch.randn_like(clean), timestep)
        return distance(self.predict(x, timestep), self.aim(x, timestep))

    @torch.no_grad()
    def move_target(self) -> None:
        """Moves the target's weights towards the student's."""
        for average, current in zip(self.target.parameters(), self.student.parameters(), strict=True):
            average.lerp_(current, 1 - TARGET_DECAY)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the pseudo-Huber distance, averaged over rows and pixels."""
    return (((prediction - target).square() + HUBER_C**2).sqrt() - HUBER_C).mean()


def make_sampler(schedule: HSIVIScheduler, num_timesteps: int = 20, start: int | None = None) -> LCMScheduler:
    """The student's scheduler: the teacher's noise levels up to `start`, by default START_ALPHA's, and its clipping."""
    if start is None:
        start = min(int((schedule.alphas_cumprod.sqrt() > START_ALPHA).sum()), len(schedule) - 1)
    names = ["prediction_type", "clip_sample", "clip_sample_range", "sample_max_value"]
    names += ["thresholding", "dynamic_thresholding_ratio"]
    return LCMScheduler(
        num_train_timesteps=start + 1,
        trained_betas=schedule.betas[: start + 1].tolist(),
        original_inference_steps=num_timesteps,
        timestep_scaling=10.0,
        **{name: schedule.config[name] for name in names},
    )


def make_distiller(name: str, device: torch.device) -> Distiller:
    """Loads the teacher; student and target start as its copies."""
    unet, schedule = load_teacher(name)
    channels, height, width = sample_shape(unet)
    learned_variance = unet.config.out_channels != channels
    if unet.class_embedding is not None or learned_variance or channels not in (1, 3) or height != width:
        raise ValueError(
            f"teacher {name!r} has classes, a learned variance, or images of another shape than --train_data: give one "
            "of square images with 1 or 3 channels, which predicts as many"
        )
    unet.to(device)
    return Distiller(unet, copy.deepcopy(unet), copy.deepcopy(unet), schedule, make_sampler(schedule))


def learning_rate(step: int, share: float, training: Training) -> float:
    """Learning rate of an update, after a share of the run from 0 to 1: the number of updates may not be known."""
    warm_up = min(1.0, (step + 1) / max(training.lr_warmup_steps, 1))
    return training.learning_rate * warm_up * cosine(min(share, 1.0))


def train(
    distiller: Distiller,
    images: Tensor,
    training: Training,
    run: Output,
    accelerator: Accelerator,
    identity: dict[str, Any],
) -> tuple[int, float]:
    """Trains on images, shape (N, C, H, W); leaves the student the averaged weights, returns updates and seconds."""
    student = distiller.student
    optimizer = torch.optim.AdamW(student.parameters(), lr=training.learning_rate, weight_decay=0.0)
    parts = {"student": student, "target": distiller.target}
    loop = TrainingLoop(run, accelerator, student, optimizer, EMA_DECAY, identity, **parts)
    for share in loop.updates(training.max_train_steps, training.max_train_seconds):
        optimizer.param_groups[0]["lr"] = learning_rate(loop.steps, share, training)
        clean = images[torch.randint(len(images), (training.train_batch_size,), device=images.device)]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=training.mixed_precision == "bf16"):
            loss = distiller.loss(clean)
        loop.descend(loss, MAX_GRAD_NORM)
        distiller.move_target()
    return loop.steps, loop.seconds


def check_options(teacher: Teacher, run: Output) -> None:
    """Refuses, before any work, what could not run."""
    if not teacher.pretrained_teacher_model:
        raise ValueError("--pretrained_teacher_model is missing: give a folder or repo id of a diffusers pipeline")
    check_output(run)
    check_teacher(run, teacher.pretrained_teacher_model, WRITTEN)


def save(distiller: Distiller, output_dir: Path) -> None:
    """Saves the student as OUTPUT_DIR/pipeline, which is there whole or not at all."""
    partial = output_dir / "pipeline.partial"
    remove_folder(partial)  # of a run that was killed here
    DDPMPipeline(unet=distiller.student.eval(), scheduler=distiller.sampler).save_pretrained(partial)
    replace_folder(partial, output_dir / "pipeline")


def main(args: list[str] | None = None) -> None:
    teacher, training, run = parse_options([Teacher, Training, Output], __doc__ or "", args=args)
    check_options(teacher, run)
    with claimed(run) as output_dir:
        accelerator = Accelerator()
        set_seed(training.seed)
        distiller = make_distiller(teacher.pretrained_teacher_model, accelerator.device)
        channels, size, _ = sample_shape(distiller.teacher)
        images, _ = load_images(teacher.train_data, size, channels)
        images = to_model_range(images).to(accelerator.device)
        settings = flatten([teacher, training])
        start_run(run, settings, WRITTEN)
        identity = {**settings, "teacher_sha256": fingerprint(distiller.teacher, distiller.schedule)}
        steps, seconds = train(distiller, images, training, run, accelerator, identity)
        save(distiller, output_dir)
        calls = 3 * steps * training.train_batch_size  # forward passes of an image
        record = {**settings, "max_train_steps": steps, "seconds": seconds, "network_calls": calls}
        write_json(output_dir / "training.json", record)
    print(f"{steps} updates in {seconds:.0f} s; the pipeline is in {output_dir / 'pipeline'}")


if __name__ == "__main__":
    run_command(main)
