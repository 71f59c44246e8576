"""A UNet of random weights, small enough for any test."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def make_unet(**options):
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**settings, **options})


def save_teacher(folder, **options):
    """Saves a pipeline of random weights that do not depend on the order of the tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = make_unet(**options)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder
