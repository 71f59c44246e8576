"""Trains the autoencoder of a text-to-image teacher on captioned emoji, and saves it as a stock AutoencoderKL.

    python -m training.benchmarks.text.train_vae --config training/configs/emoji_vae.yaml

The loss is E |x - D(z)| + b KL(q(z | x), N(0, I)) with z ~ q(z | x) (Kingma and Welling 2014, arXiv 1312.6114), the
first term a mean over pixels, the second over latents; b is small, as for latent diffusion (Rombach et al. 2022, arXiv
2112.10752). The scaling factor is 1 / std of the latents. It is one process, a run is a function of its seed, and
one that is stopped continues with --resume_from_checkpoint latest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.runs.output import Output

from ..images.captions import load_captioned
from ..images.training_loop import Training, claimed_alone, fit

WRITTEN = ("config.json", "diffusion_pytorch_model.safetensors")


@dataclass
class Autoencoder:
    _group = "autoencoder"
    resolution: int = option(64, "height and width in pixels")
    block_out_channels: list[int] = option([32, 64, 64], "width of each level, of which all but one halve the image")
    latent_channels: int = option(4, "channels of a latent")
    kl_weight: float = option(1e-4, "b, weight of the divergence of the latents from N(0, I)")


def make_vae(options: Autoencoder) -> AutoencoderKL:
    levels = len(options.block_out_channels)
    return AutoencoderKL(
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=options.latent_channels,
        norm_num_groups=8,
        sample_size=options.resolution,
    )


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / std of the latents of images in [-1, 1], over images, channels and pixels."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(64)])
    return 1 / float(latents.std())


def main(args: list[str] | None = None) -> None:
    options, training, run = parse_options([Autoencoder, Training, Output], __doc__ or "", args=args)
    with claimed_alone(run, training.seed) as accelerator:
        images = to_model_range(load_captioned(options.resolution)[0]).to(accelerator.device)

        def loss(vae: AutoencoderKL) -> Tensor:
            clean = images[torch.randint(len(images), (training.train_batch_size,), device=images.device)]
            with accelerator.autocast():
                q = vae.encode(clean).latent_dist
                made = vae.decode(q.sample()).sample
            return (clean - made.float()).abs().mean() + options.kl_weight * q.kl().mean() / q.mean[0].numel()

        vae = fit(run, accelerator, training, [options], WRITTEN, loss, vae=make_vae(options))
        vae.register_to_config(scaling_factor=scaling_factor(vae.eval(), images))
        vae.save_pretrained(str(run.output_dir))


if __name__ == "__main__":
    run_command(main)
