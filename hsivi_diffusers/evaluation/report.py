"""The report of an evaluation: its tables, its two figures, and its closing lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runs.artifacts import read_record
from ..runs.folders import write_json, write_text
from ..runs.measures import HALVES, MEASURES, REPORTED, format_measure
from .figures import draw_curves, draw_samples
from .pages import measured_on, write_table

OURS = "HSIVI"
GUIDED = "Teacher and solvers are guided, too: a step of theirs is two network calls."
FELL = "In the training of HSIVI the guidance was weaker the more noise there is, so that it is guided less than these."
NOTES = """\
KID is the squared maximum mean discrepancy of the features under the kernel (x . y / s + 1)^3, with s the mean of
|x|^2 in the reference; FD is the Frechet distance of the features. Both depend on the features named above: they
are not the KID and FID of Inception features, and compare within this table only. KID has no bias, so a value near
the best may fall below 0; FD falls with the number of images. FD of pixels is that of up to 64 of their principal
components, SWD the sliced Wasserstein distance of the pixels, both at 64 x 64 pixels at most. Lower is better, but in
precision, recall and coverage. Two halves of the reference, one measured against the other, show what is good; a row is
measured against all of it, and may be better. DDIM has eta 0; DPM-Solver++ is 2M. All methods start from the same noise
and have the same class labels, if any, in equal numbers. The last column is the spacing of the timesteps, and the
timesteps of the network calls. Another grid can make a baseline better."""


def load_run(run_dir: Path) -> dict[str, Any]:
    """Options and cost of a finished run."""
    missing = [name for name in ("pipeline", "options.json", "training.json") if not (run_dir / name).exists()]
    if missing:
        raise ValueError(f"--run_dir {run_dir} lacks {', '.join(missing)}: give the folder of a finished distillation")
    return {**read_record(run_dir / "options.json"), **read_record(run_dir / "training.json")}


@dataclass(frozen=True)
class Report:
    """What was measured, with a row for each method and number of calls."""

    headline: str  # measure that the rows are sorted by and the curve shows, "kid" or "fd"
    features: str  # their name
    reference: str  # name of the images that were compared to
    floor: dict[str, float]  # measures of one half of the reference against the other, empty if it is too small
    rows: list[dict[str, Any]]

    def write(self, run_dir: Path, training: dict[str, Any]) -> None:
        """Writes report.json and report.md; `training` has options and cost of the run, and the teacher's name.

        Its `guidance_scale` is the one that was measured.
        """
        guided = training.get("guidance_scale") not in (None, 1)
        measured = f"Measured on {measured_on()}."
        content = {"features": self.features, "reference": self.reference, "headline": self.headline}
        write_json(run_dir / "report.json", {**content, "floor": self.floor, "measured": measured, "rows": self.rows})
        unknown = [label for label, share in enumerate(training.get("class_shares") or []) if not share]
        sentences = [
            f"Teacher `{training['teacher']}`. Reference: {self.reference}.",
            f"HSIVI was trained {'with' if training.get('train_data') else 'without'} data by the preset "
            f"`{training.get('preset')}` for {training.get('max_train_steps')} updates. Features: {self.features}.",
            GUIDED if guided else "",
            FELL if guided and training.get("guidance_falls") else "",
            f"Classes that the student was not trained on: {', '.join(map(str, unknown))}." if unknown else "",
        ]
        intro = " ".join(sentence for sentence in sentences if sentence)
        text = "\n\n".join([f"# {run_dir.resolve().name}", intro, self._table(), NOTES, measured])
        write_text(run_dir / "report.md", f"{text}\n")

    def _short(self, value: float) -> str:
        return f"{MEASURES[self.headline].head} {format_measure(self.headline, value)}"

    def _table(self) -> str:
        names = [self.headline, *(name for name in REPORTED if name != self.headline)]
        measures = [MEASURES[name].head for name in names]
        heads = ["NFE", "method", *measures, "images", "train seed", "eval seed", "training s", "grid"]
        lines: list[list[Any]] = []
        if self.floor:
            lines.append(["", HALVES, *(format_measure(name, self.floor[name]) for name in names), *[""] * 5])
        for row in sorted(self.rows, key=lambda row: (row["nfe"], row[self.headline])):
            method, seed, seconds = row["method"], "", ""
            if method == OURS:
                method, seed, seconds = f"**{OURS}**", row["train_seed"], format(row["train_seconds"], ".0f")
            cells = [format_measure(name, row[name]) for name in names]
            lines.append([row["nfe"], method, *cells, row["num_samples"], seed, row["eval_seed"], seconds, row["grid"]])
        return write_table(heads, ("method", "grid"), lines)

    def draw(
        self, run_dir: Path, shown: dict[tuple[str, int], torch.Tensor], reference: torch.Tensor, classes: int | None
    ) -> None:
        """Draws samples.png, of shown images and reference, and curve.png; image i is of class i mod classes."""
        titles = [f"class {i % classes}" for i in range(len(reference))] if classes else None
        draw_samples([*image_rows(shown), ("reference", reference)], run_dir / "samples.png", titles)
        label = f"{MEASURES[self.headline].head}, {self.features}"
        draw_curves(self.rows, {self.headline: label}, run_dir / "curve.png")

    def closing_lines(self, run_dir: Path) -> str:
        """What was made, how it compares at the most network calls it can make, what to do next."""
        ours = max((row for row in self.rows if row["method"] == OURS), key=lambda row: row["nfe"])
        baselines = [row for row in self.rows if row["method"] != OURS]
        compared = f"{self._short(ours[self.headline])} at {ours['nfe']} network calls"
        if equal := [row for row in baselines if row["nfe"] == ours["nfe"]]:
            best = min(equal, key=lambda row: row[self.headline])
            value = format_measure(self.headline, best[self.headline])
            compared += f"; best solver at as many calls: {best['method']}, {value}"
        longest = max(baselines, key=lambda row: (row["nfe"], -row[self.headline]), default=ours)
        if longest["nfe"] > ours["nfe"]:
            value = format_measure(self.headline, longest[self.headline])
            compared += f"; with the most calls, {longest['nfe']}: {longest['method']}, {value}"
        return (
            f"Wrote:  index.html, report.md, report.json, samples.png, curve.png in {run_dir}\n"
            f"Result: {compared}\n"
            f"Next:   open {run_dir / 'index.html'} in a browser"
        )


def image_rows(shown: dict[tuple[str, int], torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The teacher's DDPM first, then each baseline and HSIVI at equal calls."""
    rows = [(f"teacher, {method} at {nfe}", images) for (method, nfe), images in shown.items() if method == "DDPM"]
    for ours, count in [key for key in shown if key[0] == OURS]:
        rows += [(f"{method} at {nfe}", shown[method, nfe]) for method, nfe in shown if nfe == count and method != ours]
        rows.append((f"{ours} at {count}", shown[ours, count]))
    return rows
