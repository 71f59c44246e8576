"""Draws the colour images of the README: the teacher, a solver on a good grid, and the students.

    python -m training.benchmarks.images.readme_figure

The solver is UniPC on 5 timesteps from 900 to 100, the best grid known for this teacher. The other rows are those that
the benchmark kept in docs/benchmarks.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from hsivi_diffusers import load_teacher
from hsivi_diffusers.evaluation.figures import draw_samples
from hsivi_diffusers.evaluation.solvers import make_solver, sample

ROWS = {
    "teacher, 100 steps": "DDPM at 100",
    "HSIVI, 4 steps": "HSIVI fast at 4",
    "HSIVI, 2 steps": "HSIVI fast at 2",
    "HSIVI, 1 step": "HSIVI fast at 1",
}

if __name__ == "__main__":
    kept = load_file("docs/benchmarks/pictures_emoji.safetensors")
    rows = [(label, kept[name][:12]) for label, name in ROWS.items()]
    unet, schedule = load_teacher("assets/emoji_ddpm")
    solver = make_solver("UniPC", 5, unet, schedule.config, timesteps=[900, 700, 500, 300, 100])
    rows.insert(1, ("UniPC, 5 steps", next(sample(solver, 12, 12, seed=0))))
    draw_samples(rows, Path("docs/images/emoji.png"))
