"""The pages of a study: tables and figures made from its results, and pictures of single fits.

A cell is the mean over seeds, with the least and the greatest in brackets where there are several. Fits that failed are
counted beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmark_targets import make_target
from folders import write_text
from hsivi_diffusers.vi import DiffusionBridge, GeometricBridge
from hsivi_diffusers.vi.targets import SampledTarget
from study import NULLS, Row
from target_fit import Fit, Fitted, run

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

Rows = Sequence[Row]
NOT_RUN = "Not run yet."
OBJECTIVES, BRIDGES, TRAINING = ("LB", "SM", "KL"), ("geometric", "diffusion"), ("sequential", "joint")
PLANE = ("checkerboard", "ring", "swiss_roll", "circles", "banana", "cross")
POSTERIORS = ("rare_events", "logistic_regression", "conditioned_diffusion")
SIGNATURES = ("variance_collapse", "under_dispersed", "critic_lag", "lost_modes")
NULL_LABELS = {
    "exact": "exact, the floor",
    "untrained": "untrained",
    "laplace": "Laplace",
    "gaussian": "Gaussian of the same moments",
}
MEASURES = {
    "js": "JS",
    "swd": "SWD",
    "mmd": "MMD²",
    "ksd": "KSD",
    "modes_found": "modes",
    "mode_tv": "mode TV",
    "mode_max_error": "mode max error",
    "mean_error": "mean error",
    "mean_error_rms": "mean error, rms",
    "covariance_error": "covariance error",
}
PLANE_MEASURES = ("js", "swd", "mmd", "ksd", "modes_found", "mode_tv", "mode_max_error")
POSTERIOR_MEASURES = ("mean_error", "mean_error_rms", "covariance_error", "swd", "mmd", "ksd")
COLOURS = {"LB": "#d62728", "SM": "#1f77b4", "KL": "#2ca02c"}
DASHES = {"sequential": "-", "joint": "--"}
# Targets, bridges and training of the pictures of marginals; of the gallery, the targets are those of PLANE.
PICTURES = tuple((target, bridge, "sequential") for target in ("checkerboard", "ring") for bridge in BRIDGES)
BASE_STD = {"ring": 4.0}


def write_pages(folder: Path) -> None:
    """Makes the figures of a folder's results.json, and the tables of its index.md, between their markers.

    A page that does not exist is begun, with all tables and figures.

    Raises:
        ValueError: There are no results, or the page has a marker of an unknown name, or one without an end.
    """
    path, page = folder / "results.json", folder / "index.md"
    if not path.exists():
        raise ValueError(f"{path} is missing: do a study first, with --study")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    tables = {name: make(rows) for name, make in TABLES.items()}
    text = _fill(page.read_text(encoding="utf-8") if page.exists() else _new_page(folder), tables)
    for name, draw in FIGURES.items():
        _save(draw(rows), folder / name)
    write_text(page, text)


def _fill(text: str, tables: dict[str, str]) -> str:
    """Replaces what is between the markers by the tables."""
    names = re.findall(r"<!-- table: (.*?) -->", text)
    for name in names:
        if name not in tables:
            raise ValueError(f"there is no table {name!r}: there are {', '.join(tables)}")
    filled, count = re.subn(
        r"<!-- table: (\w+) -->\n(?:(?!<!-- table: ).)*?<!-- end of table -->",
        lambda found: f"<!-- table: {found[1]} -->\n\n{tables[found[1]]}\n\n<!-- end of table -->",
        text,
        flags=re.DOTALL,
    )
    if count != len(names):
        raise ValueError(f"{len(names)} tables begin and {count} end: close each by <!-- end of table -->")
    return filled


def _new_page(folder: Path) -> str:
    figures = dict.fromkeys([*FIGURES, *sorted(path.name for path in folder.glob("*.png"))])
    tables = [f"## {name.replace('_', ' ')}\n\n<!-- table: {name} -->\n<!-- end of table -->\n" for name in TABLES]
    return "\n".join(["# Results\n", *tables, *(f"![{Path(name).stem}]({name})\n" for name in figures)])


# Rows and cells


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Returns the rows with the given values, where a tuple is a choice of them."""
    choices = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
    return [row for row in rows if all(row.get(name) in choice for name, choice in choices.items())]


def _fits(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in select(rows, **wanted) if row["method"] not in NULLS]


def _values(rows: Iterable[Row], name: str) -> list[Any]:
    """Values of an axis that occur, in order."""
    return sorted({row[name] for row in rows if row[name] is not None})


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "failed" not in row]


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


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _mean(rows: Rows, key: str, number: Callable[[float], str] = _number, failures: bool = True) -> str:
    """A cell: mean (least..greatest), and how many failed."""
    values = [row[key] for row in _measured(rows) if key in row]
    parts = [number(fmean(values))] if values else []
    if len(values) > 1 and number(min(values)) != number(max(values)):
        parts = [f"{parts[0]} ({number(min(values))}..{number(max(values))})"]
    failed = len(rows) - len(_measured(rows))
    if failed and failures:
        parts.append(f"{failed} of {len(rows)} failed")
    return ", ".join(parts) or "–"


def _sd_ratios(rows: Rows) -> str:
    """A cell: the least and the greatest ratio of any seed."""
    done = [row for row in _measured(rows) if "sd_ratio_min" in row]
    if not done:
        return "–"
    low, high = min(row["sd_ratio_min"] for row in done), max(row["sd_ratio_max"] for row in done)
    return f"{_number(low)}..{_number(high)}"


def _table(labels: Sequence[str], numbers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = [*("---:" if name in ("T", "depth", "seed") else "---" for name in labels), *(["---:"] * len(numbers))]
    heading = ["| " + " | ".join([*labels, *numbers]) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join([*heading, *("| " + " | ".join(line) + " |" for line in lines)])


def _nulls(rows: Rows) -> Iterator[tuple[str, list[Row]]]:
    """Label and rows of each thing that fits are held against, the floor first."""
    for method in NULLS:
        if here := select(rows, method=method):
            yield NULL_LABELS[method], here


# Tables of the plane


def _modes(rows: Rows) -> str:
    found = _mean(rows, "modes_found", _count, failures=False)
    return f"{_mean(rows, 'mode_tv')}; {found}" if _measured(rows) else _mean(rows, "mode_tv")


def _plane_grid(target: str, cell: Callable[[Rows], str], rows: Rows) -> str:
    """Objective, bridge and training by number of layers; one layer is the same for all bridges and training."""
    fits = _fits(rows, study="plane", target=target)
    layers = _values(fits, "T")
    lines = []
    for objective, bridge, training in product(OBJECTIVES, BRIDGES, TRAINING):
        of_objective = select(fits, objective=objective)
        deep = select(of_objective, bridge=bridge, training=training)
        cells = [cell(select(of_objective if T == 1 else deep, T=T)) for T in layers]
        lines.append([objective, bridge, training, *cells])
    return _table(["objective", "bridge", "training"], [f"T = {T}" for T in layers], lines) if fits else NOT_RUN


def _plane_table(target: str, rows: Rows) -> str:
    """What there is to hold JS against, then JS."""
    nulls = list(_nulls(select(rows, study="plane", target=target)))
    if not nulls:
        return _plane_grid(target, partial(_mean, key="js"), rows)
    keys = ("js", "swd", "ksd", "modes_found", "mode_tv", "mode_max_error")
    lines = [
        [label, *(_mean(here, key, _count if key == "modes_found" else _number) for key in keys)]
        for label, here in nulls
    ]
    first = _table(["no fit"], [MEASURES[key] for key in keys], lines)
    return f"{first}\n\nJS of the fits:\n\n{_plane_grid(target, partial(_mean, key='js'), rows)}"


def _modes_table(target: str, rows: Rows) -> str:
    grid = _plane_grid(target, _modes, rows)
    return grid if grid == NOT_RUN else f"Mode TV; modes found:\n\n{grid}"


def _costs_table(rows: Rows) -> str:
    """Over both targets, both bridges and all seeds."""
    fits = _fits(rows, study="plane")
    layers = _values(fits, "T")
    lines = []
    for objective, training in product(OBJECTIVES, TRAINING):
        line = [objective, training]
        for number in layers:
            which = TRAINING if number == 1 else training
            here = select(fits, objective=objective, T=number, training=which)
            failed = len(here) - len(_measured(here))
            cost = f"{_mean(here, 'seconds', failures=False)}; {_mean(here, 'parameters', _whole, failures=False)}"
            line.append(cost + (f", {failed} of {len(here)} failed" if failed else ""))
        lines.append(line)
    table = _table(["objective", "training"], [f"T = {T}" for T in layers], lines)
    return f"CPU seconds; parameters of the layers:\n\n{table}" if fits else NOT_RUN


def _shapes_table(rows: Rows) -> str:
    here = select(rows, study="shapes")
    targets = [target for target in PLANE if select(here, target=target)]
    if not targets:
        return NOT_RUN

    def cells(some: Rows) -> list[str]:
        return [_mean(select(some, target=target), "js") for target in targets]

    lines = [[label, "", "", "", *cells(some)] for label, some in _nulls(here)]
    for objective in OBJECTIVES:
        lines.append([objective, "–", "–", "1", *cells(_fits(here, objective=objective, T=1))])
    for number in (number for number in _values(here, "T") if number > 1):
        for objective, bridge, training in product(OBJECTIVES, BRIDGES, TRAINING):
            some = _fits(here, objective=objective, bridge=bridge, training=training, T=number)
            lines.append([objective, bridge, training, str(number), *cells(some)])
    return _table(["objective", "bridge", "training", "T"], targets, lines)


def _size_table(rows: Rows) -> str:
    fits = _fits(rows, study="size")
    sizes = _values(fits, "parameters_wanted")
    lines = []
    for objective, number, depth in product(OBJECTIVES, _values(fits, "T"), _values(fits, "depth")):
        some = select(fits, objective=objective, T=number, depth=depth)
        if some:
            cells = [_mean(select(some, parameters_wanted=size), "js") for size in sizes]
            lines.append([objective, str(number), str(depth), *cells])
    return _table(["objective", "T", "depth"], [f"{size:,} parameters" for size in sizes], lines) if fits else NOT_RUN


# Tables of the posteriors

_POSTERIOR_HEADS = ("mean error", "sd ratios", "covariance error")


def _posterior_cells(rows: Rows) -> list[str]:
    return [_mean(rows, "mean_error"), _sd_ratios(rows), _mean(rows, "covariance_error", failures=False)]


def _posterior_table(target: str, rows: Rows) -> str:
    here = select(rows, study="posteriors", target=target)
    lines = [[label, "", "", *_posterior_cells(some), "–"] for label, some in _nulls(here)]
    for objective, number in product(OBJECTIVES, _values(here, "T")):
        for training in ("–",) if number == 1 else TRAINING:
            some = _fits(here, objective=objective, T=number, training=TRAINING if number == 1 else training)
            if some:
                cells = [*_posterior_cells(some), _mean(some, "seconds", failures=False)]
                lines.append([objective, training, str(number), *cells])
    return _table(["objective", "training", "T"], [*_POSTERIOR_HEADS, "seconds"], lines) if here else NOT_RUN


def _whitening_table(rows: Rows) -> str:
    """Those with moments are of the study of the posteriors."""
    layers = tuple(_values(_fits(rows, study="whitening"), "T"))
    if not layers:
        return NOT_RUN
    moments = _fits(rows, study="posteriors", whitening="moments", training="sequential", T=layers)
    fits = [*_fits(rows, study="whitening"), *moments]
    lines = []
    for target, objective, number in product(POSTERIORS, OBJECTIVES, layers):
        for whitening in ("none", "laplace", "moments"):
            some = select(fits, target=target, objective=objective, T=number, whitening=whitening)
            if some:
                lines.append([target, objective, str(number), whitening, *_posterior_cells(some)])
    return _table(["target", "objective", "T", "whitening"], _POSTERIOR_HEADS, lines)


def _every_fit(study: str, measures: Sequence[str], rows: Rows) -> str:
    """One line a fit, with all that is known of it."""
    order = ("target", "objective", "bridge", "training", "T", "seed")
    fits = sorted(_fits(rows, study=study), key=lambda row: [row[key] for key in order])
    if not fits:
        return NOT_RUN
    wide = any("sd_ratio_min" in row for row in fits)
    lines = []
    for row in fits:
        cells = [_mean([row], key, _count if key == "modes_found" else _number, failures=False) for key in measures]
        ratios = [_sd_ratios([row])] if wide else []
        last = f"failed: {row['failed']}" if "failed" in row else ", ".join(row["findings"]) or "–"
        cost = [
            _mean([row], key, number, failures=False) for key, number in (("parameters", _whole), ("seconds", _number))
        ]
        names = [str(row[key]) for key in order]
        lines.append([*names, " ".join(last.replace("|", "/").split()), *cells, *ratios, *cost])
    heads = [*(MEASURES[key] for key in measures), *(["sd ratios"] if wide else []), "parameters", "seconds"]
    return _table([*order, "findings"], heads, lines)


# What is better

_PAIR_KEYS = (
    "study",
    "target",
    "T",
    "objective",
    "bridge",
    "training",
    "seed",
    "whitening",
    "parameters_wanted",
    "depth",
)


def pair_up(rows: Rows, axis: str, first: str, second: str) -> list[tuple[Row, Row]]:
    """Returns the pairs of rows that differ in one axis alone; steps and rates may go with the objective."""
    places = {tuple(row[key] for key in _PAIR_KEYS if key != axis): row for row in select(rows, **{axis: second})}
    keys = [(row, tuple(row[key] for key in _PAIR_KEYS if key != axis)) for row in select(rows, **{axis: first})]
    return [(row, places[key]) for row, key in keys if key in places]


def _compare(rows: Rows, axis: str, first: str, second: str, measure: str) -> list[str]:
    pairs = pair_up(rows, axis, first, second)
    if not pairs:
        return []
    both = [(one[measure], other[measure]) for one, other in pairs if len(_measured([one, other])) == 2]
    failed = ", ".join(str(len(pairs) - len(_measured([pair[side] for pair in pairs]))) for side in (0, 1))
    head = [f"{first}, {second}", MEASURES[measure], str(len(both))]
    if not both:
        return [*head, *(["–"] * 5), failed]
    means = [_number(fmean(pair[side] for pair in both)) for side in (0, 1)]
    difference = _number(fmean(other - one for one, other in both))
    ratio = _number(median(other / one if one else math.inf for one, other in both))
    better = sum(other < one for one, other in both)
    return [*head, *means, difference, ratio, f"{better} ({100 * better / len(both):.0f} %)", failed]


def _winners_table(rows: Rows) -> str:
    """Pairs of fits that differ in one thing, and means by the number of layers."""
    plane, posteriors = _fits(rows, study=("plane", "shapes")), _fits(rows, study="posteriors")
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
    return _table(["A, B", "measure"], heads, lines) + f"\n\nMeans over all fits:\n\n{_layers_table(plane, posteriors)}"


def _layers_table(plane: Rows, posteriors: Rows) -> str:
    layers = _values([*plane, *posteriors], "T")
    lines = []
    for targets, rows, keys in ((PLANE, plane, ("js",)), (POSTERIORS, posteriors, ("mean_error", "covariance_error"))):
        for target, key in product(targets, keys):
            here = select(rows, target=target)
            if here:
                lines.append([target, MEASURES[key], *(_mean(select(here, T=T), key) for T in layers)])
    return _table(["target", "measure"], [f"T = {T}" for T in layers], lines)


def _findings_table(rows: Rows) -> str:
    """How often each sign was seen where there is something to see, and where there is nothing."""
    fits = [row for row in _measured(_fits(rows)) if "findings" in row]
    all_modes = {row["target"]: _modes_found(row) for row in sorted(_measured(rows), key=_modes_found)}
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
    failed = len(_fits(rows)) - len(_measured(_fits(rows)))
    note = f"\n\nNot counted: {failed} fits that failed." if failed else ""
    return _table(["sign"], list(groups), lines) + note if fits else NOT_RUN


def _modes_found(row: Row) -> float:
    return float(row.get("modes_found", 0))


TABLES: dict[str, Callable[[Rows], str]] = {
    "checkerboard": partial(_plane_table, "checkerboard"),
    "checkerboard_modes": partial(_modes_table, "checkerboard"),
    "ring": partial(_plane_table, "ring"),
    "ring_modes": partial(_modes_table, "ring"),
    "costs": _costs_table,
    "shapes": _shapes_table,
    **{target: partial(_posterior_table, target) for target in POSTERIORS},
    "whitening": _whitening_table,
    "size": _size_table,
    "long": partial(_every_fit, "long", PLANE_MEASURES),
    "long_posteriors": partial(_every_fit, "long_posteriors", POSTERIOR_MEASURES),
    "winners": _winners_table,
    "findings": _findings_table,
}


# Figures of the results


def _curve(axis: Axes, rows: Rows, x: str, key: str, **style: Any) -> None:
    """Means over seeds with the range as a band; what failed leaves a gap."""
    done = [row for row in _measured(rows) if key in row]
    groups = [(place, [row[key] for row in select(done, **{x: place})]) for place in _values(done, x)]
    if not groups:
        return
    places, values = zip(*groups, strict=True)
    axis.plot(places, [fmean(some) for some in values], marker="o", markersize=4, linewidth=1.5, **style)
    axis.fill_between(places, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.12, lw=0)


def _level(axis: Axes, rows: Rows, key: str, label: str, **style: Any) -> None:
    """A line across, at the mean."""
    values = [row[key] for row in _measured(rows) if key in row]
    if values:
        axis.axhline(fmean(values), label=label, linewidth=1.3, zorder=1, **style)


def _finish(axis: Axes, places: Sequence[int], title: str, xlabel: str, ylabel: str) -> None:
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axis.set_xticks(places, [f"{place // 1000}k" if place >= 1000 else str(place) for place in places])
    if not axis.collections:  # no bands, so no fits
        axis.text(0.5, 0.5, NOT_RUN, transform=axis.transAxes, ha="center", color="gray")
    axis.minorticks_off()
    _label_ticks(axis)
    axis.grid(alpha=0.25)


def _label_ticks(axis: Axes) -> None:
    """Numbers at 1, 2 and 5 of each power of ten, so that even a short log axis has some."""
    if not axis.has_data():
        axis.set_yticks([])
        return
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, below them, with each label once."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)), frameon=False
        )


def draw_layers(rows: Rows) -> Figure:
    """JS against the number of layers, on two targets and two bridges; one layer knows neither bridge nor training."""
    targets, layers = ("checkerboard", "ring"), _values(_fits(rows, study="plane"), "T")
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey="row", layout="constrained")
    for (target, bridge), axis in zip(product(targets, BRIDGES), axes.flat, strict=True):
        here = select(rows, study="plane", target=target)
        fits = _fits(here)
        for objective, training in product(OBJECTIVES, TRAINING):
            deep = select(fits, objective=objective, bridge=bridge, training=training)
            line = [*select(fits, objective=objective, T=1), *(row for row in deep if row["T"] > 1)]
            label, dash = f"{objective}, {training}", DASHES[training]
            _curve(axis, line, "T", "js", label=label, color=COLOURS[objective], linestyle=dash)
        _level(axis, select(here, method="exact"), "js", NULL_LABELS["exact"], color="black", linestyle=":")
        _finish(axis, layers, f"{target}, {bridge} bridge", "layers T", "JS, nats")
        axis.label_outer()
    _legend(figure, axes.flat)
    return figure


def draw_posteriors(rows: Rows) -> Figure:
    """Errors of mean and covariance against the number of layers, on three posteriors."""
    keys, layers = ("mean_error", "covariance_error"), _values(_fits(rows, study="posteriors"), "T")
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, layout="constrained")
    for (key, target), axis in zip(product(keys, POSTERIORS), axes.flat, strict=True):
        here = select(rows, study="posteriors", target=target)
        fits = _fits(here)
        for objective, training in product(OBJECTIVES, TRAINING):
            deep = select(fits, objective=objective, training=training)
            line = [*select(fits, objective=objective, T=1), *(row for row in deep if row["T"] > 1)]
            label, dash = f"{objective}, {training}", DASHES[training]
            _curve(axis, line, "T", key, label=label, color=COLOURS[objective], linestyle=dash)
        _level(axis, select(here, method="exact"), key, NULL_LABELS["exact"], color="black", linestyle=":")
        _level(axis, select(here, method="laplace"), key, NULL_LABELS["laplace"], color="gray", linestyle="-.")
        below, left = key == keys[1], target == POSTERIORS[0]
        title, ylabel = "" if below else target.replace("_", " "), MEASURES[key] if left else ""
        _finish(axis, layers, title, "layers T" if below else "", ylabel)
    _legend(figure, axes.flat)
    return figure


def draw_sizes(rows: Rows) -> Figure:
    """JS against the number of parameters; a line for each objective and depth."""
    fits = _fits(rows, study="size")
    layers, depths = _values(fits, "T") or [1], _values(fits, "depth")
    figure, axes = plt.subplots(
        1, len(layers), figsize=(4.5 * len(layers), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for number, axis in zip(layers, axes.flat, strict=True):
        for objective, (place, depth) in product(OBJECTIVES, enumerate(depths)):
            line = select(fits, T=number, objective=objective, depth=depth)
            label, dash = f"{objective}, depth {depth}", (":", "--", "-", "-.")[place % 4]
            _curve(axis, line, "parameters_wanted", "js", label=label, color=COLOURS[objective], linestyle=dash)
        floor = select(rows, study="plane", target="checkerboard", method="exact")
        _level(axis, floor, "js", NULL_LABELS["exact"], color="black", linestyle=":")
        _finish(axis, _values(fits, "parameters_wanted"), f"checkerboard, T = {number}", "parameters", "JS, nats")
        axis.label_outer()
    _legend(figure, axes.flat)
    return figure


FIGURES: dict[str, Callable[[Rows], Figure]] = {
    "js_against_layers.png": draw_layers,
    "posterior_errors.png": draw_posteriors,
    "size.png": draw_sizes,
}


def _save(figure: Figure, path: Path) -> None:
    """With 256 colours, so that the noise of draws does not fill the repository."""
    whole = BytesIO()
    figure.savefig(whole, dpi=110)
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


# Pictures of fits


def draw_marginals_figure(fitted: Fitted, path: Path) -> None:
    """Draws how a fit on the plane approaches its target: the marginals of its layers, and below them the bridge.

    Args:
        fitted: After training.
        path: PNG to write.
    """
    bridge = fitted.inference.bridge
    assert isinstance(bridge, GeometricBridge | DiffusionBridge)
    marginals = fitted.inference.marginals(40_000)
    half = _half_width(bridge, marginals)
    columns = bridge.num_layers + 1
    figure, axes = plt.subplots(2, columns, figsize=(1.6 * columns + 0.5, 3.6), layout="constrained")
    for t, (above, below) in zip(reversed(range(columns)), axes.T, strict=True):
        _show_draws(above, marginals[t], half)
        above.set_title(_name_level(bridge, t), fontsize=9)
        _show_bridge(below, bridge, t, half)
    for axis, label in zip(axes[:, 0], ("sampler $q_t$", "bridge $p_t$"), strict=True):
        axis.set_ylabel(label, fontsize=11)
    _save(figure, path)


def _half_width(bridge: GeometricBridge | DiffusionBridge, marginals: Sequence[Tensor]) -> float:
    """Of the window, which is the same for all panels: it holds the target and nearly all of the base."""
    ends = marginals[0]
    if isinstance(bridge.target, SampledTarget):
        ends = bridge.target.sample(10_000, torch.Generator().manual_seed(0))
    return 1.1 * float(max(ends.abs().quantile(0.99), marginals[-1].abs().quantile(0.95)))


def _name_level(bridge: GeometricBridge | DiffusionBridge, t: int) -> str:
    if t == bridge.num_layers:
        return "base"
    level = float(bridge.levels[t])
    if isinstance(bridge, DiffusionBridge):
        return rf"$t = {t}$, $\sigma = {level:.2f}$"
    return rf"$t = {t}$, $\lambda = {1 - level:.2f}$"


def _show_bridge(axis: Axes, bridge: GeometricBridge | DiffusionBridge, t: int, half: float) -> None:
    """The density, or where there is a score alone, exact draws that are diffused."""
    if t == bridge.num_layers:
        _show_density(axis, bridge.base.log_prob, half)
        return
    level = bridge.levels[t].float()
    if not isinstance(bridge, DiffusionBridge) or bridge.network is None:
        _show_density(axis, lambda x: bridge.log_prob(x, level.expand(len(x))), half)
        return
    if not isinstance(bridge.target, SampledTarget):
        raise ValueError("neither a density nor exact draws of the bridge are known: there is nothing to draw")
    generator = torch.Generator().manual_seed(1)
    x = bridge.target.sample(40_000, generator)
    noise = torch.randn(x.shape, generator=generator)
    _show_draws(axis, (1 - level.square()).sqrt() * x + level * noise, half)


def _show_draws(axis: Axes, x: Tensor, half: float, bins: int = 90) -> None:
    ends = [[-half, half], [-half, half]]
    counts = np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=bins, range=ends)[0].T
    filled = counts[counts > 0]
    # Not the greatest count: a single cell would darken all the others.
    _show(axis, counts, half, float(np.quantile(filled, 0.99)) if filled.size else 1.0)


@torch.no_grad()
def _show_density(axis: Axes, log_prob: Callable[[Tensor], Tensor], half: float, cells: int = 160) -> None:
    line = half * (2 * (torch.arange(cells) + 0.5) / cells - 1)
    height, width = torch.meshgrid(line, line, indexing="ij")
    log_density = log_prob(torch.stack([width.flatten(), height.flatten()], 1)).reshape(cells, cells)
    _show(axis, (log_density - log_density.max()).exp().numpy(), half, 1.0)


def _show(axis: Axes, image: np.ndarray, half: float, top: float) -> None:
    axis.imshow(image, origin="lower", extent=(-half, half, -half, half), cmap="magma", vmin=0, vmax=top)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_fits(folder: Path, quick: bool = False) -> None:
    """Fits a few targets of the plane anew, and draws their marginals and a gallery of them all.

    Args:
        folder: Where marginals_TARGET_BRIDGE.png and shapes.png are written.
        quick: Fits that are too short to be good.
    """
    num_steps = 200 if quick else 3000
    done: dict[tuple[str, str], Fitted] = {}
    for target, bridge, training in PICTURES:
        done[target, bridge] = _fit(target, 5, bridge, training, num_steps)
        draw_marginals_figure(done[target, bridge], folder / f"marginals_{target}_{bridge}.png")
    gallery = []
    for target in PLANE:
        one = _fit(target, 1, "geometric", "sequential", num_steps)
        five = done.get((target, "diffusion")) or _fit(target, 5, "diffusion", "sequential", num_steps)
        gallery.append((target, one, five))
    draw_gallery(gallery, folder / "shapes.png")


def draw_gallery(fits: Sequence[tuple[str, Fitted, Fitted]], path: Path) -> None:
    """Draws exact draws of each target above those of two fits, with one layer and with more."""
    figure, axes = plt.subplots(3, len(fits), figsize=(1.7 * len(fits) + 0.4, 5.4), squeeze=False, layout="constrained")
    for (name, *fitted), column in zip(fits, axes.T, strict=True):
        target = make_target(name)
        assert isinstance(target, SampledTarget)
        exact = target.sample(40_000, torch.Generator().manual_seed(0))
        half = 1.1 * float(exact.abs().quantile(0.99))
        for axis, x in zip(column, [exact, *(one.sample(40_000, seed=0) for one in fitted)], strict=True):
            _show_draws(axis, x, half)
        column[0].set_title(name.replace("_", " "), fontsize=10)
    labels = ["exact", *(f"T = {one.inference.bridge.num_layers}" for one in fits[0][1:])]
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=11)
    _save(figure, path)


def _fit(target: str, num_layers: int, bridge: str, training: str, num_steps: int) -> Fitted:
    fit = Fit(target, num_layers, "LB", bridge, training, num_steps=num_steps)
    return run(replace(fit, base_std=BASE_STD.get(target, fit.base_std)))[0]
