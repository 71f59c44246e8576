"""The rows of a study as a table of pandas, their labels in tables and figures, and how they are selected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from .study import KEYS, NULLS, Row

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


def frame_of(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a row; what a row lacks is missing, as are all measures of fits that failed."""
    numbers = [*MEASURES, "sd_ratio_min", "sd_ratio_max", "seconds"]
    frame = pd.DataFrame(rows, columns=[*KEYS, *numbers, "findings", "failed"])
    frame[numbers] = frame[numbers].astype(float)
    frame.loc[frame["failed"].notna(), numbers] = float("nan")
    return frame.astype({"T": "Int64"})


def csv_of(frame: pd.DataFrame) -> str:
    """The rows as CSV, with four digits."""
    findings = frame["findings"].map(lambda found: " ".join(found) if isinstance(found, list) else found)
    failed = frame["failed"].map(lambda why: " ".join(why.split()), na_action="ignore")
    frame = frame.assign(findings=findings, failed=failed)
    return frame.to_csv(index=False, float_format="%.4g", lineterminator="\n")


def select(frame: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Rows with the given values, where a tuple is a choice of them."""
    for name, value in wanted.items():
        frame = frame[frame[name].isin(value if isinstance(value, tuple) else (value,))]
    return frame


def fits_of(frame: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The same of fits only, without the rows that they are compared with."""
    return select(frame[~frame["method"].isin(NULLS)], **wanted)


def along(fits: pd.DataFrame, objective: str, **deep: Any) -> pd.DataFrame:
    """Fits of an objective for a line over T; one layer is the same for every bridge and training."""
    some = select(fits, objective=objective)
    return pd.concat([select(some, T=1), select(some[some["T"] > 1], **deep)])


def values_of(frame: pd.DataFrame, name: str) -> list[Any]:
    """Values of an axis that occur, in order."""
    return sorted(frame[name].dropna().unique())
