"""The measures of images, and their format in tables, figures and cards."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """Name and format of a measure."""

    head: str
    form: str = ".2f"
    factor: int = 1
    higher_is_better: bool = False


MEASURES = {
    "fd": Measure("FD"),
    "kid": Measure("KID x 1000", factor=1000),
    "precision": Measure("precision", ".3f", higher_is_better=True),
    "recall": Measure("recall", ".3f", higher_is_better=True),
    "density": Measure("density", ".3f", higher_is_better=True),
    "coverage": Measure("coverage", ".3f", higher_is_better=True),
    "pixel_fd": Measure("FD of pixels", ".4f"),
    "swd": Measure("SWD", ".4f"),
    "class_tv": Measure("class TV", ".3f"),
    "teacher_tv": Measure("TV to teacher", ".3f"),
    "accuracy": Measure("accuracy", ".4f", higher_is_better=True),
    "class_fd": Measure("FD of a class"),
    "class_recall": Measure("recall of a class", ".3f", higher_is_better=True),
    "right": Measure("right", ".3f", higher_is_better=True),
    "diversity": Measure("diversity", ".3f", higher_is_better=True),
    "nearest": Measure("nearest", ".3f", higher_is_better=True),
}
HALVES = "two halves of the reference"  # the row of the best values that can be expected
# Of the images in a sample grid as ratios to the teacher's, see `beside_teacher`. A run warns outside of 1 / BOUND to
# BOUND; healthy ones have been at 0.8 to 1.1 after a tenth.
RATIOS = ("images/contrast", "images/diversity")
BOUND = 1.5
REPORTED = ("kid", "fd", "precision", "recall", "coverage", "pixel_fd", "swd")  # by `hsivi evaluate`


def format_measure(name: str, value: float, spread: float = math.nan) -> str:
    """Formats a measure, with its spread if that is a number."""
    measure = MEASURES[name]
    around = "" if math.isnan(spread) else f" ± {format(measure.factor * spread, measure.form)}"
    return format(measure.factor * value, measure.form) + around


def format_cell(name: str, row: Mapping[str, Any], missing: str = "") -> str:
    """Formats a measure of a row, with its standard error if the row has that; `missing` where it has no number."""
    value, error = (_number(row.get(key)) for key in (name, f"{name}_error"))
    return missing if math.isnan(value) else format_measure(name, value, error)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else math.nan


def counted(number: Any, noun: str) -> str:
    """Writes a number with its noun: `1 update`, `2 updates`."""
    return f"{number} {noun}{'s' * (str(number) != '1')}"


def format_ratios(line: Mapping[str, Any]) -> str:
    """Says how the images of a grid compare with the teacher's; empty where that was not measured."""
    if not set(RATIOS) <= line.keys():
        return ""
    contrast, diversity = (line[name] for name in RATIOS)
    return f"{contrast:.2f} times the teacher's contrast, {diversity:.2f} times its diversity"
