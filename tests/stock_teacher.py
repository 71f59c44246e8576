"""A teacher by the training loop of the documentation of diffusers, whose scheduler clips: it needs that."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch.nn.functional import mse_loss

from tiny_unet import make_unet


def draw_shapes(number, size):
    """Discs and squares, white on black, in [-1, 1], shape (number, 1, size, size)."""
    place = torch.arange(size).float()
    y, x = torch.meshgrid(place, place, indexing="ij")
    centre, radius = size / 4 + torch.rand(2, number, 1, 1) * size / 2, size / 8 + torch.rand(number, 1, 1) * size / 5
    across, down = (x - centre[0]).abs(), (y - centre[1]).abs()
    disc, square = torch.hypot(across, down) < radius, torch.maximum(across, down) < radius
    return torch.where(torch.rand(number, 1, 1) < 0.5, disc, square).float()[:, None] * 2 - 1


def train_stock(updates, batch_size=32, **options):
    """Returns the pipeline of a UNet that predicts noise, trained on shapes for a number of updates."""
    unet, scheduler = make_unet(**options).train(), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(updates):
        clean = draw_shapes(batch_size, unet.config.sample_size)
        noise, timesteps = torch.randn_like(clean), torch.randint(0, len(scheduler), (batch_size,))
        loss = mse_loss(unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return DDPMPipeline(unet=unet.eval(), scheduler=scheduler)
