"""Tables and figures of a benchmark, from its results.json.

    python -m training.benchmarks.images.benchmark_pages

fills the table of README.md by docs/benchmarks/results.json; `benchmark` does so with the page beside its results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
from PIL import Image

from hsivi_diffusers.evaluation.figures import draw_curves, draw_samples, pyplot
from hsivi_diffusers.evaluation.pages import fill_page, fill_tables, write_table
from hsivi_diffusers.runs.folders import write_text
from hsivi_diffusers.runs.measures import MEASURES, format_measure

from .benchmark_results import (
    BASELINES,
    OURS,
    POLISHED,
    REAL,
    RESULTS,
    SOLVER,
    TEACHER,
    TEACHER_SDE,
    UNGUIDED,
    Row,
    read_pictures,
    read_prompts,
    read_rows,
)
from .spaces import OF_CLASSES, OF_CLASSIFIER, OF_SCENES

Key = tuple[int, str]  # NFE and method
LINES = (REAL, TEACHER, TEACHER_SDE)  # of the figure
SOLVERS = (SOLVER, UNGUIDED, POLISHED)
ORDER = (*LINES, *SOLVERS, *BASELINES, OURS)
RIGHT, DIVERSITY = OF_SCENES
OF_NEIGHBOURS = ("precision", "recall", "density", "coverage", "nearest", "class_recall")  # of copies they tell nothing
TITLE = 10  # characters in a line of a prompt above a figure
SHOWN_SOLVERS = (1, 2, 4, 10, 20)
TO = ", compared with"  # after the name of a space
MANY_COLORS = 4096  # of a figure of colour images, not of curves


def write_pages(folder: Path, runs: Path) -> None:
    """Fills the tables of FOLDER/SET.md of each set, which is begun if there is none, and writes its figures and files.

    Images are drawn where RUNS has those of all rows, for a row that was measured elsewhere has none.
    """
    for name, rows in in_sets(read_rows(folder / RESULTS)).items():
        word = as_word(name)
        paths = {kind: folder / f"{kind}_{word}.png" for kind in ("samples", "curves", "classes")}
        if any(row["method"] not in LINES for row in rows):
            flat = [{**row, **row["distances"]} for row in sorted(rows, key=rank)]
            shown = [*([RIGHT] if RIGHT in flat[0] else []), *flat[0]["distances"]]
            labels = {each: MEASURES[each].head if each in MEASURES else f"distance, {each}" for each in shown}
            draw_curves(over_noise(flat, shown), labels, paths["curves"], lines=LINES)
            draw_classes(rows, paths["classes"])
        names = {f"{row['method']} at {row['nfe']}" for row in rows if is_shown(row["method"], row["nfe"])}
        kept = read_pictures(runs, name)
        if names and names <= kept.keys():
            prompts = read_prompts(runs, name)
            titles = prompts and [fill(prompt, TITLE) for prompt in prompts]
            draw_samples(picture_rows({each: kept[each] for each in (*names, "real")}), paths["samples"], titles)
        for path in paths.values():
            shrink(path)
        for kind, table in make_files(rows).items():
            paths[kind] = folder / f"{kind}_{word}.csv"
            write_text(paths[kind], table)
        fill_page(folder / f"{word}.md", name, make_tables(rows), [path.name for path in paths.values()])


def shrink(path: Path) -> None:
    """Writes a figure in fewer bytes: 256 colours, if it does not show colour images."""
    if path.exists():
        figure = Image.open(path).convert("RGB")
        if figure.getcolors(MANY_COLORS):
            figure = figure.quantize(256, dither=Image.Dither.NONE)
        figure.save(path, optimize=True)


def fill_glance(folder: Path, *pages: Path) -> None:
    """Fills the table of all sets in pages by FOLDER/results.json.

    Raises:
        ValueError: There are no results.
    """
    if not (rows := read_rows(folder / RESULTS)):
        raise ValueError(f"{folder / RESULTS} is missing: run the benchmark first, in the folder of the clone")
    tables = {"glance": glance_table(in_sets(rows))}
    for page in pages:
        write_text(page, fill_tables(page.read_text(encoding="utf-8"), tables))


def make_tables(rows: list[Row]) -> dict[str, str]:
    """The tables of a set, by name."""
    tables = {"summary": summary_table(rows), "floor": floor_table(rows)}
    if rows_of_noise(rows):
        tables["differences"] = differences_table(rows)
    return tables


def make_files(rows: list[Row]) -> dict[str, str]:
    """The longer tables of a set, as the text of CSV files, by name."""
    return {"measures": measures(rows).to_csv(index=False), "costs": costs(rows).to_csv(index=False)}


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


def three_digits(number: float, spread: float = float("nan")) -> str:
    """A distance as it is written, with its spread: 0.0123, 12.3 ± 0.4 or 1,230."""
    text = f"{number:.3g}" if abs(number) < 999.5 else f"{float(f'{number:.3g}'):,.0f}"
    return text if pd.isna(spread) else f"{text} ± {spread:.2g}"


def frame(rows: list[Row]) -> pd.DataFrame:
    """The rows in the order of the pages, with columns `label`, `SPACE` and `SPACE, to teacher`."""
    return pd.DataFrame(
        {
            **row,
            "label": label(row),
            **row["distances"],
            **{f"{space}, to teacher": each for space, each in row["teacher_distances"].items()},
        }
        for row in sorted(rows, key=lambda row: (row["nfe"], *rank(row)))
    )


class Distances:
    """Distances in the rows of a set: their means over the seeds, and how these are written.

    Attributes:
        spaces: Names of the spaces.
        measures: These, and of scenes `right` before them, of which the highest is best.
        noise: Whether there are several noise seeds.
        groups: Rows by NFE and method.
        means: By NFE and method, with the columns `SPACE` and `SPACE, to teacher`.
        texts: The same as text.
        keys: NFE and method of each group.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.spaces = [*rows[0]["distances"]]
        self.measures = [RIGHT, *self.spaces] if RIGHT in rows[0] else self.spaces
        self.groups = frame(rows).groupby(["nfe", "method"], sort=False)
        columns = [*self.measures, *(f"{space}, to teacher" for space in self.spaces)]
        self.means = self.groups[columns].mean()
        self.noise = rows_of_noise(rows)
        kept = self.groups[["eval_seed", "train_seed", *columns]]
        spreads = kept.apply(lambda each: spread(each, columns, self.noise))
        self.texts = pd.DataFrame({name: map(three_digits, self.means[name], spreads[name]) for name in columns})
        self.texts.index = self.means.index
        self.keys: list[Key] = [*self.means.index]

    def best(self, measure: str, *keys: Key | None) -> Key | None:
        """The key of the best value, of those that there are."""
        there = [key for key in self.keys if key in keys]
        sign = -1 if measure == RIGHT else 1
        return min(there, key=lambda key: sign * self.means.at[key, measure], default=None)

    def best_baseline(self, measure: str, nfe: int) -> Key | None:
        """The key of the best baseline."""
        return self.best(measure, *((nfe, name) for name in (UNGUIDED, POLISHED, *BASELINES)))

    def cells(self, measure: str, *named: tuple[Key | None, str]) -> list[str]:
        """The values of keys, each with words after it, the best of several in bold; empty without rows."""
        there = [key for key, _ in named if key in self.keys]
        best = self.best(measure, *there) if len(there) > 1 else None
        texts = [f"{self.texts.at[key, measure]}{words}" if key in there else "" for key, words in named]
        return [f"**{text}**" if key and key == best else text for (key, _), text in zip(named, texts, strict=True)]


def summary_table(rows: list[Row]) -> str:
    """Distances at each NFE, and of scenes the share that is right: tuned solver, the best baseline in it, and ours."""
    table, lines = Distances(rows), []
    for nfe in dict.fromkeys(nfe for nfe, method in table.keys if method in (SOLVER, OURS)):
        cells = []
        for measure in table.measures:
            best = table.best_baseline(measure, nfe)
            cells += table.cells(measure, ((nfe, SOLVER), ""), (best, _name(best)), ((nfe, OURS), ""))
        lines.append([nfe, *cells])
    heads = [f"{measure}: {word}" for measure in table.measures for word in ("tuned solver", "best baseline", OURS)]
    return write_table(["NFE", *heads], (), lines)


def glance_table(sets: dict[str, list[Row]]) -> str:
    """Of every set, at the NFE of our students, the distances in its first space: what the README shows.

    Behind ours are the solver of the lowest distance at as many NFE or fewer, of those that are best in all spaces at
    theirs, and the best baseline.
    """
    tables = {name: Distances(rows) for name, rows in sets.items()}
    shown = sorted({nfe for table in tables.values() for nfe, method in table.keys if method == OURS})
    lines = [[name, *(_glance(table, nfe) for nfe in shown)] for name, table in tables.items()]
    return write_table(["set", *(f"{nfe} NFE" for nfe in shown)], ("set",), lines)


def _glance(table: Distances, nfe: int) -> str:
    space, *_ = table.spaces
    if (nfe, OURS) not in table.keys:
        return ""
    solver = table.best(space, *(key for key in table.keys if key[1] == SOLVER and key[0] <= nfe))
    named = ((nfe, OURS), ""), (solver, ""), (table.best_baseline(space, nfe), "")
    ours, *others = (cell or "–" for cell in table.cells(space, *named))
    return f"{ours} ({', '.join(others)})"


def _name(key: Key | None) -> str:
    return f" ({key[1].split()[0]})" if key else ""


def floor_table(rows: list[Row]) -> str:
    """Distances of real images, and of the teacher's: what is good."""
    table = Distances(rows)
    lines = [
        [f"{method} at {nfe}" if nfe else method, *table.texts.loc[(nfe, method), table.measures]]
        for nfe, method in table.keys
        if method in (REAL, TEACHER, TEACHER_SDE)
    ]
    return write_table(["", *table.measures], ("",), lines)


def measures(rows: list[Row]) -> pd.DataFrame:
    """Every measure: distances to real images and to the teacher's, and those of the classifier's features."""
    table, lines = Distances(rows), []
    names = [name for name in (*OF_CLASSIFIER, *OF_CLASSES, DIVERSITY) if all(name in row for row in rows)]
    for (nfe, method), group in table.groups:
        empty = OF_NEIGHBOURS if method == REAL and DIVERSITY not in names else ()  # real scenes are new ones
        spreads = spread(group, names, table.noise)
        cells = ["" if each in empty else format_measure(each, group[each].mean(), spreads[each]) for each in names]
        lines.append([nfe or "", group.label.iloc[0].strip("*"), *table.texts.loc[(nfe, method)], *cells])
    return pd.DataFrame(lines, columns=["NFE", "method", *table.texts, *(MEASURES[each].head for each in names)])


def differences_table(rows: list[Row]) -> str:
    """Distance of ours less that of solvers of as many to twice as many NFE, paired by the noise seeds."""
    spaces, lines = Distances(rows).measures, []
    groups = frame(rows).groupby(["nfe", "method"], sort=False)
    for (nfe, method), ours in groups:
        for (calls, other), solver in groups:
            if is_ours(method) and other in SOLVERS and nfe <= calls <= 2 * nfe:
                paired = ours.merge(by_noise(solver)[spaces], on="eval_seed", suffixes=("", TO))
                for space in spaces:
                    paired[space] -= paired[space + TO]
                cells = map(three_digits, paired[spaces].mean(), spread(paired, spaces, noise=True))
                texts = [*cells] if len(paired) else [""] * len(spaces)
                lines.append([nfe, f"{ours.label.iloc[0]} - {solver.label.iloc[0]} at {calls}", *texts])
    return write_table(["NFE", "difference", *spaces], ("difference",), lines)


def rows_of_noise(rows: list[Row]) -> bool:
    """Whether rows are of several noise seeds."""
    return len({row["eval_seed"] for row in rows}) > 1


def spread(group: pd.DataFrame, names: Sequence[str], noise: bool) -> pd.Series:
    """Standard deviation over the training seeds; of a set with several noise seeds the standard error of the mean.

    Both kinds of seeds enter it: the variances of the means over the other kind, each divided by the number of seeds.
    What depends on both at once is counted twice, so it is rather too large.
    """
    trained, drawn = (group.groupby(kind, dropna=False)[[*names]].mean() for kind in ("train_seed", "eval_seed"))
    if not noise:
        return trained.std()
    variances = [each.var() / len(each) for each in (trained, drawn) if len(each) > 1]
    return sum(variances) ** 0.5 if variances else trained.std()


def over_noise(rows: list[Row], names: Sequence[str]) -> list[Row]:
    """The means over the noise seeds, in the order of the rows."""
    groups = pd.DataFrame(rows).groupby(["method", "nfe", "train_seed"], sort=False, dropna=False)
    found: list[Row] = groups[[*names]].mean().reset_index().to_dict("records")
    return found


def by_noise(group: pd.DataFrame) -> pd.DataFrame:
    """The means over the training seeds, on each noise seed."""
    return group.groupby("eval_seed").mean(numeric_only=True)


def costs(rows: list[Row]) -> pd.DataFrame:
    """What each training cost, seed by seed, and as a multiple of what ours at the same NFE cost."""
    table, lines = frame(rows).drop_duplicates(["nfe", "method", "train_seed"]), []
    ours = table[table.method == OURS].set_index(["nfe", "train_seed"])
    for (nfe, method), group in table[table.train_seconds.notna()].groupby(["nfe", "method"], sort=False):
        cells = []
        for name, unit, form in (("train_seconds", 1, ".0f"), ("train_calls", 1e6, ".2f")):
            known = group.set_index(["nfe", "train_seed"])[name].dropna()  # a run may have been killed at its end
            times = (known / ours[name].reindex(known.index)).dropna() if method in BASELINES else []
            cells.append(", ".join(format(each / unit, form) for each in known))
            cells.append(", ".join(f"{each:.2f}" for each in times))
        lines.append([nfe, group.label.iloc[0].strip("*"), *cells])
    heads = ["seconds", "seconds, times ours", "million forward passes", "forward passes, times ours"]
    return pd.DataFrame(lines, columns=["NFE", "method", *heads])


def label(row: Row) -> str:
    """The method of a row as it is written: ours in bold, a solver with its name."""
    if row["method"] in SOLVERS:
        kinds = {"guidance_end": ", falling guidance", "guidance_interval": ", guidance in an interval"}
        kind = "".join(text for name, text in kinds.items() if name in row.get("settings", {}))
        return f"{row['method']} ({row['solver']}{kind})"
    return f"**{row['method']}**" if is_ours(row["method"]) else row["method"]


def picture_rows(pictures: dict[str, Any]) -> list[tuple[str, Any]]:
    """Labelled rows of one figure: the teacher and its solvers, the baselines, ours, real images."""

    def place(name: str) -> tuple[int, str, int]:
        method, _, nfe = name.partition(" at ")
        return *rank({"method": method}), int(nfe)

    names = [*sorted((name for name in pictures if name != "real"), key=place), "real"]
    return [(name, pictures[name].float() / 255) for name in names]


def draw_classes(rows: list[Row], path: Path) -> None:
    """Draws the share of each class for the teacher and what was distilled, by bars, and for the data, by dashes."""
    shown = {
        (method, nfe): group
        for (nfe, method), group in frame(rows).groupby(["nfe", "method"])
        if group.class_shares.all() and (method not in (REAL, *SOLVERS) or (method, nfe) == (SOLVER, 10))
    }
    if not shown:  # nothing of it is measured yet, or it is of scenes
        return
    plt = pyplot()
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    style = {"figsize": (3.5 * columns, 2 * lines), "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, **style)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    ordered = sorted(shown.items(), key=lambda item: (is_ours(item[0][0]), item[0]))
    for axis, ((method, nfe), group) in zip(axes.flat, ordered, strict=False):
        shares = pd.DataFrame([*group.class_shares]).mean()
        axis.bar(range(len(shares)), shares, color="#d62728" if is_ours(method) else "#7f7f7f")
        axis.plot(range(len(shares)), group.real_class_shares.iloc[0], color="black", ls="", marker="_", ms=12)
        axis.set_title(f"{method} at {nfe}", fontsize=8)
        axis.set_xticks(range(len(shares)))
    figure.supxlabel("class", fontsize=9)
    figure.supylabel("share (dashes: real)", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    fill_glance(Path("docs/benchmarks"), Path("README.md"), Path("docs/benchmarks/index.md"))
