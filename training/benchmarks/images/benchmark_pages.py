"""Tables and figures of a benchmark, from its results.json."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from safetensors.torch import load_file

from hsivi_diffusers.evaluation.figures import draw_curves, draw_samples, pyplot
from hsivi_diffusers.evaluation.metrics import total_variation
from hsivi_diffusers.evaluation.pages import MEASURES, fill_tables, new_parts, write_table, written
from hsivi_diffusers.folders import write_text

from .benchmark_results import Row, pictures_path, read_rows

Group = tuple[str, int]  # method and network calls

OURS = "HSIVI fast"
BASELINE = "consistency distillation"
# Of those that were run, on the timestep grids that diffusers has by default: others may be better.
BEST = "best stock solver"
TEACHER: Group = ("DDPM", 100)
LABELS = ("set", "method", "measure", "held against", "reached")
SHOWN_CALLS = (1, 2, 4, 5, 8, 10, 15, 20, 50, 100, 1000)
CURVES = {"fd": "FD", "swd": "SWD", "recall": "recall"}
SHOWN_IMAGES = [TEACHER, ("UniPC", 4), ("UniPC", 10), (BASELINE, 1), (BASELINE, 4)]


def write_pages(folder: Path) -> None:
    """Fills the tables of FOLDER/index.md, which is begun if there is none, and draws the figures of FOLDER."""
    sets = in_sets(read_rows(folder / "results.json"))
    tables, figures = make_tables(sets), []
    for name, of_set in sets.items():
        word = as_word(name)
        draw_curves(sorted(of_set, key=rank), CURVES, folder / f"curves_{word}.png")
        draw_classes(of_set, folder / f"classes_{word}.png")
        if (pictures := pictures_path(folder, name)).exists():
            draw_samples(picture_rows(load_file(pictures)), folder / f"samples_{word}.png")
        figures += [f"{kind}_{word}.png" for kind in ("curves", "samples", "classes")]
    page = folder / "index.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Benchmark\n"
    lacking = [table for table in tables if f"<!-- table: {table} -->" not in text]
    drawn = [figure for figure in figures if f"({figure})" not in text and (folder / figure).exists()]
    write_text(page, fill_tables(text + new_parts(lacking, drawn), tables))


def make_tables(sets: dict[str, list[Row]]) -> dict[str, str]:
    """The tables by name: of all sets together, and of each."""
    tables = {"summary": summary_table(sets), "goals": goals_table(sets)}
    for name, of_set in sets.items():
        tables[f"fd_{as_word(name)}"] = calls_table(of_set)
        tables[f"measures_{as_word(name)}"] = measures_table(of_set)
    return tables


def in_sets(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each set."""
    names = dict.fromkeys(row["dataset"] for row in rows)
    return {name: beside_teacher([row for row in rows if row["dataset"] == name]) for name in names}


def as_word(dataset: str) -> str:
    """The name of a set as a part of names."""
    return re.sub(r"\W", "_", dataset)


def beside_teacher(rows: list[Row]) -> list[Row]:
    """Rows of a set with `teacher_tv`, the total variation to the teacher's shares of classes, if it was measured."""
    shares = [row["class_shares"] for row in rows if (row["method"], row["nfe"]) == TEACHER]
    return [{**row, "teacher_tv": total_variation(row["class_shares"], shares[0])} for row in rows] if shares else rows


def grouped(rows: list[Row]) -> dict[Group, list[Row]]:
    """The rows of all training seeds of each method and number of calls."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["nfe"]), []).append(row)
    return groups


def with_best(rows: list[Row]) -> dict[Group, list[Row]]:
    """These, and the row of the best stock solver at each number of calls at which more than DDPM was run."""
    solvers = [row for row in rows if is_solver(row["method"])]
    counts = {row["nfe"] for row in solvers if row["method"] != TEACHER[0]}
    order = sorted(solvers, key=lambda row: (row["fd"], row["method"]), reverse=True)
    return grouped(rows) | {(BEST, row["nfe"]): [row] for row in order if row["nfe"] in counts}


def is_ours(method: str) -> bool:
    return method.startswith("HSIVI")


def is_solver(method: str) -> bool:
    return not is_ours(method) and method != BASELINE


def rank(row: Row) -> tuple[bool, bool, str]:
    """The order of the methods: ours, the solvers, the baseline."""
    return not is_ours(row["method"]), row["method"] == BASELINE, row["method"]


def is_shown(method: str, nfe: int) -> bool:
    """Whether the figure of samples has images of it."""
    return is_ours(method) or (method, nfe) in SHOWN_IMAGES


def value(rows: list[Row], measure: str) -> float:
    """Mean over the training seeds."""
    return mean(row[measure] for row in rows)


def cell(rows: list[Row], measure: str) -> str:
    """Mean over the training seeds and its spread; nothing without rows."""
    return written(measure, *(row[measure] for row in rows)) if rows else ""


def summary_table(sets: dict[str, list[Row]]) -> str:
    """FD on each set: ours, the trained baseline and the best stock solver with its name, and DDPM at many calls."""
    groups = [with_best(rows) for rows in sets.values()]
    counts, lines = {nfe for of_set in groups for _, nfe in of_set}, []
    for nfe in sorted(counts & {*SHOWN_CALLS}):
        for method in (OURS, BASELINE, BEST) if nfe <= 20 else (BEST, TEACHER[0]):
            found = [of_set.get((method, nfe), []) for of_set in groups]
            names = [f" {rows[0]['method']}" if rows and method == BEST else "" for rows in found]
            if any(found):
                cells = [cell(rows, "fd") + name for rows, name in zip(found, names, strict=True)]
                lines.append([nfe, bold(method), *cells])
    return write_table(["calls", "method", *sets], LABELS, lines)


def calls_table(rows: list[Row]) -> str:
    """FD of every method at every number of calls."""
    groups = grouped(sorted(rows, key=rank))
    counts = sorted({nfe for _, nfe in groups})
    lines = [
        [bold(method), *(cell(groups.get((method, nfe), []), "fd") for nfe in counts)]
        for method in dict.fromkeys(method for method, _ in groups)
    ]
    return write_table(["method", *map(str, counts)], LABELS, lines)


def measures_table(rows: list[Row]) -> str:
    """Every measure, and what the training cost, at some numbers of calls."""
    measures = [measure for measure in MEASURES if all(measure in row for row in rows)]
    groups, lines = grouped(rows), []
    for (method, nfe), of_group in sorted(groups.items(), key=lambda item: (item[0][1], value(item[1], "fd"))):
        if nfe not in SHOWN_CALLS:
            continue
        cells = [*(cell(of_group, measure) for measure in measures), of_group[0]["num_samples"]]
        costs = ["", ""]
        if of_group[0]["train_seconds"] is not None:
            costs = [f"{value(of_group, 'train_seconds'):.0f}", f"{value(of_group, 'train_calls') / 1e6:.2f} M"]
        lines.append([nfe, bold(method), *cells, *costs])
    heads = [*(MEASURES[measure].head for measure in measures), "images", "training s", "calls of training"]
    return write_table(["calls", "method", *heads], LABELS, lines)


def bold(method: str) -> str:
    return f"**{method}**" if is_ours(method) else method


class Claim(NamedTuple):
    """What is asked of our samplers at a number of calls: a measure of at most the factor times that of a group."""

    calls: int
    group: Group | None  # without one the factor is the limit
    factor: float = 1.0
    measure: str = "fd"


# Solvers count at equal calls only: on better grids than those of diffusers, solvers of more calls than ours are ahead.
CLAIMS = [
    *(Claim(nfe, (BEST, nfe)) for nfe in (1, 2, 4, 5)),
    Claim(4, TEACHER),
    *(Claim(nfe, (BASELINE, nfe)) for nfe in (1, 2, 4)),
    Claim(1, None, 0.1, "teacher_tv"),
    Claim(1, ("DDPM", 1000), 1.2),
    Claim(4, ("DDPM", 1000)),
]


def goals_table(sets: dict[str, list[Row]]) -> str:
    """Each goal, for each set and each of our samplers but for preset `paper` that has the number of calls."""
    lines = []
    for name, rows in sets.items():
        groups = with_best(sorted(rows, key=rank))
        for nfe, group, factor, measure in CLAIMS:
            if group is not None and group not in groups:
                continue
            limit = factor if group is None else factor * value(groups[group], measure)
            times = "" if factor == 1 else f"{factor:g} times "
            words = f"{factor:g}" if group is None else f"{times}{group[0]} at {group[1]}"
            for (method, calls), ours in groups.items():
                if calls == nfe and is_ours(method) and "paper" not in method and measure in ours[0]:
                    reached = "yes" if value(ours, measure) <= limit else "no"
                    numbers = [cell(ours, measure), words, format(limit, MEASURES[measure].form), reached]
                    lines.append([name, method, nfe, MEASURES[measure].head, *numbers])
    if not lines:
        return "No goal can be told: the rows lack ours, or what they are held against."
    heads = ["set", "method", "calls", "measure", "ours", "held against", "it has", "reached"]
    return write_table(heads, LABELS, lines)


def picture_rows(pictures: dict[str, Any]) -> list[tuple[str, Any]]:
    """Labelled rows of one figure: the teacher and its solvers, the baseline, ours, real images."""
    others = [f"{method} at {nfe}" for method, nfe in SHOWN_IMAGES]
    ours = sorted(
        (name for name in pictures if is_ours(name)), key=lambda name: (name.split(" at ")[0], len(name), name)
    )
    return [(name, pictures[name].float() / 255) for name in [*others, *ours, "real"] if name in pictures]


def draw_classes(rows: list[Row], path: Path) -> None:
    """Draws the share of each class for the teacher and what was distilled, by bars, and for the data, by dashes."""
    plt = pyplot()
    groups = {
        group: of_group
        for group, of_group in sorted(grouped(rows).items(), key=lambda item: (is_ours(item[0][0]), item[0]))
        if not is_solver(group[0]) or group in (TEACHER, ("UniPC", 10))
    } or grouped(rows)
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
