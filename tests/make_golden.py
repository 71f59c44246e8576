"""Makes tests/golden/VERSION: a pipeline as this version saves it, without its code, and the images it draws.

    python tests/make_golden.py v0.2

Run once for each release that changes what is saved; the folders of earlier releases stay, and must go on loading.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hsivi_diffusers import HSIVINoiseScale, HSIVIPipeline, HSIVIScheduler
from tiny_unet import make_unet

GOLDEN = Path(__file__).parent / "golden"


def make_pipeline():
    torch.manual_seed(0)
    noise_scale = HSIVINoiseScale(sample_shape=(1, 8, 8))
    torch.nn.init.normal_(noise_scale.log_scale, std=0.3)
    scheduler = HSIVIScheduler(
        layer_timesteps=[800, 450, 200, 50, 0], kernel="ddim", noise_eta=0.8, noise_scale_type="per_pixel"
    )
    unet = make_unet(block_out_channels=(8, 8), mid_block_type="UNetMidBlock2D").eval()
    return HSIVIPipeline(unet=unet, scheduler=scheduler, unet_noise_scale=noise_scale)


def draw(pipeline):
    """Four images of seed 0, shape (4, 8, 8, 1)."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    return torch.from_numpy(images)


def main():
    folder = GOLDEN / sys.argv[1]
    if folder.exists():
        raise SystemExit(f"{folder} exists: a golden folder is made once, name another")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "pipeline")
    for code in folder.rglob("*.py"):
        code.unlink()
    save_file({"pictures": draw(pipeline)}, folder / "pictures.safetensors")


if __name__ == "__main__":
    main()
