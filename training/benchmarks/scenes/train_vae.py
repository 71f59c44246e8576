"""Trains the autoencoder of a text-to-image teacher on scenes, and saves it as a stock AutoencoderKL.

    python -m training.benchmarks.scenes.train_vae --config training/configs/scenes_vae.yaml

The loss is E |x - D(z)| + b KL(q(z | x), N(0, I)) with z ~ q(z | x) (Kingma and Welling 2014, arXiv 1312.6114), the
first term a mean over pixels, the second over latents; b is small, as for latent diffusion (Rombach et al. 2022, arXiv
2112.10752). Shift and scaling factor are mean and 1 / std of the latents. With --init_from the decoder alone is trained
further, so that latents stay what they are. It is one process, a run is a function of its seed, and one that is stopped
continues with --resume_from_checkpoint latest.
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

from ..images.scenes import SIDE, make_scenes
from ..images.training_loop import Training, claimed_alone, fit

WRITTEN = ("config.json", "diffusion_pytorch_model.safetensors")


@dataclass
class Autoencoder:
    _group = "autoencoder"
    num_scenes: int = option(32_768, "scenes to train on")
    block_out_channels: list[int] = option([16, 32, 64], "width of each level, of which all but one halve the image")
    latent_channels: int = option(8, "channels of a latent")
    init_from: str | None = option(None, "folder of an autoencoder whose decoder is trained further")
    kl_weight: float = option(1e-4, "b, weight of the divergence of the latents from N(0, I)")


def make_vae(options: Autoencoder) -> AutoencoderKL:
    if options.init_from is not None:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(options.init_from)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return vae.train()
    levels = len(options.block_out_channels)
    return AutoencoderKL(
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=options.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


@torch.no_grad()
def scaling(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Mean and 1 / std of the latents of images, uint8, over images, channels and pixels, by their names in a VAE."""
    latents = torch.cat([vae.encode(to_model_range(batch)).latent_dist.mode() for batch in images.split(64)])
    return {"shift_factor": float(latents.mean()), "scaling_factor": 1 / float(latents.std())}


def main(args: list[str] | None = None) -> None:
    options, training, run = parse_options([Autoencoder, Training, Output], __doc__ or "", args=args)
    with claimed_alone(run, training.seed) as accelerator:
        images = make_scenes(options.num_scenes, training.seed)[0].to(accelerator.device)

        def loss(vae: AutoencoderKL) -> Tensor:
            rows = torch.randint(len(images), (training.train_batch_size,), device=images.device)
            clean = to_model_range(images[rows])
            with accelerator.autocast():
                q = vae.encode(clean).latent_dist
                made = vae.decode(q.sample()).sample
            return (clean - made.float()).abs().mean() + options.kl_weight * q.kl().mean() / q.mean[0].numel()

        vae = fit(run, accelerator, training, [options], WRITTEN, loss, vae=make_vae(options))
        if options.init_from is None:
            vae.register_to_config(**scaling(vae.eval(), images[:4096]))
        vae.save_pretrained(str(run.output_dir))


if __name__ == "__main__":
    run_command(main)
