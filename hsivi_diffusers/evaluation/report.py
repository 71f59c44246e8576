"""The report of an evaluation: its rows and tables, its two figures, and its closing lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runs.artifacts import OPTIONS, TRAINING, read_record
from ..runs.folders import write_json, write_text
from ..runs.measures import HALVES, MEASURES, REPORTED, format_cell
from ..runs.next_steps import to_finish
from ..runs.options import renamed
from ..runs.page import PAGE
from .figures import draw_curves, draw_samples
from .metrics import Measures, jackknife
from .pages import measured_on, write_table

COLUMNS = 16  # images in a row of samples.png
OURS = "HSIVI"
GUIDED = "Teacher and solvers use guidance, too: one of their steps is two network calls."
FELL = "In training the guidance of HSIVI decreased with noise, so that it has less of it than these."
NOTES = """\
KID is the squared maximum mean discrepancy of the features under the kernel (x . y / s + 1)^3, with s the mean of
|x|^2 in the reference; FD is the Frechet distance of the features. Both depend on the features named above: they are
not the KID and FID of Inception features, and compare within this table only. KID has no bias, so a value near the
best may fall below 0; FD falls with the number of images. FD of pixels is that of up to 64 of their principal
components, SWD the sliced Wasserstein distance of the pixels, both at 64 x 64 pixels at most. Lower is better, but in
precision, recall and coverage. The number after ± is the standard error of KID over draws of as many images. Two
halves of the reference, one measured against the other, show what is good; a row is measured against all of it, and
may be better. DDIM has eta 0; DPM-Solver++ is 2M. All methods start from the same noise and have the same class
labels, if any, in equal numbers. The last column has the timesteps of the network calls; another grid can make a
baseline better."""


def load_run(run_dir: Path) -> dict[str, Any]:
    """Returns options and cost of a finished run.

    Raises:
        ValueError: The run is not finished, or one of its records is damaged.
    """
    missing = [name for name in ("pipeline", OPTIONS, TRAINING) if not (run_dir / name).exists()]
    if missing:
        text = f"run_dir={str(run_dir)!r} lacks {', '.join(missing)}: give the folder of a finished run"
        raise ValueError(text + to_finish(run_dir))
    if (index := run_dir / "pipeline" / "model_index.json").is_file():
        read_record(index)
    run = {**read_record(run_dir / OPTIONS), **read_record(run_dir / TRAINING)}
    if missing := [name for name in ("pretrained_teacher_model", "seed", "seconds") if name not in run]:
        raise ValueError(f"options.json or training.json in {run_dir} is damaged: it lacks {', '.join(missing)}")
    return run


@dataclass(frozen=True)
class Report:
    """What was measured of a run, with a row for each method and number of network calls.

    Attributes:
        output_dir: Folder that the report is written to, of the run or another one.
        training: Options and cost of the run, the teacher's name, and as `guidance_scale` the one that is measured.
        headline: Measure that the rows are sorted by and the curve shows, "kid" or "fd".
        features: Name of the features.
        reference: Name of the images that were compared to.
        floor: Measures of one half of the reference against the other, empty if it is too small.
        rows: What `add` has measured.
        shown: The first images of each method and number of network calls.
    """

    output_dir: Path
    training: dict[str, Any]
    headline: str
    features: str
    reference: str
    floor: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    shown: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def add(self, method: str, nfe: int, grid: str, images: torch.Tensor, measures: Measures, eval_seed: int) -> None:
        """Measures images, shape (N, C, H, W), of a method, and writes the report so far.

        Images that are not finite cannot be measured: their number stands in the row as `not_finite`.
        """
        bad = int((~images.isfinite().flatten(1).all(1)).sum())
        ours = method == OURS
        row = {"dataset": self.reference, "method": method, "nfe": nfe, "grid": grid}
        row |= {"train_seed": self.training["seed"] if ours else None, "eval_seed": eval_seed}
        row |= {"num_samples": len(images), **({"not_finite": bad} if bad else measures(images))}
        self.rows.append({**row, "train_seconds": self.training["seconds"] if ours else None})
        self.shown[method, nfe] = images[:COLUMNS].nan_to_num(0, 1, 0)  # a copy, else all of them stay in memory
        self.write()

    def write(self) -> None:
        """Writes report.json and report.md."""
        training = self.training
        guided = training.get("guidance_scale") not in (None, 1) and not training.get("embeds_guidance")
        measured = f"Measured on {measured_on()}."
        content: dict[str, Any] = {"features": self.features, "reference": self.reference, "headline": self.headline}
        content |= {"floor": self.floor, "measured": measured, "rows": self._ranked()}
        write_json(self.output_dir / "report.json", content)
        unknown = [label for label, share in enumerate(training.get("class_shares") or []) if not share]
        sentences = [
            f"Teacher `{training['teacher']}`. Reference: {self.reference}.",
            f"HSIVI was trained {'with' if training.get('train_data') else 'without'} data by the preset "
            f"`{training.get('preset')}` for {training.get('max_train_steps')} updates. Features: {self.features}.",
            GUIDED if guided else "",
            FELL if guided and renamed(training).get("decay_guidance") else "",
            f"Classes that the student was not trained on: {', '.join(map(str, unknown))}." if unknown else "",
        ]
        intro = " ".join(sentence for sentence in sentences if sentence)
        text = "\n\n".join([f"# {self.output_dir.resolve().name}", intro, self._table(), NOTES, measured])
        write_text(self.output_dir / "report.md", f"{text}\n")

    def _ranked(self) -> list[dict[str, Any]]:
        """The rows by network calls, and the best of each number of calls first."""
        return sorted(self.rows, key=lambda row: (row["nfe"], row.get(self.headline, math.inf)))

    def _table(self) -> str:
        names = [self.headline, *(name for name in REPORTED if name != self.headline)]
        measures = [MEASURES[name].head for name in names]
        heads = ["NFE", "method", *measures, "images", "train seed", "eval seed", "training s", "grid"]
        lines: list[list[Any]] = []
        if self.floor:
            lines.append(["", HALVES, *(format_cell(name, self.floor) for name in names), *[""] * 5])
        for row in self._ranked():
            method, seed, seconds = row["method"], "", ""
            if method == OURS:
                method, seed, seconds = f"**{OURS}**", row["train_seed"], format(row["train_seconds"], ".0f")
            cells = [format_cell(name, row, "-") for name in names]
            if "not_finite" in row:
                cells[0] = f"{row['not_finite']} images are not finite"
            lines.append([row["nfe"], method, *cells, row["num_samples"], seed, row["eval_seed"], seconds, row["grid"]])
        return write_table(heads, ("method", "grid"), lines)

    def draw(self, images: torch.Tensor, labels: torch.Tensor | None, classes: int | None) -> None:
        """Draws samples.png, of each method and the reference, and curve.png; image i is of class i mod `classes`."""
        columns = min(COLUMNS, *map(len, self.shown.values()))
        titles = [f"class {i % classes}" for i in range(columns)] if classes else None
        reference = "reference", pick(images, labels, classes, columns)
        draw_samples([*image_rows(self.shown), reference], self.output_dir / "samples.png", titles)
        label = f"{MEASURES[self.headline].head}, {self.features}"
        draw_curves(self._measured(self.rows), {self.headline: label}, self.output_dir / "curve.png")

    def _measured(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if self.headline in row]

    def _are_level(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether two rows, of the same noise, differ by less than twice the standard error of the difference.

        That is of KID alone; the reference, which both have, is not in it.
        """
        if self.headline != "kid" or not {"kid", "kid_folds"} <= one.keys() & other.keys():
            return False
        folds = torch.tensor(one["kid_folds"]) - torch.tensor(other["kid_folds"])
        return abs(one["kid"] - other["kid"]) < 2 * jackknife(folds)

    def closing_lines(self) -> str:
        """What was written, how HSIVI compares at each of its numbers of network calls, and what to do next."""
        ours = sorted((row for row in self.rows if row["method"] == OURS), key=lambda row: row["nfe"])
        baselines = self._measured([row for row in self.rows if row["method"] != OURS])

        def value(row: dict[str, Any]) -> str:
            return format_cell(self.headline, row, "not finite")

        named, parts = [*ours], []
        for row in ours:
            calls = f"{row['nfe']} network call{'s' * (row['nfe'] > 1)}"
            parts.append(f"{MEASURES[self.headline].head} {value(row)} at {calls}")
            if equal := [each for each in baselines if each["nfe"] == row["nfe"]]:
                best = min(equal, key=lambda each: each[self.headline])
                named.append(best)
                parts.append(f"best solver at as many calls: {best['method']}, {value(best)}")
                parts[-1] += ", too close to tell apart by this many images" * self._are_level(row, best)
        compared = "; ".join(parts)
        longest = max(baselines, key=lambda row: (row["nfe"], -row[self.headline]), default=ours[-1])
        if longest["nfe"] > ours[-1]["nfe"]:
            named.append(longest)
            compared += f"; with the most calls, {longest['nfe']}: {longest['method']}, {value(longest)}"
        if self.headline == "kid" and any(row.get("kid", 0) < 0 for row in named):
            compared += "; KID is estimated without bias, so near the best it may fall below 0"
        written = ["report.md", "report.json", "samples.png", "curve.png"]
        following = f"read {self.output_dir / 'report.md'}"
        if (page := self.output_dir / PAGE).is_file():
            written, following = [PAGE, *written], f"open {page} in a browser"
        return f"Wrote:  {', '.join(written)} in {self.output_dir}\nResult: {compared}\nNext:   {following}"


def image_rows(shown: dict[tuple[str, int], torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The teacher's DDPM first, then each baseline and HSIVI at equal calls."""
    rows = [(f"teacher, {method} at {nfe}", images) for (method, nfe), images in shown.items() if method == "DDPM"]
    for ours, count in [key for key in shown if key[0] == OURS]:
        rows += [(f"{method} at {nfe}", shown[method, nfe]) for method, nfe in shown if nfe == count and method != ours]
        rows.append((f"{ours} at {count}", shown[ours, count]))
    return rows


def pick(images: torch.Tensor, labels: torch.Tensor | None, classes: int | None, columns: int) -> torch.Tensor:
    """Images of the reference for a row of the figure: image i of class i mod `classes` if the labels are known."""
    rows = torch.linspace(0, len(images) - 1, columns).long()
    if classes and labels is not None:
        wanted = [(labels == i % classes).nonzero().flatten() for i in range(columns)]
        found = [each[i // classes % len(each)] for i, each in enumerate(wanted) if len(each)]
        rows = torch.stack(found) if len(found) == columns else rows
    return images[rows]
