"""The two pictures of a report: rows of samples, and quality against network calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = {
    "HSIVI": "#d62728",
    "DDIM": "#1f77b4",
    "DDIM, eta 1": "#17becf",
    "DPM-Solver++": "#2ca02c",
    "UniPC": "#9467bd",
    "DDPM": "#7f7f7f",
}
MARKERS = {"HSIVI": "*", "DDIM": "o", "DDIM, eta 1": "v", "DPM-Solver++": "s", "UniPC": "^", "DDPM": "D"}


def draw_samples(rows: list[tuple[str, torch.Tensor]], path: Path) -> None:
    """Draws labelled rows of pictures.

    Args:
        rows: Label and pictures in [0, 1], shape (N, C, H, W), of each row, the same N in all.
        path: PNG to write.
    """
    columns = len(rows[0][1])
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(0.62 * columns + 2.6, 0.66 * len(rows)), squeeze=False, layout="constrained"
    )
    for (label, pictures), line in zip(rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            axis.imshow(picture.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        bold = "bold" if label.startswith("HSIVI") else "normal"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11, fontweight=bold, labelpad=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curve(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Draws the Frechet distance against the number of network calls, both on log axes.

    Args:
        rows: Rows of the report.
        metric: Full name of the metric, for the axis.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["nfe"], row["fd"]) for row in rows if row["method"] == method)
        size = 260 if method == "HSIVI" else 45
        calls, distances = zip(*points, strict=True)
        axis.scatter(calls, distances, s=size, marker=MARKERS[method], color=COLOURS[method], label=method, zorder=3)
        axis.plot(calls, distances, color=COLOURS[method], alpha=0.5)
    ticks = sorted({row["nfe"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="network calls (NFE)", ylabel=f"{metric}, lower is better")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
