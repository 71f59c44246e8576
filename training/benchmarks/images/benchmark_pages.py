"""Tables and figures of a benchmark, from its results.json.

    python -m training.benchmarks.images.benchmark_pages

fills the table of README.md by docs/benchmarks/results.json; `benchmark` does so with the page beside its results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from safetensors.torch import load_file

from hsivi_diffusers.evaluation.figures import draw_curves, draw_samples, pyplot
from hsivi_diffusers.evaluation.pages import fill_tables, new_parts, write_table
from hsivi_diffusers.runs.folders import write_text
from hsivi_diffusers.runs.measures import MEASURES, written

from .benchmark_results import (
    BASELINES,
    OURS,
    REAL,
    SOLVER,
    TEACHER,
    TEACHER_SDE,
    UNGUIDED,
    Group,
    Row,
    grouped,
    pictures_path,
    read_rows,
    three_digits,
    value,
)
from .spaces import OF_CAPTIONS, OF_CLASSES, OF_CLASSIFIER

ORDER = (REAL, TEACHER, TEACHER_SDE, SOLVER, UNGUIDED, *BASELINES, OURS)
CURVES = ("recall", "coverage")
OF_NEIGHBOURS = ("precision", "recall", "density", "coverage", "nearest", "class_recall")  # of copies they tell nothing
SHOWN_SOLVERS = (1, 2, 4, 10, 20)


def write_pages(folder: Path) -> None:
    """Fills the tables of FOLDER/SET.md of each set, which is begun if there is none, and draws its figures."""
    for name, rows in in_sets(read_rows(folder / "results.json")).items():
        word = as_word(name)
        if flat := [{**row, **row["distances"]} for row in sorted(rows, key=rank) if row["nfe"]]:
            shown = [*flat[0]["distances"], *CURVES]
            draw_curves(flat, {each: each for each in shown}, folder / f"curves_{word}.png")
            draw_classes(rows, folder / f"classes_{word}.png")
        if (pictures := pictures_path(folder, name)).exists():
            measured = {"real", *(f"{row['method']} at {row['nfe']}" for row in rows)}
            kept = {each: images for each, images in load_file(pictures).items() if each in measured}
            draw_samples(picture_rows(kept), folder / f"samples_{word}.png")
        figures = [f"{kind}_{word}.png" for kind in ("samples", "curves", "classes")]
        fill_page(folder / f"{word}.md", name, make_tables(rows), figures)


def fill_glance(folder: Path, *pages: Path) -> None:
    """Fills the table of all sets in pages by FOLDER/results.json.

    Raises:
        ValueError: There are no results.
    """
    if not (rows := read_rows(folder / "results.json")):
        raise ValueError(f"{folder / 'results.json'} is missing: run the benchmark first, in the folder of the clone")
    tables = {"glance": glance_table(in_sets(rows))}
    for page in pages:
        write_text(page, fill_tables(page.read_text(encoding="utf-8"), tables))


def fill_page(page: Path, title: str, tables: dict[str, str], figures: Sequence[str] = ()) -> None:
    """Fills the tables of a page, which is begun if there is none, and adds those and the figures that it lacks."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n"
    lacking = [table for table in tables if f"<!-- table: {table} -->" not in text]
    drawn = [figure for figure in figures if f"({figure})" not in text and (page.parent / figure).exists()]
    write_text(page, fill_tables(text + new_parts(lacking, drawn), tables))


def make_tables(rows: list[Row]) -> dict[str, str]:
    """The tables of a set, by name."""
    makers = {"summary": summary_table, "floor": floor_table}
    makers |= {"measures": measures_table, "costs": costs_table}
    return {name: make(rows) for name, make in makers.items()}


def in_sets(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each set."""
    names = dict.fromkeys(row["dataset"] for row in rows)
    return {name: [row for row in rows if row["dataset"] == name] for name in names}


def as_word(dataset: str) -> str:
    """The name of a set as a part of names."""
    return re.sub(r"\W", "_", dataset)


def is_ours(method: str) -> bool:
    return method.startswith(OURS)


def rank(row: Row) -> tuple[int, str]:
    """The order of the methods: the floor, what one has for nothing, the baselines, ours."""
    method = row["method"]
    return ORDER.index(OURS if is_ours(method) else method), method


def is_shown(method: str, nfe: int) -> bool:
    """Whether the figure of samples has images of it."""
    return method != REAL and (method != SOLVER or nfe in SHOWN_SOLVERS)


def distance(rows: list[Row], space: str, kind: str = "distances") -> str:
    """Mean and spread over the training seeds, of three digits; nothing without rows."""
    if not rows:
        return ""
    spread = stdev(row[kind][space] for row in rows) if len(rows) > 1 else None
    return three_digits(value(rows, space, kind)) + ("" if spread is None else f" ± {spread:.2g}")


def summary_table(rows: list[Row]) -> str:
    """Distances at each number of calls, of the tuned solver, the baseline that is best in the space, and ours."""
    groups, spaces = grouped(rows), [*rows[0]["distances"]]
    lines = []
    for nfe in counts_of(groups):
        cells = []
        for space in spaces:
            solver, ours = (cell(groups.get((method, nfe), []), space) for method in (SOLVER, OURS))
            cells += least_bold(solver, best_baseline(groups, nfe, space), ours)
        lines.append([nfe, *cells])
    heads = [f"{space}: {word}" for space in spaces for word in ("tuned solver", "best baseline", "ours")]
    return write_table(["calls", *heads], ("method",), lines)


def glance_table(sets: dict[str, list[Row]]) -> str:
    """Of every set, at the calls of our students, the distances in its first space: what the README shows.

    The solver is that with the least of so many calls or fewer, of those that are best in all spaces at their number.
    """
    lines = []
    for name, rows in sets.items():
        groups, (space, *_) = grouped(rows), rows[0]["distances"]
        for nfe in sorted(nfe for method, nfe in groups if method == OURS):
            solvers = [each for (method, calls), each in groups.items() if method == SOLVER and calls <= nfe]
            solver = min(solvers, key=lambda each: value(each, space), default=[])
            words = f" {solver[0]['solver']}" if solver else ""
            words += f" at {solver[0]['nfe']}" if solver and solver[0]["nfe"] < nfe else ""
            cells = cell(solver, space, words), best_baseline(groups, nfe, space), cell(groups[OURS, nfe], space)
            lines.append([name, nfe, *least_bold(*cells)])
    return write_table(["set", "calls", "tuned solver", "best baseline", OURS], ("set",), lines)


def counts_of(groups: dict[Group, list[Row]]) -> list[int]:
    """The numbers of calls of the tuned solver and of ours, ascending."""
    return sorted({nfe for method, nfe in groups if method in (SOLVER, OURS)})


def cell(rows: list[Row], space: str, words: str = "") -> tuple[float, str]:
    """The distance of rows in a space, and how it is written, with words after it; infinity and "" without rows."""
    return (value(rows, space), distance(rows, space) + words) if rows else (math.inf, "")


def least_bold(*cells: tuple[float, str]) -> list[str]:
    """What is written in each cell, the least of several bold."""
    numbers = [number for number, text in cells if text]
    least = min(numbers) if len(numbers) > 1 else None
    return [f"**{text}**" if number == least else text for number, text in cells]


def best_baseline(groups: dict[Group, list[Row]], nfe: int, space: str) -> tuple[float, str]:
    """The distance of the baseline that is best in a space at so many calls, and how it is written, with its name."""
    baselines = [groups[name, nfe] for name in (UNGUIDED, *BASELINES) if (name, nfe) in groups]
    best = min(baselines, key=lambda each: value(each, space), default=[])
    return cell(best, space, f" ({best[0]['method'].split()[0]})" if best else "")


def floor_table(rows: list[Row]) -> str:
    """Distances of real images to themselves, and of the teacher: what is good."""
    lines = []
    for row in rows:
        if row["method"] in (REAL, TEACHER, TEACHER_SDE):
            words = f"{row['method']} at {row['nfe']}" if row["nfe"] else row["method"]
            lines.append([words, *(distance([row], space) for space in row["distances"])])
    return write_table(["", *rows[0]["distances"]], ("",), lines)


def measures_table(rows: list[Row]) -> str:
    """Every measure: distances to real images and to the teacher's, and those of the classifier's features."""
    spaces = [*rows[0]["distances"]]
    names = [name for name in (*OF_CLASSIFIER, *OF_CLASSES, *OF_CAPTIONS) if all(name in row for row in rows)]
    lines = []
    for (method, nfe), of_group in sorted(grouped(rows).items(), key=lambda item: (item[0][1], rank(item[1][0]))):
        cells = [distance(of_group, space, kind) for kind in ("distances", "teacher_distances") for space in spaces]
        empty = OF_NEIGHBOURS if method == REAL else ()
        cells += ["" if each in empty else written(each, *(row[each] for row in of_group)) for each in names]
        solver = f" ({of_group[0]['solver']}{_falls(of_group[0])})" if method in (SOLVER, UNGUIDED) else ""
        lines.append([nfe or "", bold(method) + solver, *cells])
    heads = [*spaces, *(f"{space}, to teacher" for space in spaces), *(MEASURES[each].head for each in names)]
    return write_table(["calls", "method", *heads], ("method",), lines)


def _falls(row: Row) -> str:
    return ", falling guidance" if "guidance_end" in row.get("settings", {}) else ""


def costs_table(rows: list[Row]) -> str:
    """What each training cost, seed by seed, and as a multiple of what ours of as many calls cost."""
    groups, lines = grouped(rows), []
    for (method, nfe), of_group in sorted(groups.items(), key=lambda item: (item[0][1], rank(item[1][0]))):
        if of_group[0]["train_seconds"] is None:
            continue
        ours = {row["train_seed"]: row for row in groups.get((OURS, nfe), [])}
        cells = []
        for name, unit, form in (("train_seconds", 1, ".0f"), ("train_calls", 1e6, ".2f")):
            known = [row for row in of_group if row[name] is not None]  # a run may have been killed at its end
            cells.append(", ".join(format(row[name] / unit, form) for row in known))
            pairs = [(row[name], ours[row["train_seed"]][name]) for row in known if row["train_seed"] in ours]
            cells.append(", ".join(f"{one / other:.2f}" for one, other in pairs) if method in BASELINES else "")
        lines.append([nfe, bold(method), *cells])
    heads = ["seconds", "times ours", "million calls", "times ours"]
    return write_table(["calls", "method", *heads], ("method",), lines)


def bold(method: str) -> str:
    return f"**{method}**" if is_ours(method) else method


def picture_rows(pictures: dict[str, Any]) -> list[tuple[str, Any]]:
    """Labelled rows of one figure: the teacher and its solvers, the baselines, ours, real images."""

    def place(name: str) -> tuple[int, str, int]:
        method, _, nfe = name.partition(" at ")
        return *rank({"method": method}), int(nfe)

    names = [*sorted((name for name in pictures if name != "real"), key=place), "real"]
    return [(name, pictures[name].float() / 255) for name in names]


def draw_classes(rows: list[Row], path: Path) -> None:
    """Draws the share of each class for the teacher and what was distilled, by bars, and for the data, by dashes."""
    plt = pyplot()
    groups = {
        group: of_group
        for group, of_group in sorted(grouped(rows).items(), key=lambda item: (is_ours(item[0][0]), item[0]))
        if of_group[0]["class_shares"] and (group[0] not in (REAL, SOLVER, UNGUIDED) or group == (SOLVER, 10))
    }
    if not groups:  # nothing of it is measured yet, or there are captions
        return
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    style = {"figsize": (3.5 * columns, 2 * lines), "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, **style)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, ((method, nfe), of_group) in zip(axes.flat, groups.items(), strict=False):
        shares = [mean(each) for each in zip(*(row["class_shares"] for row in of_group), strict=True)]
        real = of_group[0]["real_class_shares"]
        axis.bar(range(len(shares)), shares, color="#d62728" if is_ours(method) else "#7f7f7f")
        axis.plot(range(len(real)), real, color="black", ls="", marker="_", ms=12)
        axis.set_title(f"{method} at {nfe}", fontsize=8)
        axis.set_xticks(range(len(shares)))
    figure.supxlabel("class", fontsize=9)
    figure.supylabel("share (dashes: real)", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    fill_glance(Path("docs/benchmarks"), Path("README.md"), Path("docs/benchmarks/index.md"))
