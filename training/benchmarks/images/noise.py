"""What rows of several noise seeds say: means with their standard errors, and paired differences of two rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from .benchmark_results import Row, three_digits, value


class Summary(NamedTuple):
    """Mean of independent numbers and its standard error, which is NaN of one number."""

    mean: float
    error: float

    def __str__(self) -> str:
        """As it is written in tables."""
        return three_digits(self.mean) + ("" if math.isnan(self.error) else f" ± {self.error:.2g}")


def summary(numbers: Sequence[float]) -> Summary:
    """Mean of numbers and its standard error, stdev / sqrt(n)."""
    error = stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return Summary(mean(numbers), error)


def by_noise(rows: Sequence[Row], space: str) -> dict[int, float]:
    """The distance on each noise seed: a mean over training seeds, if there are several."""
    seeds = sorted({row["eval_seed"] for row in rows})
    return {seed: value([row for row in rows if row["eval_seed"] == seed], space) for seed in seeds}


def paired_difference(rows: Sequence[Row], others: Sequence[Row], space: str) -> Summary | None:
    """Distance of rows less that of others, by the noise seeds that both have; None without any."""
    one, other = by_noise(rows, space), by_noise(others, space)
    differences = [one[seed] - other[seed] for seed in one if seed in other]
    return summary(differences) if differences else None
