"""The figures of a study: curves of its results, and images of single fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

from hsivi_diffusers.evaluation.figures import pyplot
from hsivi_diffusers.vi import DiffusionBridge, GeometricBridge, SampledTarget

from .benchmark_targets import make_target
from .study_rows import (
    BRIDGES,
    MEASURES,
    NOT_RUN,
    NULL_LABELS,
    OBJECTIVES,
    PLANE,
    POSTERIORS,
    TRAINING,
    along,
    fits_of,
    select,
    values_of,
)
from .target_fit import Fit, Fitted, run

plt = pyplot()
COLOURS = {"LB": "#d62728", "SM": "#1f77b4", "KL": "#2ca02c"}
DASHES = {"sequential": "-", "joint": "--"}
# Targets, bridges and training of the figures of marginals; the gallery has the targets of PLANE.
MARGINALS = tuple((target, bridge, "joint") for target in ("checkerboard", "ring") for bridge in BRIDGES)
BASE_STD = {"ring": 4.0}


def _curve(axis: Axes, rows: pd.DataFrame, x: str, key: str, **style: Any) -> None:
    """Means over seeds with the range as a band; what failed leaves a gap."""
    groups = rows.dropna(subset=[key]).groupby(x)[key]
    if not len(groups):
        return
    mean = groups.mean()
    places = mean.index.astype(int)
    axis.plot(places, mean, marker="o", markersize=4, linewidth=1.5, **style)
    axis.fill_between(places, groups.min(), groups.max(), color=style["color"], alpha=0.12, lw=0)


def _curves(axis: Axes, fits: pd.DataFrame, key: str, **deep: Any) -> None:
    """A measure against T, for each objective and training."""
    for objective, training in product(OBJECTIVES, TRAINING):
        line = along(fits, objective, training=training, **deep)
        style = {"color": COLOURS[objective], "linestyle": DASHES[training]}
        _curve(axis, line, "T", key, label=f"{objective}, {training}", **style)


def _level(axis: Axes, rows: pd.DataFrame, key: str, method: str = "exact", **style: Any) -> None:
    """A line across, at the mean of what fits are compared with."""
    values = select(rows, method=method)[key].dropna()
    if len(values):
        style = {"color": "black", "linestyle": ":", **style}
        axis.axhline(values.mean(), label=NULL_LABELS[method], linewidth=1.3, zorder=1, **style)


def _finish(axis: Axes, places: Sequence[int], title: str, xlabel: str, ylabel: str) -> None:
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axis.set_xticks(places, [f"{place // 1000}k" if place >= 1000 else str(place) for place in places])
    if not axis.collections:  # no bands, so no fits
        axis.text(0.5, 0.5, NOT_RUN, transform=axis.transAxes, ha="center", color="gray")
    axis.minorticks_off()
    if axis.has_data():  # numbers at 1, 2 and 5 of each power of ten, so that even a short log axis has some
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, below them, with each label once."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)


def draw_layers(rows: pd.DataFrame) -> Figure:
    """JS against the number of layers, on two targets and two bridges; one layer knows neither bridge nor training."""
    targets, layers = ("checkerboard", "ring"), values_of(fits_of(rows, study="plane"), "T")
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey="row", layout="constrained")
    for (target, bridge), axis in zip(product(targets, BRIDGES), axes.flat, strict=True):
        here = select(rows, study="plane", target=target)
        _curves(axis, fits_of(here), "js", bridge=bridge)
        _level(axis, here, "js")
        _finish(axis, layers, f"{target}, {bridge} bridge", "layers T", "JS, nats")
        axis.label_outer()
    _legend(figure, axes.flat)
    return figure


def draw_posteriors(rows: pd.DataFrame) -> Figure:
    """Errors of mean and covariance against the number of layers, on three posteriors."""
    keys, layers = ("mean_error", "covariance_error"), values_of(fits_of(rows, study="posteriors"), "T")
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, layout="constrained")
    for (key, target), axis in zip(product(keys, POSTERIORS), axes.flat, strict=True):
        here = select(rows, study="posteriors", target=target)
        _curves(axis, fits_of(here), key)
        _level(axis, here, key)
        _level(axis, here, key, "laplace", color="gray", linestyle="-.")
        below, left = key == keys[1], target == POSTERIORS[0]
        title, ylabel = "" if below else target.replace("_", " "), MEASURES[key] if left else ""
        _finish(axis, layers, title, "layers T" if below else "", ylabel)
    _legend(figure, axes.flat)
    return figure


def draw_sizes(rows: pd.DataFrame) -> Figure:
    """JS against the number of parameters; a line for each objective and depth."""
    fits = fits_of(rows, study="size")
    layers, depths = values_of(fits, "T") or [1], values_of(fits, "depth")
    size = 4.5 * len(layers), 4.4
    figure, axes = plt.subplots(1, len(layers), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for number, axis in zip(layers, axes.flat, strict=True):
        for objective, (place, depth) in product(OBJECTIVES, enumerate(depths)):
            line = select(fits, T=number, objective=objective, depth=depth)
            label, dash = f"{objective}, depth {depth}", (":", "--", "-", "-.")[place % 4]
            _curve(axis, line, "parameters_wanted", "js", label=label, color=COLOURS[objective], linestyle=dash)
        _level(axis, select(rows, study="plane", target="checkerboard"), "js")
        _finish(axis, values_of(fits, "parameters_wanted"), f"checkerboard, T = {number}", "parameters", "JS, nats")
        axis.label_outer()
    _legend(figure, axes.flat)
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "js_against_layers.png": draw_layers,
    "posterior_errors.png": draw_posteriors,
    "size.png": draw_sizes,
}


def save(figure: Figure, path: Path) -> None:
    """With 32 colours, so that the noise of draws does not fill the repository."""
    whole = BytesIO()
    figure.savefig(whole, dpi=110)
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


# Fits


def draw_marginals_figure(fitted: Fitted, path: Path) -> None:
    """Draws how a fit on the plane approaches its target: the marginals of its layers, and below them the bridge."""
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
    save(figure, path)


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
    assert isinstance(bridge.target, SampledTarget)
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
    """Fits a few targets of the plane again; draws marginals_TARGET_BRIDGE.png, and shapes.png unless it is quick."""
    num_steps = 200 if quick else 3000
    done: dict[tuple[str, str], Fitted] = {}
    for target, bridge, training in MARGINALS:
        done[target, bridge] = _fit(target, 5, bridge, training, num_steps)
        draw_marginals_figure(done[target, bridge], folder / f"marginals_{target}_{bridge}.png")
    if quick:
        return
    gallery = []
    for target in PLANE:
        one = _fit(target, 1, "geometric", "sequential", num_steps)
        five = done.get((target, "diffusion")) or _fit(target, 5, "diffusion", "joint", num_steps)
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
    save(figure, path)


def _fit(target: str, num_layers: int, bridge: Any, training: Any, num_steps: int) -> Fitted:
    std = BASE_STD.get(target, Fit.base_std)
    return run(Fit(target, num_layers, "LB", bridge, training, num_steps=num_steps, base_std=std))[0]
