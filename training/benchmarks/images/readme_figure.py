"""Draws the colour images of the README, from those that the benchmark of emoji has kept beside its trainings.

    python -m training.benchmarks.images.readme_figure

All rows start from the same noise.
"""

from __future__ import annotations

from pathlib import Path

from hsivi_diffusers.evaluation.figures import draw_samples

from .benchmark_pages import shrink
from .benchmark_results import read_pictures

ROWS = [("tuned solver", 20), *((method, calls) for calls in (4, 2, 1) for method in ("tuned solver", "HSIVI"))]

if __name__ == "__main__":
    kept = read_pictures(Path("runs/benchmark"), "emoji")
    rows = [
        (f"{method}, {calls} call{'s' * (calls > 1)}", kept[f"{method} at {calls}"][:12].float() / 255)
        for method, calls in ROWS
    ]
    figure = Path("docs/images/emoji.png")
    draw_samples(rows, figure)
    shrink(figure)
