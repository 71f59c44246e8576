"""The two figures of a report: rows of images, and quality against network calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COLOURS = {
    "HSIVI": "#d62728",
    "DDIM": "#1f77b4",
    "DDIM, eta 1": "#17becf",
    "DPM-Solver++": "#2ca02c",
    "UniPC": "#9467bd",
    "DDPM": "#7f7f7f",
}
MARKERS = {"HSIVI": "*", "DDIM": "o", "DDIM, eta 1": "v", "DPM-Solver++": "s", "UniPC": "^", "DDPM": "D"}
DPI = 130


def pyplot() -> Any:
    """Returns matplotlib's pyplot, which draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_samples(rows: list[tuple[str, torch.Tensor]], path: Path, titles: list[str] | None = None) -> None:
    """Draws labelled rows of images in [0, 1], shape (N, C, H, W), with titles of the N columns."""
    plt, columns = pyplot(), len(rows[0][1])
    size = max(0.62 * columns + 2.6, 520 / DPI), 0.66 * len(rows) + (0.3 if titles else 0)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for (label, images), line in zip(rows, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        bold = "bold" if label.startswith("HSIVI") else "normal"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11, fontweight=bold, labelpad=10)
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_curve(rows: list[dict[str, Any]], metric: str, name: str, path: Path, factor: float = 1) -> None:
    """Draws a metric of the rows, times a factor, against the network calls; on log axes if all are positive.

    Args:
        rows: Rows of the report.
        metric: Its key in the rows.
        name: Its full name, with the factor and the features.
        path: PNG to write.
        factor: What the values are multiplied by.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["nfe"], factor * row[metric]) for row in rows if row["method"] == method)
        size = 260 if method == "HSIVI" else 45
        calls, values = zip(*points, strict=True)
        axis.scatter(calls, values, s=size, marker=MARKERS[method], color=COLOURS[method], label=method, zorder=3)
        axis.plot(calls, values, color=COLOURS[method], alpha=0.5)
    ticks = sorted({row["nfe"] for row in rows})
    scale = "log" if all(row[metric] > 0 for row in rows) else "linear"
    axis.set(xscale="log", yscale=scale, xlabel="network calls (NFE)", ylabel="lower is better")
    axis.set_title(name, fontsize=9)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
