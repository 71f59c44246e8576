"""The tables of a study.

A cell is the mean over seeds, with the least and the greatest in brackets if they differ by more than a quarter of it.
Fits that failed are counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pandas as pd

from hsivi_diffusers.evaluation.pages import write_table

from .study import NULLS
from .study_rows import (
    BRIDGES,
    MEASURES,
    NOT_RUN,
    NULL_LABELS,
    OBJECTIVES,
    PLANE,
    POSTERIORS,
    SIGNATURES,
    TRAINING,
    along,
    fits_of,
    select,
    values_of,
)

PLANE_MEASURES = ("js", "swd", "modes_found", "mode_tv")
LABELS = ("objective", "bridge", "training", "target", "findings", "measure", "whitening", "sign", "A, B", "no fit")
POSTERIOR_MEASURES = ("mean_error", "covariance_error")
SPREAD = 0.25  # share of the mean


def _table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    return write_table(heads, LABELS, lines) if lines else NOT_RUN


def _lines(
    rows: pd.DataFrame, axes: Mapping[str, Sequence[Any]], cells: Callable[[pd.DataFrame], list[str]]
) -> list[list[object]]:
    """Values of the axes, then cells, for all combinations of which there are rows."""
    groups = dict(list(rows.groupby(list(axes))))
    return [[*values, *cells(groups[values])] for values in product(*axes.values()) if values in groups]


# Cells


def _number(value: float) -> str:
    """Three significant digits, the zeros at the end as well."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.2e}" if decimals > 6 else f"{value:,.{max(0, decimals)}f}"


def _count(value: float) -> str:
    """A number that is whole for each seed."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def mean_cell(rows: pd.DataFrame, key: str, failures: bool = True) -> str:
    """A cell: mean (least..greatest) if the seeds differ much, else the mean, and how many failed."""
    number = _count if key == "modes_found" else _number
    values, failed = rows[key].dropna(), rows["failed"].count()
    parts = [number(values.mean())] if len(values) else []
    if len(values) and values.max() - values.min() > SPREAD * values.mean():
        parts = [f"{parts[0]} ({number(values.min())}..{number(values.max())})"]
    if failed and failures:
        parts.append(f"{failed} of {len(rows)} failed")
    return ", ".join(parts) or "–"


def sd_ratios_cell(rows: pd.DataFrame) -> str:
    """A cell: the least and the greatest ratio of any seed."""
    low, high = rows["sd_ratio_min"].min(), rows["sd_ratio_max"].max()
    return "–" if math.isnan(low) else f"{_number(low)}..{_number(high)}"


def _nulls(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Label and rows of each thing that fits are compared with, the floor first."""
    for method in NULLS:
        if len(here := select(rows, method=method)):
            yield NULL_LABELS[method], here


def _over(layers: Sequence[int]) -> list[str]:
    return [f"T = {T}" for T in layers]


# Tables of the plane


def _plane_grid(target: str, rows: pd.DataFrame) -> str:
    """Objective, bridge and training by number of layers."""
    fits = fits_of(rows, study="plane", target=target)
    layers = values_of(fits, "T")
    lines = []
    for objective, bridge, training in product(OBJECTIVES, BRIDGES, TRAINING):
        line = along(fits, objective, bridge=bridge, training=training)
        lines.append([objective, bridge, training, *(mean_cell(select(line, T=T), "js") for T in layers)])
    return _table(["objective", "bridge", "training", *_over(layers)], lines if len(fits) else [])


def _plane_table(target: str, rows: pd.DataFrame) -> str:
    """What there is to hold JS against, then JS."""
    nulls = list(_nulls(select(rows, study="plane", target=target)))
    grid = _plane_grid(target, rows)
    if not nulls:
        return grid
    keys = ("js", "swd", "ksd", "modes_found", "mode_tv", "mode_max_error")
    lines = [[label, *(mean_cell(here, key) for key in keys)] for label, here in nulls]
    first = write_table(["no fit", *(MEASURES[key] for key in keys)], LABELS, lines)
    return f"{first}\n\nJS of the fits:\n\n{grid}"


def _shapes_table(rows: pd.DataFrame) -> str:
    here = select(rows, study="shapes")
    targets = [target for target in PLANE if target in values_of(here, "target")]
    if not targets:
        return NOT_RUN

    def cells(some: pd.DataFrame) -> list[str]:
        return [mean_cell(select(some, target=target), "js") for target in targets]

    lines = [[label, "", "", "", *cells(some)] for label, some in _nulls(here)]
    for objective in OBJECTIVES:
        lines.append([objective, "–", "–", "1", *cells(fits_of(here, objective=objective, T=1))])
    deep = [number for number in values_of(here, "T") if number > 1]
    for number, objective, bridge, training in product(deep, OBJECTIVES, BRIDGES, TRAINING):
        some = fits_of(here, objective=objective, bridge=bridge, training=training, T=number)
        lines.append([objective, bridge, training, str(number), *cells(some)])
    return write_table(["objective", "bridge", "training", "T", *targets], LABELS, lines)


def _size_table(rows: pd.DataFrame) -> str:
    fits = fits_of(rows, study="size")
    sizes = values_of(fits, "parameters_wanted")
    axes = {"objective": OBJECTIVES, "T": values_of(fits, "T"), "depth": values_of(fits, "depth")}
    lines = _lines(fits, axes, lambda some: [mean_cell(select(some, parameters_wanted=size), "js") for size in sizes])
    return _table(["objective", "T", "depth", *(f"{size:,} parameters" for size in sizes)], lines)


# Tables of the posteriors

_POSTERIOR_HEADS = ("mean error", "sd ratios", "covariance error")


def _posterior_cells(rows: pd.DataFrame) -> list[str]:
    return [mean_cell(rows, "mean_error"), sd_ratios_cell(rows), mean_cell(rows, "covariance_error", failures=False)]


def _posterior_table(target: str, rows: pd.DataFrame) -> str:
    here = select(rows, study="posteriors", target=target)
    lines = [[label, "", "", *_posterior_cells(some), "–"] for label, some in _nulls(here)]
    for objective, number in product(OBJECTIVES, values_of(here, "T")):
        for training in ("–",) if number == 1 else TRAINING:
            some = fits_of(here, objective=objective, T=number, training=TRAINING if number == 1 else training)
            if len(some):
                cells = [*_posterior_cells(some), mean_cell(some, "seconds", failures=False)]
                lines.append([objective, training, str(number), *cells])
    return _table(["objective", "training", "T", *_POSTERIOR_HEADS, "seconds"], lines)


def _whitening_table(rows: pd.DataFrame) -> str:
    """Those with moments are of the study of the posteriors."""
    layers = tuple(values_of(fits_of(rows, study="whitening"), "T"))
    moments = fits_of(rows, study="posteriors", whitening="moments", training="sequential", T=layers)
    fits = pd.concat([fits_of(rows, study="whitening"), moments])
    axes = {"target": POSTERIORS, "objective": OBJECTIVES, "T": layers, "whitening": ("none", "laplace", "moments")}
    return _table([*axes, *_POSTERIOR_HEADS], _lines(fits, axes, _posterior_cells))


def _every_fit(study: str, measures: Sequence[str], rows: pd.DataFrame) -> str:
    """One line a fit."""
    order = ["target", "objective", "bridge", "training", "T", "seed"]
    fits = fits_of(rows, study=study).sort_values(order)
    wide = bool(fits["sd_ratio_min"].notna().any())
    lines = []
    for number, row in fits.iterrows():
        alone = fits.loc[[number]]
        last = ", ".join(row["findings"]) or "–" if pd.isna(row["failed"]) else f"failed: {row['failed']}"
        cells = [mean_cell(alone, key, failures=False) for key in measures]
        ratios = [sd_ratios_cell(alone)] if wide else []
        cost = mean_cell(alone, "seconds", failures=False)
        lines.append([*row[order], " ".join(last.replace("|", "/").split()), *cells, *ratios, cost])
    heads = [*(MEASURES[key] for key in measures), *(["sd ratios"] if wide else []), "seconds"]
    return _table([*order, "findings", *heads], lines)


# What is better


def _summary_table(rows: pd.DataFrame) -> str:
    """The errors of all layers trained together: JS on the diffusion bridge, of posteriors the mean error."""
    columns: list[tuple[str, dict[str, str], str]] = [
        (target, {"study": "plane", "bridge": "diffusion"}, "js") for target in PLANE
    ]
    columns += [(target, {"study": "posteriors", "bridge": "geometric"}, "mean_error") for target in POSTERIORS]
    columns = [each for each in columns if len(select(rows, study=each[1]["study"], target=each[0]))]

    def line(objective: str | None, number: int) -> list[str]:
        cells = []
        for target, at, key in columns:
            here = select(rows, study=at["study"], target=target)
            deep = {"bridge": at["bridge"], "training": "joint"}
            fits = select(along(fits_of(here), objective, **deep), T=number) if objective else None
            cells.append(mean_cell(select(here, method="exact") if fits is None else fits, key))
        return cells

    counts = [number for number in values_of(fits_of(rows, study=("plane", "posteriors")), "T") if number in (1, 3, 5)]
    lines = [[objective, number, *line(objective, number)] for objective in OBJECTIVES for number in counts]
    heads = [f"{target}, {MEASURES[key]}" for target, _, key in columns]
    return _table(["objective", "T", *heads], [["exact, the floor", "", *line(None, 0)], *lines] if counts else [])


_SAME = ["study", "target", "T", "objective", "bridge", "training", "seed", "whitening", "parameters_wanted", "depth"]


def pair_up(rows: pd.DataFrame, axis: str, first: str, second: str) -> pd.DataFrame:
    """Pairs of rows that differ in one axis alone; steps and rates may go with the objective."""
    one, other = (select(rows, **{axis: value}) for value in (first, second))
    return one.merge(other, on=[key for key in _SAME if key != axis], suffixes=(" A", " B"))


def _compare(rows: pd.DataFrame, axis: str, first: str, second: str, measure: str) -> list[str]:
    pairs = pair_up(rows, axis, first, second)
    if not len(pairs):
        return []
    both = pairs[pairs["failed A"].isna() & pairs["failed B"].isna()]
    failed = f"{pairs['failed A'].count()}, {pairs['failed B'].count()}"
    head = [f"{first}, {second}", MEASURES[measure], str(len(both))]
    if not len(both):
        return [*head, *(["–"] * 5), failed]
    one, other = both[f"{measure} A"], both[f"{measure} B"]
    numbers = (one.mean(), other.mean(), (other - one).mean(), (other / one).median())
    better = int((other < one).sum())
    return [*head, *map(_number, numbers), f"{better} ({100 * better / len(both):.0f} %)", failed]


def _winners_table(rows: pd.DataFrame) -> str:
    """Pairs of fits that differ in one thing."""
    plane, posteriors = fits_of(rows, study=("plane", "shapes")), fits_of(rows, study="posteriors")
    deep, deep_posteriors = (some[some["T"] > 1] for some in (plane, posteriors))
    lines = [_compare(deep, "bridge", *BRIDGES, "js"), _compare(deep, "training", *TRAINING, "js")]
    lines += [_compare(deep_posteriors, "training", *TRAINING, key) for key in ("mean_error", "covariance_error")]
    for first, second in (("LB", "SM"), ("LB", "KL"), ("SM", "KL")):
        lines.append(_compare(plane, "objective", first, second, "js"))
        for key in ("mean_error", "covariance_error"):
            lines.append(_compare(posteriors, "objective", first, second, key))
    lines = [line for line in lines if line]
    if not lines:
        return NOT_RUN
    heads = ["pairs", "mean A", "mean B", "mean of B - A", "median of B / A", "B is better", "failed A, B"]
    return write_table(["A, B", "measure", *heads], LABELS, lines)


def _findings_table(rows: pd.DataFrame) -> str:
    """How often each sign was seen where there is something to see, and where there is nothing."""
    fits = fits_of(rows)
    failed, fits = fits["failed"].count(), fits[fits["findings"].notna()]
    all_modes = rows.groupby("target")["modes_found"].max()
    loses = (fits["mode_tv"] > 0.2) | (fits["modes_found"] < fits["target"].map(all_modes))
    groups = {
        "JS > 0.1": fits["js"] > 0.1,
        "mode TV > 0.2 or a mode lost": loses,
        "JS < 0.05, no mode lost": (fits["js"] < 0.05) & ~loses,
        "an sd ratio < 0.8": fits["sd_ratio_min"] < 0.8,
        "sd ratios in 0.9..1.1": (fits["sd_ratio_min"] > 0.9) & (fits["sd_ratio_max"] < 1.1),
    }
    lines = []
    for name in (*SIGNATURES, "any of them"):
        wanted = set(SIGNATURES) if name not in SIGNATURES else {name}
        seen = fits["findings"].map(lambda found, wanted=wanted: bool(wanted & set(found))).astype(bool)
        cells = (f"{(seen & here).sum()} of {here.sum()}" if here.any() else "–" for here in groups.values())
        lines.append([name.replace("_", " "), *cells])
    note = f"\n\nNot counted: {failed} fits that failed." if failed else ""
    return write_table(["sign", *groups], LABELS, lines) + note if len(fits) else NOT_RUN


TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "summary": _summary_table,
    "checkerboard": partial(_plane_table, "checkerboard"),
    "ring": partial(_plane_table, "ring"),
    "shapes": _shapes_table,
    **{target: partial(_posterior_table, target) for target in POSTERIORS},
    "whitening": _whitening_table,
    "size": _size_table,
    "long": partial(_every_fit, "long", PLANE_MEASURES),
    "board": partial(_every_fit, "board", PLANE_MEASURES),
    "long_posteriors": partial(_every_fit, "long_posteriors", POSTERIOR_MEASURES),
    "winners": _winners_table,
    "findings": _findings_table,
}
