"""Distils a consistency model, the rival of train_hsivi.py, and saves it as a DDPMPipeline with an LCMScheduler.

    python -m training.benchmarks.images.train_consistency --pretrained_teacher_model assets/digits_ddpm \
        --train_data digits --max_train_seconds 120 --output_dir runs/digits_lcm

The recipe is that of diffusers' examples/consistency_distillation, for a teacher of pixels without classes, and so
without guidance (Luo et al. 2023, arXiv 2310.04378, alg. 1): on a grid of timesteps,

    f(x, t) = c_skip(t) x + c_out(t) x0(x, t),      x0: the clean picture that the network predicts
    loss    = E d(f(x_t, t), f_target(x_s, s)),     d(a, b) = mean sqrt((a - b)^2 + c^2) - c, or (a - b)^2

where x_t is a noised real picture, x_s the teacher's DDIM step from it to the timestep s below t, and f_target has
averaged weights. c_skip and c_out are those of LCMScheduler, which makes f(x, 0) = x. `--help` says where a setting is
not that of the example. What is saved are the weights averaged by --ema_decay.

Writes OUTPUT_DIR/pipeline, to be sampled in a few steps by num_inference_steps, OUTPUT_DIR/checkpoints and
OUTPUT_DIR/training.json. It is one process. With --max_train_steps a run is a function of its seed; with
--max_train_seconds the clock ends it. A run that is stopped goes on with --resume_from_checkpoint latest.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, LCMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from hsivi_diffusers import HSIVIScheduler, load_teacher
from hsivi_diffusers.distillation.checkpoints import Checkpoints, Output, Registered, check_output, claimed, start_run
from hsivi_diffusers.distillation.denoisers import sample_shape
from hsivi_diffusers.evaluation.images import load_images, to_model_range
from hsivi_diffusers.folders import remove_folder, replace_folder, write_json
from hsivi_diffusers.options import flatten, option, parse_options
from hsivi_diffusers.vi import cosine

# sqrt(abar) at the last timestep of Stable Diffusion, where the example's grid starts. A noise prediction becomes a
# picture by a division by it; at the last timestep of a DDPM of pixels it is 0.006, and errors are all one sees.
START_ALPHA = 0.068
WRITTEN = ("training.json", "pipeline")


@dataclass
class Teacher:
    _argument_group_name = "teacher and data"
    pretrained_teacher_model: str | None = option(None, "folder or repo id of a diffusers pipeline with a UNet2DModel")
    revision: str | None = option(None, "branch, tag or commit of the repo")
    train_data: str = option("digits", "`digits`, a folder of pictures, or a dataset's name")


@dataclass
class Method:
    _argument_group_name = "method"
    num_ddim_timesteps: int = option(20, "timesteps of the grid; 50 in the example")
    start_timestep: int | None = option(
        None,
        "last timestep of the grid, where sampling starts; by default the first that is as noisy as the last of Stable "
        "Diffusion, in the example the last of the clock",
    )
    loss_type: Literal["huber", "l2"] = option("huber", "d; huber in the example's command line")
    huber_c: float = option(0.001, "c of huber; 0.001 in the example")
    target_decay: float = option(0.95, "decay of the target's weights; 0.95 in the example")


@dataclass
class Training:
    _argument_group_name = "training"
    seed: int = option(0, "seed of batches and noise")
    max_train_steps: int = option(1000, "number of updates; 1,000 in the example's command line")
    max_train_seconds: float | None = option(None, "wall-clock seconds of updates, in the place of their number")
    train_batch_size: int = option(64, "pictures in an update; 12 in the example's command line")
    learning_rate: float = option(1e-3, "AdamW's; 1e-6 in the example's command line, for Stable Diffusion")
    lr_scheduler: Literal["cosine", "constant"] = option("cosine", "after the warm-up; constant in the example")
    lr_warmup_steps: int = option(50, "updates of linear warm-up; 500 in the example")
    adam_weight_decay: float = option(0.0, "AdamW's; 0 in the example's command line")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 1 in the example")
    ema_decay: float = option(0.995, "decay of the averaged weights, which are saved; the example saves both networks")
    mixed_precision: Literal["no", "bf16"] = option(
        "no", "precision of the networks; fp16 in the example's command line"
    )


@dataclass
class Distiller:
    """Teacher, student and target of a run, and their noise schedules.

    Attributes:
        teacher: Frozen.
        student: Is trained.
        target: Averaged weights of the student.
        schedule: Of the teacher. Clips the clean picture where the teacher does.
        sampler: Of the student: its grid, and the scalings of the boundary.
    """

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

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Returns f of the student, shape (B, C, H, W). No clipping, which would stop the gradient."""
        return consistency(self.student, self.unclipped, self.sampler, x, timestep)

    @torch.no_grad()
    def aim(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Returns f of the target one step of the teacher further down, as it would be sampled."""
        below = (timestep - self.stride).clamp_min(0)
        x0, noise_pred = self.schedule.predict(self.teacher(x, timestep).sample, timestep, x)
        alpha, sigma = self.schedule.alpha_sigma(below, x)
        return consistency(self.target, self.schedule, self.sampler, alpha * x0 + sigma * noise_pred, below)

    def loss(self, clean: Tensor, method: Method) -> Tensor:
        """Returns the loss of a batch of real pictures, shape (B, C, H, W)."""
        timestep = self.grid[torch.randint(len(self.grid), (len(clean),), device=clean.device)]
        x = self.schedule.add_noise(clean, torch.randn_like(clean), timestep)
        return distance(self.predict(x, timestep), self.aim(x, timestep), method)


def consistency(
    unet: UNet2DModel, schedule: HSIVIScheduler, sampler: LCMScheduler, x: Tensor, timestep: Tensor
) -> Tensor:
    """Returns f(x, t) = c_skip(t) x + c_out(t) x0(x, t), shape (B, C, H, W), for timesteps (B,)."""
    x0, _ = schedule.predict(unet(x, timestep).sample, timestep, x)
    c_skip, c_out = sampler.get_scalings_for_boundary_condition_discrete(timestep[:, None, None, None])
    f: Tensor = c_skip * x + c_out * x0
    return f


def distance(prediction: Tensor, target: Tensor, method: Method) -> Tensor:
    """Returns d, averaged over rows and pixels."""
    if method.loss_type == "l2":
        return mse_loss(prediction, target)
    return (((prediction - target).square() + method.huber_c**2).sqrt() - method.huber_c).mean()


def make_sampler(schedule: HSIVIScheduler, method: Method) -> LCMScheduler:
    """The scheduler of the student: the teacher's noise levels up to the start, and its clipping.

    Raises:
        ValueError: The grid does not fit the teacher's clock.
    """
    last = len(schedule) - 1
    noisy_enough = min(int((schedule.alphas_cumprod.sqrt() > START_ALPHA).sum()), last)
    start = noisy_enough if method.start_timestep is None else method.start_timestep
    if not 0 <= start <= last:
        raise ValueError(f"--start_timestep {start}: give a timestep of the teacher's clock, from 0 to {last}")
    if not 1 <= method.num_ddim_timesteps <= start + 1:
        raise ValueError(
            f"--num_ddim_timesteps {method.num_ddim_timesteps}: give a number from 1 to {start + 1}, the timesteps "
            f"from 0 to {start}"
        )
    names = ("prediction_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio")
    return LCMScheduler(
        num_train_timesteps=start + 1,
        trained_betas=schedule.betas[: start + 1].tolist(),
        original_inference_steps=method.num_ddim_timesteps,
        timestep_scaling=10.0,
        sample_max_value=schedule.config.sample_max_value,
        **{name: schedule.config[name] for name in names},
    )


def make_distiller(options: Teacher, method: Method, device: torch.device) -> Distiller:
    """Loads the teacher; student and target start as its copies.

    Raises:
        ValueError: The teacher is none for this script.
    """
    name = str(options.pretrained_teacher_model)
    unet, schedule = load_teacher(name, options.revision)
    if unet.class_embedding is not None:
        raise ValueError(
            f"teacher {name!r} draws classes (num_class_embeds={unet.config.num_class_embeds}): this script takes "
            "teachers without classes; give one, or distil it with train_hsivi.py"
        )
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"teacher {name!r} takes {unet.config.in_channels} channels and returns {unet.config.out_channels}, a "
            "learned variance, of which LCMScheduler knows nothing: give a teacher that returns as many as it takes"
        )
    channels, height, width = sample_shape(unet)
    if channels not in (1, 3) or height != width:
        raise ValueError(
            f"teacher {name!r} draws pictures of shape {(channels, height, width)}: give one of square pictures with 1 "
            "or 3 channels, such as --train_data can have"
        )
    unet.to(device)
    return Distiller(unet, copy.deepcopy(unet), copy.deepcopy(unet), schedule, make_sampler(schedule, method))


def learning_rate(step: int, share: float, training: Training) -> float:
    """Learning rate of an update, after a share of the run from 0 to 1: the number of updates may not be known."""
    warm_up = min(1.0, (step + 1) / max(training.lr_warmup_steps, 1))
    decay = cosine(min(share, 1.0)) if training.lr_scheduler == "cosine" else 1.0
    return training.learning_rate * warm_up * decay


def share_done(step: int, seconds: float, training: Training) -> float:
    """Share of the run that is done, by its seconds if they are limited, or else by its updates."""
    if training.max_train_seconds is None:
        return step / training.max_train_steps
    return seconds / training.max_train_seconds


@torch.no_grad()
def follow(target: UNet2DModel, student: UNet2DModel, decay: float) -> None:
    """Moves the target's weights towards the student's."""
    for average, current in zip(target.parameters(), student.parameters(), strict=True):
        average.lerp_(current, 1 - decay)


def train(
    distiller: Distiller, images: Tensor, method: Method, training: Training, run: Output, accelerator: Accelerator
) -> tuple[int, float]:
    """Trains on real pictures, shape (N, C, H, W), and leaves the averaged weights in the student.

    Returns:
        Updates, and their seconds; those of a run that is resumed are all that it had.

    Raises:
        FloatingPointError: The loss, or a weight that is to be saved, is not finite.
    """
    student = distiller.student
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.adam_weight_decay)
    ema = EMAModel(parameters, decay=training.ema_decay, use_ema_warmup=False)
    state = Registered(accelerator, ema, student, distiller.target, optimizer)
    checkpoints = Checkpoints(run, accelerator, state)
    step, seconds = checkpoints.load()
    clock = time.perf_counter() - seconds
    total = training.max_train_steps if training.max_train_seconds is None else None
    with tqdm(initial=step, total=total, desc="consistency") as progress:
        while (share := share_done(step, seconds, training)) < 1:
            optimizer.param_groups[0]["lr"] = learning_rate(step, share, training)
            clean = images[torch.randint(len(images), (training.train_batch_size,), device=images.device)]
            with torch.autocast(images.device.type, torch.bfloat16, enabled=training.mixed_precision == "bf16"):
                loss = distiller.loss(clean, method)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower --learning_rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            follow(distiller.target, student, method.target_decay)
            ema.step(parameters)
            step += 1
            seconds = time.perf_counter() - clock
            if step % run.checkpointing_steps == 0 or share_done(step, seconds, training) >= 1:
                checkpoints.save(step, seconds)
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            progress.update()
    ema.copy_to(parameters)
    return step, seconds


def check_options(teacher: Teacher, method: Method, training: Training, run: Output) -> None:
    """Refuses, before any work, what could not run."""
    if not teacher.pretrained_teacher_model:
        raise ValueError("--pretrained_teacher_model is missing: give a folder or repo id of a diffusers pipeline")
    check_output(run)
    place, output = Path(teacher.pretrained_teacher_model), Path(str(run.output_dir)).resolve()
    written = {output / name for name in ("checkpoints", *WRITTEN)}
    if place.exists() and written & {place.resolve(), *place.resolve().parents}:
        raise ValueError(f"--output_dir {run.output_dir} holds the teacher, which would be lost: name another folder")
    for name, count in (
        ("max_train_steps", training.max_train_steps),
        ("train_batch_size", training.train_batch_size),
    ):
        if count < 1:
            raise ValueError(f"--{name} {count}: give a number of at least 1")
    for name, number in (
        ("max_train_seconds", 1.0 if training.max_train_seconds is None else training.max_train_seconds),
        ("learning_rate", training.learning_rate),
        ("max_grad_norm", training.max_grad_norm),
        ("huber_c", method.huber_c),
    ):
        if not number > 0:
            raise ValueError(f"--{name} {number}: give a number above 0")
    for name, decay in (("target_decay", method.target_decay), ("ema_decay", training.ema_decay)):
        if not 0 <= decay < 1:
            raise ValueError(f"--{name} {decay}: give a number from 0 up to, not including, 1")


def save(distiller: Distiller, output_dir: Path) -> None:
    """Saves the student as OUTPUT_DIR/pipeline."""
    partial = output_dir / "pipeline.partial"
    remove_folder(partial)  # of a run that was killed here
    DDPMPipeline(unet=distiller.student.eval(), scheduler=distiller.sampler).save_pretrained(partial)
    replace_folder(partial, output_dir / "pipeline")


def summarise(steps: int, seconds: float, *options: Any) -> dict[str, Any]:
    """What training.json says: the cost, and the options of the run, with the updates that were done.

    A network call is a forward pass of one picture through student, teacher or target.
    """
    settings = flatten(options)
    calls = 3 * steps * settings["train_batch_size"]
    return {**settings, "max_train_steps": steps, "seconds": seconds, "network_calls": calls}


def main(args: list[str] | None = None) -> None:
    teacher, method, training, run = parse_options([Teacher, Method, Training, Output], __doc__ or "", args=args)
    check_options(teacher, method, training, run)
    with claimed(run) as output_dir:
        accelerator = Accelerator()
        set_seed(training.seed)
        distiller = make_distiller(teacher, method, accelerator.device)
        channels, size, _ = sample_shape(distiller.teacher)
        images, _ = load_images(teacher.train_data, size, channels)
        images = to_model_range(images).to(accelerator.device)
        start_run(run, [teacher, method, training], WRITTEN)
        steps, seconds = train(distiller, images, method, training, run, accelerator)
        save(distiller, output_dir)
        write_json(output_dir / "training.json", summarise(steps, seconds, teacher, method, training))
        accelerator.end_training()
    print(f"{steps} updates in {seconds:.0f} s; the pipeline is in {output_dir / 'pipeline'}")


if __name__ == "__main__":
    main()
