"""Draws the colour images of the README, from those that the benchmark of scenes has kept beside its trainings.

    python -m training.benchmarks.images.readme_figure

All rows but that of the teacher start from the same noise, and the solver is the one that draws the most right scenes.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from hsivi_diffusers.evaluation.figures import draw_samples

from .benchmark_pages import TITLE, shrink
from .benchmark_results import OURS, TEACHER, UNGUIDED, read_pictures, read_prompts

RUNS, SET = Path("runs/benchmark/text"), "scenes"
ROWS = [(TEACHER, 56), *((method, calls) for calls in (4, 2, 1) for method in (UNGUIDED, OURS))]
NAMES = {UNGUIDED: "tuned solver"}

if __name__ == "__main__":
    kept, prompts = read_pictures(RUNS, SET), read_prompts(RUNS, SET) or []
    rows = [
        (f"{NAMES.get(method, method)}, {calls} call{'s' * (calls > 1)}", kept[f"{method} at {calls}"].float() / 255)
        for method, calls in ROWS
    ]
    figure = Path("docs/images/scenes.png")
    draw_samples(rows, figure, [fill(prompt, TITLE) for prompt in prompts])
    shrink(figure)
