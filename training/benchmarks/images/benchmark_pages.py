"""Tables and figures of a benchmark, from its results.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator
from safetensors.torch import load_file

from hsivi_diffusers.evaluation.figures import draw_samples, pyplot
from hsivi_diffusers.evaluation.metrics import total_variation
from hsivi_diffusers.evaluation.pages import fill_tables, new_parts, write_table
from hsivi_diffusers.folders import write_text

plt = pyplot()
Row = dict[str, Any]
Group = tuple[str, int]  # method and network calls

OURS = "HSIVI fast"
BASELINE = "consistency distillation"
# Of those that were run, on the timestep grids that diffusers has by default: others may be better.
BEST = "best stock solver"
TEACHER: Group = ("DDPM", 100)
# Name in the head of a table, how it is written, and whether larger is better.
MEASURES: dict[str, tuple[str, str, bool]] = {
    "fd": ("FD", ".2f", False),
    "kid": ("KID x 1000", ".2f", False),
    "precision": ("precision", ".3f", True),
    "recall": ("recall", ".3f", True),
    "density": ("density", ".3f", True),
    "coverage": ("coverage", ".3f", True),
    "swd": ("SWD", ".4f", False),
    "class_tv": ("class TV", ".3f", False),
    "teacher_tv": ("TV to teacher", ".3f", False),
    "nearest": ("nearest", ".3f", True),
}
LABELS = ("set", "method", "measure", "held against", "reached")
SHOWN_CALLS = (1, 2, 4, 5, 8, 10, 15, 20, 50, 100, 1000)
SHOWN_IMAGES = [TEACHER, ("UniPC", 4), ("UniPC", 10), (BASELINE, 1), (BASELINE, 4)]


def write_pages(folder: Path) -> None:
    """Fills the tables of FOLDER/index.md, which is begun if there is none, and draws the figures of FOLDER."""
    rows: list[Row] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    sets = in_sets(rows)
    tables, figures = make_tables(sets), []
    for name, of_set in sets.items():
        word = as_word(name)
        draw_curves(of_set, folder / f"curves_{word}.png")
        draw_classes(of_set, folder / f"classes_{word}.png")
        if (pictures := pictures_path(folder, name)).exists():
            draw_samples(picture_rows(load_file(pictures)), folder / f"samples_{word}.png")
        figures += [f"{kind}_{word}.png" for kind in ("curves", "samples", "classes")]
    page = folder / "index.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Benchmark\n"
    write_text(page, fill_tables(text + missing_parts(text, [*tables], figures, folder), tables))


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


def pictures_path(folder: Path, dataset: str) -> Path:
    """File of the first images of each shown row of a set, as bytes."""
    return folder / f"pictures_{dataset}.safetensors"


def missing_parts(text: str, tables: list[str], figures: list[str], folder: Path) -> str:
    """Sections of the tables, and the figures that were drawn, which a page lacks: those of a set that is new."""
    lacking = [name for name in tables if f"<!-- table: {name} -->" not in text]
    drawn = [name for name in figures if f"({name})" not in text and (folder / name).exists()]
    return new_parts(lacking, drawn)


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


def is_ours(method: str) -> bool:
    return method.startswith("HSIVI")


def is_fast(method: str) -> bool:
    """Whether the goals are of it."""
    return is_ours(method) and "paper" not in method


def is_solver(method: str) -> bool:
    return not is_ours(method) and method != BASELINE


def in_order(groups: Iterable[Group]) -> list[str]:
    """The methods of these groups: ours, the solvers, the baseline."""
    return sorted({method for method, _ in groups}, key=lambda name: (not is_ours(name), name == BASELINE, name))


def is_shown(method: str, nfe: int) -> bool:
    """Whether the figure of samples has images of it."""
    return is_ours(method) or (method, nfe) in SHOWN_IMAGES


def value(rows: list[Row], measure: str) -> float:
    """Mean over the training seeds."""
    return mean(row[measure] for row in rows)


def written(rows: list[Row], measure: str) -> str:
    """Mean over the training seeds, and their standard deviation where there are several."""
    _, form, _ = MEASURES[measure]
    factor = 1000 if measure == "kid" else 1
    numbers = [factor * row[measure] for row in rows]
    spread = f" ± {format(stdev(numbers), form)}" if len(numbers) > 1 else ""
    return format(mean(numbers), form) + spread


def summary_table(sets: dict[str, list[Row]]) -> str:
    """FD on each set: ours, the trained baseline and the best stock solver, and DDPM at many calls."""
    groups = {name: grouped(rows) for name, rows in sets.items()}
    counts, lines = {nfe for of_set in groups.values() for _, nfe in of_set}, []
    for nfe in sorted(counts & {*SHOWN_CALLS}):
        for method in (OURS, BASELINE, BEST) if nfe <= 20 else (BEST, TEACHER[0]):
            cells = [_summary(groups[name], method, nfe) for name in sets]
            if any(cells):
                lines.append([nfe, bold(method), *cells])
    return write_table(["calls", "method", *sets], LABELS, lines)


def _summary(groups: dict[Group, list[Row]], method: str, nfe: int) -> str:
    """A cell of the summary: the FD, and of the best stock solver its name."""
    if method != BEST:
        return written(groups[method, nfe], "fd") if (method, nfe) in groups else ""
    solvers = of_solvers(groups, nfe, "fd")
    return "{:.2f} {}".format(*min(solvers)) if {name for _, name in solvers} - {TEACHER[0]} else ""


def of_solvers(groups: dict[Group, list[Row]], nfe: int, measure: str) -> list[tuple[float, str]]:
    """Value and name of each solver at so many calls."""
    return [
        (value(rows, measure), method) for (method, calls), rows in groups.items() if is_solver(method) and calls == nfe
    ]


def calls_table(rows: list[Row]) -> str:
    """FD of every method at every number of calls."""
    groups = grouped(rows)
    counts, lines = sorted({nfe for _, nfe in groups}), []
    for method in in_order(groups):
        cells = [written(groups[method, nfe], "fd") if (method, nfe) in groups else "" for nfe in counts]
        lines.append([bold(method), *cells])
    return write_table(["method", *map(str, counts)], LABELS, lines)


def measures_table(rows: list[Row]) -> str:
    """Every measure, and what the training cost, at some numbers of calls."""
    measures = [measure for measure in MEASURES if all(measure in row for row in rows)]
    groups, lines = grouped(rows), []
    for (method, nfe), of_group in sorted(groups.items(), key=lambda item: (item[0][1], value(item[1], "fd"))):
        if nfe not in SHOWN_CALLS:
            continue
        cells = [*(written(of_group, measure) for measure in measures), of_group[0]["num_samples"]]
        costs = ["", ""]
        if of_group[0]["train_seconds"] is not None:
            counted = [row for row in of_group if row["train_calls"] is not None]
            calls = f"{value(counted, 'train_calls') / 1e6:.2f} M" if counted else ""
            costs = [f"{value(of_group, 'train_seconds'):.0f}", calls]
        lines.append([nfe, bold(method), *cells, *costs])
    heads = [*(MEASURES[measure][0] for measure in measures), "images", "training s", "calls of training"]
    return write_table(["calls", "method", *heads], LABELS, lines)


def bold(method: str) -> str:
    return f"**{method}**" if is_ours(method) else method


Claim = tuple[str, int, str, Callable[[dict[Group, list[Row]]], float | None]]


def best_solver(nfe: int) -> Callable[[dict[Group, list[Row]]], float | None]:
    """The lowest FD among the solvers at so many calls."""
    return lambda groups: min((number for number, _ in of_solvers(groups, nfe, "fd")), default=None)


def row_of(method: str, nfe: int, factor: float = 1.0) -> Callable[[dict[Group, list[Row]]], float | None]:
    """The FD of one row, times a factor."""
    return lambda groups: factor * value(groups[method, nfe], "fd") if (method, nfe) in groups else None


# What is asked of our samplers: the words, our calls, the measure, and what it is held against. Solvers count at equal
# calls only: their rows are on diffusers' default grids, and on better grids solvers of more calls than ours are ahead.
CLAIMS: list[Claim] = [
    *((f"{BEST} at {nfe}", nfe, "fd", best_solver(nfe)) for nfe in (1, 2, 4, 5)),
    ("DDPM at 100", 4, "fd", row_of(*TEACHER)),
    *((f"{BASELINE} at {nfe}", nfe, "fd", row_of(BASELINE, nfe)) for nfe in (1, 2, 4)),
    ("0.1", 1, "teacher_tv", lambda _: 0.1),
    ("1.2 times DDPM at 1000", 1, "fd", row_of("DDPM", 1000, 1.2)),
    ("DDPM at 1000", 4, "fd", row_of("DDPM", 1000)),
]


def goals_table(sets: dict[str, list[Row]]) -> str:
    """Each goal, for each set and each of our samplers that has the number of calls."""
    lines = []
    for name, rows in sets.items():
        groups = grouped(rows)
        for words, nfe, measure, find in CLAIMS:
            held = find(groups)
            for method in filter(is_fast, in_order(groups)):
                ours = groups.get((method, nfe), [])
                if held is not None and ours and measure in ours[0]:
                    head, form, _ = MEASURES[measure]
                    reached = "yes" if value(ours, measure) <= held else "no"
                    cells = [name, method, nfe, head, written(ours, measure), words, format(held, form), reached]
                    lines.append(cells)
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


def draw_curves(rows: list[Row], path: Path) -> None:
    """Draws FD, sliced Wasserstein distance and recall against network calls; bars are one standard deviation."""
    groups = grouped(rows)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, measure in zip(axes, ("fd", "swd", "recall"), strict=True):
        for place, method in enumerate(in_order(groups)):
            points = sorted((nfe, of_group) for (name, nfe), of_group in groups.items() if name == method)
            calls, numbers = [nfe for nfe, _ in points], [[row[measure] for row in each] for _, each in points]
            bars = [stdev(each) if len(each) > 1 else 0 for each in numbers]
            style = {"lw": 2.4, "marker": "*", "ms": 12} if is_ours(method) else {"lw": 1.2, "marker": "o", "ms": 4}
            axis.errorbar(calls, [*map(mean, numbers)], bars, label=method, color=f"C{place % 10}", capsize=3, **style)
        axis.set(xscale="log", xlabel="network calls", yscale="linear" if measure == "recall" else "log")
        for line in [axis.xaxis] if measure == "recall" else [axis.xaxis, axis.yaxis]:
            line.set_major_locator(LogLocator(subs=(1, 2, 5)))
            line.set_major_formatter("{x:g}")
            line.set_minor_locator(NullLocator())
        axis.set_ylabel(f"{MEASURES[measure][0]}, {'higher' if MEASURES[measure][2] else 'lower'} is better")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_classes(rows: list[Row], path: Path) -> None:
    """Draws the share of each class for the teacher and what was distilled, by bars, and for the data, by dashes."""
    groups = {
        group: of_group
        for group, of_group in sorted(grouped(rows).items(), key=lambda item: (is_ours(item[0][0]), item[0]))
        if not is_solver(group[0]) or group in (TEACHER, ("UniPC", 10))
    } or grouped(rows)
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    style = {"figsize": (3.5 * columns, 2 * lines), "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, **style)
    for axis in axes.flat:
        axis.axis("off")
    for axis, ((method, nfe), of_group) in zip(axes.flat, groups.items(), strict=False):
        shares = [mean(each) for each in zip(*(row["class_shares"] for row in of_group), strict=True)]
        real = of_group[0]["real_class_shares"]
        axis.axis("on")
        axis.bar(range(len(shares)), shares, color="#d62728" if is_ours(method) else "#7f7f7f")
        axis.plot(range(len(real)), real, color="black", ls="", marker="_", ms=12)
        axis.set_title(f"{method} at {nfe}", fontsize=8)
        axis.set_xticks(range(len(shares)))
    figure.supxlabel("class", fontsize=9)
    figure.supylabel("share (dashes: real)", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
