"""Line charts of the numbers in the log of a run, as SVG in HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .measures import BOUND

Curve = list[tuple[int, float]]  # number of updates and value, in the order of the log

WIDTH, HEIGHT = 420, 218
LEFT, RIGHT, TOP, BOTTOM = 56, 384, 12, 176  # edges of the axes in it; the last label, centred at RIGHT, has room
COLORS = 6  # styles of curves, .c0 to .c5
MOST_POINTS = 400  # of a curve; of longer ones means are shown
MOST_MARKED = 40  # points that are drawn as dots, too
LARGEST = 1e38  # value of a point, about that of float32
SHARES = "images"  # the group of contrast and diversity, as ratios to the teacher's
TITLES = {
    SHARES: "Images, as ratios to the teacher's",
    "loss": "Loss",
    "critic_loss": "Loss of the critic by layer",
    "grad_norm": "Norm of gradients before clipping",
    "learning_rate": "Learning rate",
    "noise_scale": "Noise scale",
    "images_per_second": "Images per second",
}
MAIN = (SHARES, "loss")


def charts(log: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Charts of a log: those of images, losses and what callbacks returned; and the others."""
    groups: dict[str, dict[str, Curve]] = {name: {} for name in MAIN}
    for line in log:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and abs(value) < LARGEST:  # no nan
                group, _, curve = name.rpartition("/")
                groups.setdefault(group or name, {}).setdefault(curve, []).append((line["step"], float(value)))
    whole = {name: {k: v for k, v in curves.items() if len(v) > 1} for name, curves in groups.items()}
    drawn = {name: chart(name, curves) for name, curves in whole.items() if curves}
    further = [name for name in TITLES if name not in MAIN]
    return [drawn[name] for name in drawn if name not in further], [drawn[name] for name in further if name in drawn]


def chart(group: str, curves: Mapping[str, Curve]) -> str:
    """A figure with axes and a legend, which has the last values."""
    curves = {name: thin(curve) for name, curve in curves.items()}
    values = [y for curve in curves.values() for _, y in curve]
    low, high = min(values), max(values)
    logarithmic = low > 1 / LARGEST and high >= 10 * low
    if group == SHARES:
        low, high = min(low, 1 / BOUND), max(high, BOUND)
    axis = LogAxis(low, high) if logarithmic and group != SHARES else Axis(low, high)
    last = max(max(x for curve in curves.values() for x, _ in curve), 1)
    parts = [_band(axis)] if group == SHARES else []
    parts += [_grid_line(axis.place(tick), f"{tick:.6g}") for tick in axis.ticks()]
    parts += [_update_label(tick, last) for tick in linear_ticks(0, last) if tick % 1 == 0]
    parts += [f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">updates</text>']
    scale = (RIGHT - LEFT) / last  # pixels of an update
    parts += [
        f'<line class="at" y1="{TOP}" y2="{BOTTOM}" data-left="{LEFT}" data-scale="{scale}" visibility="hidden"/>'
    ]
    parts += [_line(number, curve, last, axis) for number, curve in enumerate(curves.values())]
    title = TITLES.get(group, group) + ", logarithmic" * isinstance(axis, LogAxis)
    ends = [f"{name if name != group else 'value'} {curve[-1][1]:.4g}" for name, curve in curves.items()]
    legend = "".join(f"<li>{_key(number)}{escape(end)}</li>" for number, end in enumerate(ends))
    label = escape(f"{title}, against updates; after {last} updates: {', '.join(ends)}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{escape(title)}<ul>{legend}</ul></figcaption>{svg}</figure>'


class Axis:
    """A linear axis from bottom to top, a little longer than its values."""

    def __init__(self, low: float, high: float) -> None:
        margin = max(0.04 * (high - low), 1e-6 * abs(high))
        margin = margin if margin > 1e-12 else 1.0
        self.low, self.high = low - margin if low < 0 else max(low - margin, 0.0), high + margin

    def place(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def ticks(self) -> list[float]:
        return linear_ticks(self.low, self.high)


class LogAxis(Axis):
    """A logarithmic axis of positive values."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(math.log10(low), math.log10(high))

    def place(self, value: float) -> float:
        return super().place(math.log10(value))

    def ticks(self) -> list[float]:
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [factor * 10.0**power for power in powers for factor in factors]
            found = [tick for tick in found if self.low <= math.log10(tick) <= self.high]
            if len(found) > 2:
                break
        return found[:: math.ceil(len(found) / 6)]


def linear_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most six."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * least)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thin(curve: Curve) -> Curve:
    """The means of a long curve over equally many points, each at the end of its points."""
    size = math.ceil(len(curve) / MOST_POINTS)
    parts = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _across(step: float, last: int) -> float:
    return LEFT + (RIGHT - LEFT) * step / last


def _line(number: int, curve: Curve, last: int, axis: Axis) -> str:
    points = [(_across(x, last), axis.place(y)) for x, y in curve]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f'<polyline class="{_style(number)}" points="{line}"/>'
    if len(curve) > MOST_MARKED:
        return drawn
    dots = zip(points, curve, strict=True)
    return drawn + "".join(
        f'<circle class="{_style(number)}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"><title>after update {step}: {value:.4g}'
        "</title></circle>"
        for (x, y), (step, value) in dots
    )


def _style(number: int) -> str:
    return f"c{number % COLORS}"


def _key(number: int) -> str:
    return f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{_style(number)}" d="M0 4H24"/></svg>'


def _grid_line(y: float, label: str) -> str:
    text = f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    return f'<path class="tick" d="M{LEFT} {y:.1f}H{RIGHT}"/>{text}'


def _update_label(step: float, last: int) -> str:
    x = _across(step, last)
    text = f'<text x="{x:.1f}" y="{BOTTOM + 19}" text-anchor="middle">{step:,.0f}</text>'
    return f'<path class="tick" d="M{x:.1f} {BOTTOM}v5"/>{text}'


def _band(axis: Axis) -> str:
    """The usual range, and the teacher's value."""
    top, bottom, one = axis.place(BOUND), axis.place(1 / BOUND), axis.place(1)
    area = f'<rect class="usual" x="{LEFT}" y="{top:.1f}" width="{RIGHT - LEFT}" height="{bottom - top:.1f}"/>'
    return f'{area}<path class="teacher" d="M{LEFT} {one:.1f}H{RIGHT}"/>'
