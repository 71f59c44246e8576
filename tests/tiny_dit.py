"""A DiTPipeline of random weights, small enough for any test."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


def make_vae(channels=2):
    """Latents of `channels` x 8 x 8 are images of 16x16."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def make_dit():
    """The weights do not depend on the order of the tests; those that start at 0 in diffusers are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            out_channels=4,  # with a learned variance
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=3,
        )
        vae = make_vae()
    pipeline = DiTPipeline(transformer.eval(), vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
