"""Trains a small DDPM, the teacher of a distillation, and saves it as a stock DDPMPipeline.

    python -m training.benchmarks.images.train_teacher --config training/configs/digits_teacher.yaml

The loss is the plain denoising one, E |noise - UNet(x_t, t)|^2 over uniform timesteps (Ho et al. 2020, eq. 14). With
--prediction_type v_prediction the network learns the velocity alpha noise - sigma x_0 (Salimans and Ho 2022, arXiv
2202.00512). It is one process, and the run is a function of its seed: same machine, same numbers.

Writes the pipeline into OUTPUT_DIR, and OUTPUT_DIR/checkpoints: a run that is stopped continues with
--resume_from_checkpoint latest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor
from torch.nn.functional import mse_loss

from hsivi_diffusers.distillation.output import Output, check_output, claimed, start_run
from hsivi_diffusers.images import to_model_range
from hsivi_diffusers.options import flatten, option, parse_options, run_command

from .sets import load_images
from .training_loop import TrainingLoop

WRITTEN = ("model_index.json", "unet", "scheduler")


@dataclass
class Data:
    _group = "data"
    train_data: str = option("digits", "`digits`, a folder of images, or a dataset's name")
    resolution: int = option(8, "height and width in pixels")
    channels: int = option(1, "1 for grey, 3 for RGB")


@dataclass
class Network:
    _group = "network"
    block_out_channels: list[int] = option([16, 32], "width of each level")
    attention_levels: list[int] = option([1], "levels with self-attention")
    prediction_type: Literal["epsilon", "v_prediction"] = option(
        "epsilon", "what the network predicts: the noise, or the velocity, accurate also at the highest noise"
    )
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = option("linear", "noise schedule: linear, or cosine")
    class_conditional: bool = option(False, "tell the network the class of an image")


@dataclass
class Training:
    _group = "training"
    seed: int = option(0, "seed of weights, batches and noise")
    max_train_steps: int = option(10_000, "number of updates")
    train_batch_size: int = option(128, "images in an update")
    learning_rate: float = option(1e-3, "AdamW's, warmed up, then cosine to 0")
    lr_warmup_steps: int = option(200, "updates of linear warm-up")
    ema_decay: float = option(0.999, "decay of the averaged weights, which are saved")


def make_unet(data: Data, network: Network, num_classes: int | None = None) -> UNet2DModel:
    levels = range(len(network.block_out_channels))
    attends = [level in network.attention_levels for level in levels]
    return UNet2DModel(
        sample_size=data.resolution,
        in_channels=data.channels,
        out_channels=data.channels,
        block_out_channels=tuple(network.block_out_channels),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=num_classes,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
    )


def load_data(data: Data, network: Network) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1], shape (N, C, H, W), and of a class-conditional network their classes, shape (N,)."""
    images, labels = load_images(data.train_data, data.resolution, data.channels)
    if network.class_conditional and labels is None:
        raise ValueError(
            f"--class_conditional true, and --train_data {data.train_data} has no classes: give a folder with "
            "one subfolder per class, or leave --class_conditional out"
        )
    return to_model_range(images), labels if network.class_conditional else None


def target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network is to predict, shape (B, C, H, W)."""
    if scheduler.config.prediction_type == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(clean, noise, timesteps)
        return velocity
    return noise


def main(args: list[str] | None = None) -> None:
    data, network, training, run = parse_options([Data, Network, Training, Output], __doc__ or "", args=args)
    check_output(run)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{os.environ['WORLD_SIZE']} processes were launched: a teacher is trained by one, start one")
    with claimed(run) as output_dir:
        accelerator = Accelerator()
        set_seed(training.seed)
        images, classes = load_data(data, network)
        images, classes = images.to(accelerator.device), None if classes is None else classes.to(accelerator.device)
        unet = make_unet(data, network, None if classes is None else int(classes.max()) + 1)
        scheduler = DDPMScheduler(beta_schedule=network.beta_schedule, prediction_type=network.prediction_type)
        settings = flatten([data, network, training])
        start_run(run, settings, WRITTEN)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=training.learning_rate)
        rate = get_cosine_schedule_with_warmup(optimizer, training.lr_warmup_steps, training.max_train_steps)
        unet, optimizer = accelerator.prepare(unet, optimizer)
        parts = {"unet": unet, "schedule": rate}
        loop = TrainingLoop(run, accelerator, unet, optimizer, training.ema_decay, settings, **parts)
        for _ in loop.updates(training.max_train_steps):
            rows = torch.randint(len(images), (training.train_batch_size,), device=images.device)
            clean, kinds = images[rows], None if classes is None else classes[rows]
            noise = torch.randn_like(clean)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), device=images.device)
            prediction = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, class_labels=kinds).sample
            loop.descend(mse_loss(prediction, target(scheduler, clean, noise, timesteps)))
            rate.step()
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(output_dir)


if __name__ == "__main__":
    run_command(main)
