"""The rows of a study: what they are called in tables and figures, and how they are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .study import NULLS, Row

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
    "ksd": "KSD",
    "modes_found": "modes",
    "mode_tv": "mode TV",
    "mode_max_error": "mode max error",
    "mean_error": "mean error",
    "covariance_error": "covariance error",
}


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with the given values, where a tuple is a choice of them."""
    choices = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
    return [row for row in rows if all(row.get(name) in choice for name, choice in choices.items())]


def fits_of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The same of fits, not of what they are held against."""
    return [row for row in select(rows, **wanted) if row["method"] not in NULLS]


def along(fits: Iterable[Row], objective: str, **deep: Any) -> list[Row]:
    """Fits of an objective for a line over T; one layer is the same for every bridge and training."""
    some = select(fits, objective=objective)
    return [row for row in some if row["T"] == 1] + [row for row in select(some, **deep) if row["T"] > 1]


def values_of(rows: Iterable[Row], name: str) -> list[Any]:
    """Values of an axis that occur, in order."""
    return sorted({row[name] for row in rows if row[name] is not None})


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows of fits that did not fail."""
    return [row for row in rows if "failed" not in row]
