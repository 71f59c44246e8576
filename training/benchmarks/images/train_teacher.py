"""Trains a small DDPM, the teacher of a distillation, and saves it as a stock DDPMPipeline.

    python -m training.benchmarks.images.train_teacher --config training/configs/digits_teacher.yaml

The loss is the plain denoising one, E |noise - UNet(x_t, t)|^2 over uniform timesteps (Ho et al. 2020, eq. 14). With
--prediction_type v_prediction the network learns the velocity alpha noise - sigma x_0 (Salimans and Ho 2022, arXiv
2202.00512), with flow_prediction that of a rectified flow, noise - x_0 at (1 - t) x_0 + t noise (Liu et al. 2023,
arXiv 2209.03003). With --class_dropout it also learns to do without the class, for classifier-free guidance (Ho and
Salimans 2022, arXiv 2207.12598): its last label is "no class". It is one process, and a run is a function of its seed:
same machine, same numbers.

Writes the pipeline into OUTPUT_DIR, and OUTPUT_DIR/checkpoints: a run that is stopped continues with
--resume_from_checkpoint latest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin, UNet2DModel
from torch import Tensor
from torch.nn.functional import mse_loss

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.runs.output import Output

from .sets import load_images
from .training_loop import Training, claimed_alone, fit

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
    prediction_type: Literal["epsilon", "v_prediction", "flow_prediction"] = option(
        "epsilon", "what the network predicts: the noise, or the velocity of a diffusion or of a rectified flow"
    )
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = option(
        "linear", "noise schedule of a diffusion: linear, or cosine"
    )
    class_conditional: bool = option(False, "tell the network the class of an image")
    class_dropout: float = option(0.0, "share of the images whose class is not told, 0 to 1")


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
    if not 0 <= network.class_dropout < 1 or (network.class_dropout and not network.class_conditional):
        raise ValueError(
            f"--class_dropout {network.class_dropout}: give a share from 0 to below 1, with --class_conditional true"
        )
    return to_model_range(images), labels if network.class_conditional else None


def make_schedules(network: Network) -> tuple[HSIVIScheduler, SchedulerMixin]:
    """The noise levels to train at, and the stock scheduler that is saved."""
    kind = network.prediction_type
    if kind == "flow_prediction":
        return HSIVIScheduler(prediction_type=kind), FlowMatchEulerDiscreteScheduler()
    options = {"beta_schedule": network.beta_schedule, "prediction_type": kind}
    return HSIVIScheduler(**options), DDPMScheduler(**options)


def target(schedule: HSIVIScheduler, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """What the network is to predict, shape (B, C, H, W)."""
    alpha, sigma = schedule.alpha_sigma(level, clean)
    kinds = {"v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean, "epsilon": noise}
    return kinds[schedule.config.prediction_type]


def drop(classes: Tensor, share: float, none: int) -> Tensor:
    """The classes, shape (B,), of which a share is the label `none`."""
    return torch.where(torch.rand(len(classes), device=classes.device) < share, none, classes) if share else classes


def main(args: list[str] | None = None) -> None:
    data, network, training, run = parse_options([Data, Network, Training, Output], __doc__ or "", args=args)
    with claimed_alone(run, training.seed) as accelerator:
        images, classes = load_data(data, network)
        images, classes = images.to(accelerator.device), None if classes is None else classes.to(accelerator.device)
        number = 0 if classes is None else int(classes.max()) + 1
        unet = make_unet(data, network, number + bool(network.class_dropout) or None)
        schedule, stock = make_schedules(network)

        def loss(unet: UNet2DModel) -> Tensor:
            rows = torch.randint(len(images), (training.train_batch_size,), device=images.device)
            clean, kinds = images[rows], None if classes is None else drop(classes[rows], network.class_dropout, number)
            noise = torch.randn_like(clean)
            level = torch.randint(len(schedule), (len(clean),), device=images.device)
            noisy, time = schedule.diffuse(clean, noise, level), schedule.levels.time(level)
            return mse_loss(unet(noisy, time, class_labels=kinds).sample, target(schedule, clean, noise, level))

        unet = fit(run, accelerator, training, [data, network], WRITTEN, loss, unet=unet)
        DDPMPipeline(unet=unet, scheduler=stock).save_pretrained(str(run.output_dir))


if __name__ == "__main__":
    run_command(main)
