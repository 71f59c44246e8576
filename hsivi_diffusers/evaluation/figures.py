"""The figures of reports and benchmarks: rows of images, and quality against network calls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ..runs.measures import MEASURES, Measure

DPI = 130
STYLES = (":", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))  # of horizontal lines
GAP = 0.06  # between two images of a figure, of the width of one


def pyplot() -> Any:
    """Returns matplotlib's pyplot, which draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_samples(rows: list[tuple[str, torch.Tensor]], path: Path, titles: list[str] | None = None) -> None:
    """Draws labelled rows of images in [0, 1], shape (N, C, H, W), with titles of the N columns."""
    plt, columns = pyplot(), len(rows[0][1])
    above = 0.15 + 0.15 * max(title.count("\n") + 1 for title in titles) if titles else 0
    size = max(0.62 * columns + 2.6, 520 / DPI), 0.66 * len(rows) + above
    figure, axis = plt.subplots(figsize=size, layout="compressed")
    style = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    for line, (_, images) in enumerate(rows):
        for column, image in zip(range(columns), images, strict=True):
            place = (column, column + 1 - GAP, line + 1 - GAP, line)  # left, right, bottom, top
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), extent=place, **style)
    axis.set(xlim=(0, columns), ylim=(len(rows), 0), xticks=[])
    axis.set_yticks([line + 0.5 for line in range(len(rows))], [label for label, _ in rows], fontsize=11)
    for text in axis.get_yticklabels():
        text.set_fontweight("bold" if text.get_text().startswith("HSIVI") else "normal")
    if titles:
        axis.set_xticks([column + 0.5 for column in range(columns)], titles, fontsize=9)
        axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_curves(
    rows: Sequence[dict[str, Any]],
    labels: Mapping[str, str],
    path: Path,
    against: str = "network calls",
    lines: Sequence[str] = (),
) -> None:
    """Draws measures of the rows against network calls, one beside the other, from four on in two lines.

    Args:
        rows: With `method`, `nfe` and the measures. Several rows of one method and number of calls are training seeds,
            whose mean is drawn, with bars of one standard deviation.
        labels: Names in the figure by measure; of one that is not in MEASURES lower is better.
        path: PNG to write.
        against: What `nfe` is.
        lines: Methods that are drawn as horizontal lines, such as the teacher.
    """
    plt = pyplot()
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    curves, straight = [[row for row in rows if (row["method"] in lines) == each] for each in (False, True)]
    rows_of_axes = 1 if len(labels) < 4 else 2
    columns = -(-len(labels) // rows_of_axes)
    size = 5 * columns, 4.6 * rows_of_axes
    figure, axes = plt.subplots(rows_of_axes, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, label) in zip(axes.flat, labels.items(), strict=False):
        measure = MEASURES.get(name, Measure(label))
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in curves:
            values[row["method"]][row["nfe"]].append(measure.factor * row[name])
        for place, (method, points) in enumerate(values.items()):
            numbers = [points[nfe] for nfe in sorted(points)]
            bars = [stdev(each) if len(each) > 1 else 0 for each in numbers] if max(map(len, numbers)) > 1 else None
            style = {"lw": 1.2, "marker": "o", "ms": 4, "color": f"C{place % 10}"}
            style |= {"lw": 2.4, "marker": "*", "ms": 12} if method.startswith("HSIVI") else {}
            axis.errorbar(sorted(points), [*map(mean, numbers)], bars, label=method, capsize=3, **style)
        is_log = not measure.higher_is_better and all(row[name] > 0 for row in curves)
        for method, dashes in zip(lines, STYLES, strict=False):
            if found := [measure.factor * row[name] for row in straight if row["method"] == method]:
                height = mean(found)
                axis.axhline(height if height > 0 or not is_log else math.nan, color="0.3", ls=dashes, label=method)
        axis.set(xscale="log", yscale="log" if is_log else "linear", xlabel=against)
        axis.set_title(label, fontsize=9)
        axis.set_ylabel(f"{'higher' if measure.higher_is_better else 'lower'} is better")
        counts = sorted({row["nfe"] for row in curves})
        axis.xaxis.set_major_locator(FixedLocator(counts) if len(counts) < 7 else LogLocator(subs=(1, 2, 5)))
        if is_log:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for line in [axis.xaxis, axis.yaxis] if is_log else [axis.xaxis]:
            line.set_major_formatter("{x:g}")
            line.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
