"""The tables of a study.

A cell is the mean over seeds, with the least and the greatest in brackets if they differ by more than a quarter of it.
Fits that failed are counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from statistics import fmean, median
from typing import Any

from hsivi_diffusers.evaluation.pages import write_table

from .study import NULLS, Row
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
    Rows,
    along,
    fits_of,
    measured,
    select,
    values_of,
)

PLANE_MEASURES = ("js", "swd", "modes_found", "mode_tv")
LABELS = ("objective", "bridge", "training", "target", "findings", "measure", "whitening", "sign", "A, B", "no fit")
POSTERIOR_MEASURES = ("mean_error", "covariance_error")
SPREAD = 0.25  # share of the mean


def _table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    return write_table(heads, LABELS, lines) if lines else NOT_RUN


def _lines(rows: Rows, axes: Mapping[str, Sequence[Any]], cells: Callable[[Rows], list[str]]) -> list[list[object]]:
    """Values of the axes, then cells, for all combinations of which there are rows."""
    found = [(values, select(rows, **dict(zip(axes, values, strict=True)))) for values in product(*axes.values())]
    return [[*values, *cells(some)] for values, some in found if some]


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


def _mean(rows: Rows, key: str, number: Callable[[float], str] = _number, failures: bool = True) -> str:
    """A cell: mean (least..greatest) if the seeds differ much, else the mean, and how many failed."""
    values = [row[key] for row in measured(rows) if key in row]
    parts = [number(fmean(values))] if values else []
    if values and max(values) - min(values) > SPREAD * fmean(values):
        parts = [f"{parts[0]} ({number(min(values))}..{number(max(values))})"]
    failed = len(rows) - len(measured(rows))
    if failed and failures:
        parts.append(f"{failed} of {len(rows)} failed")
    return ", ".join(parts) or "–"


def _sd_ratios(rows: Rows) -> str:
    """A cell: the least and the greatest ratio of any seed."""
    done = [row for row in measured(rows) if "sd_ratio_min" in row]
    if not done:
        return "–"
    low, high = min(row["sd_ratio_min"] for row in done), max(row["sd_ratio_max"] for row in done)
    return f"{_number(low)}..{_number(high)}"


def _nulls(rows: Rows) -> Iterator[tuple[str, list[Row]]]:
    """Label and rows of each thing that fits are held against, the floor first."""
    for method in NULLS:
        if here := select(rows, method=method):
            yield NULL_LABELS[method], here


def _over(layers: Sequence[int]) -> list[str]:
    return [f"T = {T}" for T in layers]


def _measure(rows: Rows, key: str, failures: bool = True) -> str:
    return _mean(rows, key, _count if key == "modes_found" else _number, failures)


# Tables of the plane


def _plane_grid(target: str, cell: Callable[[Rows], str], rows: Rows) -> str:
    """Objective, bridge and training by number of layers."""
    fits = fits_of(rows, study="plane", target=target)
    layers = values_of(fits, "T")
    lines = []
    for objective, bridge, training in product(OBJECTIVES, BRIDGES, TRAINING):
        line = along(fits, objective, bridge=bridge, training=training)
        lines.append([objective, bridge, training, *(cell(select(line, T=T)) for T in layers)])
    return _table(["objective", "bridge", "training", *_over(layers)], lines if fits else [])


def _plane_table(target: str, rows: Rows) -> str:
    """What there is to hold JS against, then JS."""
    nulls = list(_nulls(select(rows, study="plane", target=target)))
    grid = _plane_grid(target, partial(_mean, key="js"), rows)
    if not nulls:
        return grid
    keys = ("js", "swd", "ksd", "modes_found", "mode_tv", "mode_max_error")
    lines = [[label, *(_measure(here, key) for key in keys)] for label, here in nulls]
    first = write_table(["no fit", *(MEASURES[key] for key in keys)], LABELS, lines)
    return f"{first}\n\nJS of the fits:\n\n{grid}"


def _shapes_table(rows: Rows) -> str:
    here = select(rows, study="shapes")
    targets = [target for target in PLANE if select(here, target=target)]
    if not targets:
        return NOT_RUN

    def cells(some: Rows) -> list[str]:
        return [_mean(select(some, target=target), "js") for target in targets]

    lines = [[label, "", "", "", *cells(some)] for label, some in _nulls(here)]
    for objective in OBJECTIVES:
        lines.append([objective, "–", "–", "1", *cells(fits_of(here, objective=objective, T=1))])
    deep = [number for number in values_of(here, "T") if number > 1]
    for number, objective, bridge, training in product(deep, OBJECTIVES, BRIDGES, TRAINING):
        some = fits_of(here, objective=objective, bridge=bridge, training=training, T=number)
        lines.append([objective, bridge, training, str(number), *cells(some)])
    return write_table(["objective", "bridge", "training", "T", *targets], LABELS, lines)


def _size_table(rows: Rows) -> str:
    fits = fits_of(rows, study="size")
    sizes = values_of(fits, "parameters_wanted")
    axes = {"objective": OBJECTIVES, "T": values_of(fits, "T"), "depth": values_of(fits, "depth")}
    lines = _lines(fits, axes, lambda some: [_mean(select(some, parameters_wanted=size), "js") for size in sizes])
    return _table(["objective", "T", "depth", *(f"{size:,} parameters" for size in sizes)], lines)


# Tables of the posteriors

_POSTERIOR_HEADS = ("mean error", "sd ratios", "covariance error")


def _posterior_cells(rows: Rows) -> list[str]:
    return [_mean(rows, "mean_error"), _sd_ratios(rows), _mean(rows, "covariance_error", failures=False)]


def _posterior_table(target: str, rows: Rows) -> str:
    here = select(rows, study="posteriors", target=target)
    lines = [[label, "", "", *_posterior_cells(some), "–"] for label, some in _nulls(here)]
    for objective, number in product(OBJECTIVES, values_of(here, "T")):
        for training in ("–",) if number == 1 else TRAINING:
            some = fits_of(here, objective=objective, T=number, training=TRAINING if number == 1 else training)
            if some:
                cells = [*_posterior_cells(some), _mean(some, "seconds", failures=False)]
                lines.append([objective, training, str(number), *cells])
    return _table(["objective", "training", "T", *_POSTERIOR_HEADS, "seconds"], lines)


def _whitening_table(rows: Rows) -> str:
    """Those with moments are of the study of the posteriors."""
    layers = tuple(values_of(fits_of(rows, study="whitening"), "T"))
    moments = fits_of(rows, study="posteriors", whitening="moments", training="sequential", T=layers)
    fits = [*fits_of(rows, study="whitening"), *moments]
    axes = {"target": POSTERIORS, "objective": OBJECTIVES, "T": layers, "whitening": ("none", "laplace", "moments")}
    return _table([*axes, *_POSTERIOR_HEADS], _lines(fits, axes, _posterior_cells))


def _every_fit(study: str, measures: Sequence[str], rows: Rows) -> str:
    """One line a fit."""
    order = ("target", "objective", "bridge", "training", "T", "seed")
    fits = sorted(fits_of(rows, study=study), key=lambda row: [row[key] for key in order])
    wide = any("sd_ratio_min" in row for row in fits)
    lines = []
    for row in fits:
        cells = [_measure([row], key, failures=False) for key in measures]
        ratios = [_sd_ratios([row])] if wide else []
        last = f"failed: {row['failed']}" if "failed" in row else ", ".join(row["findings"]) or "–"
        cost = _mean([row], "seconds", failures=False)
        names = [row[key] for key in order]
        lines.append([*names, " ".join(last.replace("|", "/").split()), *cells, *ratios, cost])
    heads = [*(MEASURES[key] for key in measures), *(["sd ratios"] if wide else []), "seconds"]
    return _table([*order, "findings", *heads], lines)


# What is better

_SAME = ["study", "target", "T", "objective", "bridge", "training", "seed", "whitening", "parameters_wanted", "depth"]


def pair_up(rows: Rows, axis: str, first: str, second: str) -> list[tuple[Row, Row]]:
    """Returns the pairs of rows that differ in one axis alone; steps and rates may go with the objective."""

    def others(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in _SAME if key != axis)

    places = {others(row): row for row in select(rows, **{axis: second})}
    return [(row, places[others(row)]) for row in select(rows, **{axis: first}) if others(row) in places]


def _compare(rows: Rows, axis: str, first: str, second: str, measure: str) -> list[str]:
    pairs = pair_up(rows, axis, first, second)
    if not pairs:
        return []
    both = [(one[measure], other[measure]) for one, other in pairs if len(measured([one, other])) == 2]
    failed = ", ".join(str(len(pairs) - len(measured([pair[side] for pair in pairs]))) for side in (0, 1))
    head = [f"{first}, {second}", MEASURES[measure], str(len(both))]
    if not both:
        return [*head, *(["–"] * 5), failed]
    means = [_number(fmean(pair[side] for pair in both)) for side in (0, 1)]
    difference = _number(fmean(other - one for one, other in both))
    ratio = _number(median(other / one if one else math.inf for one, other in both))
    better = sum(other < one for one, other in both)
    return [*head, *means, difference, ratio, f"{better} ({100 * better / len(both):.0f} %)", failed]


def _winners_table(rows: Rows) -> str:
    """Pairs of fits that differ in one thing."""
    plane, posteriors = fits_of(rows, study=("plane", "shapes")), fits_of(rows, study="posteriors")
    deep, deep_posteriors = ([row for row in some if row["T"] > 1] for some in (plane, posteriors))
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


def _findings_table(rows: Rows) -> str:
    """How often each sign was seen where there is something to see, and where there is nothing."""
    fits = [row for row in measured(fits_of(rows)) if "findings" in row]
    all_modes = {row["target"]: _modes_found(row) for row in sorted(measured(rows), key=_modes_found)}
    plane, posteriors = [row for row in fits if "js" in row], [row for row in fits if "sd_ratio_min" in row]

    def loses(row: Row) -> bool:
        return bool(row.get("mode_tv", 0) > 0.2 or _modes_found(row) < all_modes[row["target"]])

    groups = {
        "JS > 0.1": [row for row in plane if row["js"] > 0.1],
        "mode TV > 0.2 or a mode lost": [row for row in plane if "mode_tv" in row and loses(row)],
        "JS < 0.05, no mode lost": [row for row in plane if row["js"] < 0.05 and not ("mode_tv" in row and loses(row))],
        "an sd ratio < 0.8": [row for row in posteriors if row["sd_ratio_min"] < 0.8],
        "sd ratios in 0.9..1.1": [row for row in posteriors if row["sd_ratio_min"] > 0.9 and row["sd_ratio_max"] < 1.1],
    }
    lines = []
    for name in (*SIGNATURES, "any of them"):
        wanted = set(SIGNATURES) if name not in SIGNATURES else {name}
        counts = [(sum(bool(wanted & set(row["findings"])) for row in some), len(some)) for some in groups.values()]
        lines.append([name.replace("_", " "), *(f"{seen} of {number}" if number else "–" for seen, number in counts)])
    failed = len(fits_of(rows)) - len(measured(fits_of(rows)))
    note = f"\n\nNot counted: {failed} fits that failed." if failed else ""
    return write_table(["sign", *groups], LABELS, lines) + note if fits else NOT_RUN


def _modes_found(row: Row) -> float:
    return float(row.get("modes_found", 0))


TABLES: dict[str, Callable[[Rows], str]] = {
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
