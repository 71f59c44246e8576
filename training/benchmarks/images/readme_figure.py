"""Draws the colour images of the README, from what the benchmark kept of the emoji.

    python -m training.benchmarks.images.readme_figure

All rows start from the same noise.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from hsivi_diffusers.evaluation.figures import draw_samples

ROWS = [("tuned solver", 20), *((method, calls) for calls in (4, 2, 1) for method in ("tuned solver", "HSIVI"))]

if __name__ == "__main__":
    kept = load_file("docs/benchmarks/pictures_emoji.safetensors")
    rows = [
        (f"{method}, {calls} call{'s' * (calls > 1)}", kept[f"{method} at {calls}"][:12].float() / 255)
        for method, calls in ROWS
    ]
    draw_samples(rows, Path("docs/images/emoji.png"))
