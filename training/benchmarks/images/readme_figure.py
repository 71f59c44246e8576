"""Draws the colour images of the README: the teacher, a solver on a good grid, and the students.

    python -m training.benchmarks.images.readme_figure

The solver is UniPC on 5 timesteps from 900 to 100, the best grid known for this teacher. The other rows are those that
the benchmark kept in docs/benchmarks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, UniPCMultistepScheduler
from safetensors.torch import load_file

from hsivi_diffusers.evaluation.figures import draw_samples

ROWS = {
    "teacher, 100 steps": "DDPM at 100",
    "HSIVI, 4 steps": "HSIVI fast at 4",
    "HSIVI, 2 steps": "HSIVI fast at 2",
    "HSIVI, 1 step": "HSIVI fast at 1",
}


@torch.no_grad()
def draw_unipc(timesteps: torch.Tensor) -> torch.Tensor:
    """Returns 12 images in [0, 1] of UniPC on a grid of its own, which `set_timesteps` cannot make."""
    pipeline = DDPMPipeline.from_pretrained("assets/emoji_ddpm")
    solver = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    solver.set_timesteps(len(timesteps))
    abar = solver.alphas_cumprod[timesteps]
    solver.timesteps, solver.sigmas = timesteps, torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1)])
    x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for timestep in timesteps:
        x = solver.step(pipeline.unet(x, timestep).sample, timestep, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    kept = load_file("docs/benchmarks/pictures_emoji.safetensors")
    rows = [(label, kept[name][:12]) for label, name in ROWS.items()]
    rows.insert(1, ("UniPC, 5 steps", draw_unipc(torch.linspace(900, 100, 5).round().long())))
    draw_samples(rows, Path("docs/images/emoji.png"))
