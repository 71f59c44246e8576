"""Draws the colour images of the README, from what the benchmark kept of the emoji.

    python -m training.benchmarks.images.readme_figure

All rows start from the same noise.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from hsivi_diffusers.evaluation.figures import draw_samples

ROWS = {
    "teacher, 50 calls": "teacher at 50",
    "tuned solver, 4 calls": "tuned solver at 4",
    "HSIVI, 4 calls": "HSIVI at 4",
    "HSIVI, 2 calls": "HSIVI at 2",
}

if __name__ == "__main__":
    kept = load_file("docs/benchmarks/pictures_emoji.safetensors")
    rows = [(label, kept[name][:12].float() / 255) for label, name in ROWS.items()]
    draw_samples(rows, Path("docs/images/emoji.png"))
