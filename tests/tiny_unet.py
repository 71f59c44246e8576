"""A UNet of random weights, small enough for any test."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def make_unet(**options):
    """One level and no middle, unless options say otherwise."""
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "mid_block_type": None,
        "norm_num_groups": 4,
        **options,
    }
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    return UNet2DModel(**{**blocks, **settings})


def save_teacher(folder, **options):
    """Saves a pipeline of random weights that do not depend on the order of the tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = make_unet(**options)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder
