"""The report of an evaluation: its tables, its two figures, and its closing lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..folders import write_json, write_text
from .figures import draw_curve, draw_samples
from .pages import measured_on, write_table

OURS = "HSIVI"
# Name in the head of the table, factor and format of each measure of the report.
METRICS: dict[str, tuple[str, int, str]] = {
    "kid": ("KID x 1000", 1000, ".2f"),
    "fd": ("FD", 1, ".2f"),
    "precision": ("precision", 1, ".3f"),
    "recall": ("recall", 1, ".3f"),
    "coverage": ("coverage", 1, ".3f"),
    "swd": ("SWD", 1, ".4f"),
}
NOTES = """\
KID is the squared maximum mean discrepancy of the features under the kernel (x . y / s + 1)^3, with s the mean of
|x|^2 in the reference; FD is the Frechet distance of the features. Both depend on the features named above: they
are not the KID and FID of Inception features, and compare within this table only. Lower is better in both and in
SWD, the sliced Wasserstein distance of the pixels; higher is better in precision, recall and coverage. DDIM has eta
0; DPM-Solver++ is 2M. All methods start from the same noise and have the same class labels, if any, in equal
numbers. The last column is the spacing of the timesteps, and the timesteps of the network calls. Another grid can
make a baseline better."""


def load_run(run_dir: Path) -> dict[str, Any]:
    """Options and cost of a finished run."""
    missing = [name for name in ("pipeline", "options.json", "training.json") if not (run_dir / name).exists()]
    if missing:
        raise ValueError(f"--run_dir {run_dir} lacks {', '.join(missing)}: give the folder of a finished distillation")
    return {**json.loads((run_dir / "options.json").read_text()), **json.loads((run_dir / "training.json").read_text())}


def cell(name: str, value: float) -> str:
    """A measure as it is written in the tables."""
    _, factor, form = METRICS[name]
    return format(factor * value, form)


@dataclass(frozen=True)
class Report:
    """What was measured, with a row for each method and number of calls."""

    headline: str  # measure that the rows are sorted by and the curve shows, "kid" or "fd"
    features: str  # their name
    reference: str  # name of the images that were compared to
    floor: float | None  # headline of one half of the reference against the other, None if it is too small
    rows: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """Full name of the headline."""
        return f"{METRICS[self.headline][0]}, {self.features}"

    def write(self, run_dir: Path, training: dict[str, Any]) -> None:
        """Writes report.json and report.md; `training` has options and cost of the run, and the teacher's name."""
        measured = f"Measured on {measured_on()}."
        content = {"features": self.features, "reference": self.reference, "headline": self.headline}
        write_json(run_dir / "report.json", {**content, "floor": self.floor, "measured": measured, "rows": self.rows})
        floor = "" if self.floor is None else f" Between its two halves the reference has {self._short(self.floor)}."
        intro = (
            f"Teacher `{training['teacher']}`. Reference: {self.reference}.{floor} HSIVI was trained "
            f"{'with' if training.get('train_data') else 'without'} data by the preset `{training.get('preset')}` for "
            f"{training.get('max_train_steps')} updates. Features: {self.features}."
        )
        text = "\n\n".join([f"# {run_dir.resolve().name}", intro, self._table(), NOTES, measured])
        write_text(run_dir / "report.md", f"{text}\n")

    def _short(self, value: float) -> str:
        return f"{METRICS[self.headline][0]} {cell(self.headline, value)}"

    def _table(self) -> str:
        names = [self.headline, *(name for name in METRICS if name != self.headline)]
        heads = ["NFE", "method", *(METRICS[name][0] for name in names), "images", "train seed", "eval seed"]
        lines = []
        for row in sorted(self.rows, key=lambda row: (row["nfe"], row[self.headline])):
            method = f"**{OURS}**" if row["method"] == OURS else row["method"]
            seed = "" if row["train_seed"] is None else row["train_seed"]
            seconds = "" if row["train_seconds"] is None else format(row["train_seconds"], ".0f")
            cells = [row["nfe"], method, *(cell(name, row[name]) for name in names), row["num_samples"], seed]
            lines.append([*cells, row["eval_seed"], seconds, row["grid"]])
        return write_table([*heads, "training s", "grid"], ("method", "grid"), lines)

    def draw(
        self, run_dir: Path, shown: dict[tuple[str, int], torch.Tensor], reference: torch.Tensor, classes: int | None
    ) -> None:
        """Draws samples.png, of shown images and reference, and curve.png; image i is of class i mod classes."""
        titles = [f"class {i % classes}" for i in range(len(reference))] if classes else None
        rows = [*image_rows(shown), ("reference", reference)]
        draw_samples(rows, run_dir / "samples.png", titles)
        draw_curve(self.rows, self.headline, self.metric, run_dir / "curve.png", METRICS[self.headline][1])

    def closing_lines(self, run_dir: Path) -> list[str]:
        """What was made, how it compares at the most network calls it can make, what to do next."""
        ours = max((row for row in self.rows if row["method"] == OURS), key=lambda row: row["nfe"])
        baselines = [row for row in self.rows if row["method"] != OURS]
        compared = f"{self._short(ours[self.headline])} at {ours['nfe']} network calls"
        if equal := [row for row in baselines if row["nfe"] == ours["nfe"]]:
            best = min(equal, key=lambda row: row[self.headline])
            value = cell(self.headline, best[self.headline])
            compared += f", against {value} of {best['method']}, the best baseline at as many on stock timestep grids"
        if slow := [row for row in baselines if row["nfe"] > ours["nfe"]]:
            longest = max(slow, key=lambda row: row["nfe"])
            value = cell(self.headline, longest[self.headline])
            compared += f", and {value} of {longest['method']} at {longest['nfe']}"
        return [
            f"Made:     report.md, report.json, samples.png, curve.png in {run_dir}",
            f"Compares: {compared}",
            f"Next:     look at {run_dir / 'samples.png'}",
        ]


def image_rows(shown: dict[tuple[str, int], torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The teacher's DDPM first, then each baseline and HSIVI at equal calls."""
    rows = [(f"teacher, {key[0]} at {key[1]}", images) for key, images in shown.items() if key[0] == "DDPM"]
    ours = {key[1]: images for key, images in shown.items() if key[0] == OURS}
    for nfe in ours:
        rows += [(f"{key[0]} at {nfe}", shown[key]) for key in shown if key[1] == nfe and key[0] != OURS]
        rows.append((f"{OURS} at {nfe}", ours[nfe]))
    return rows
