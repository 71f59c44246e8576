"""The page of tuned solvers, from solvers.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from hsivi_diffusers.evaluation.pages import fill_page, write_table

from .benchmark_pages import as_word, in_sets, three_digits
from .benchmark_results import Row, read_rows

LEAST = 1e-4  # an unbiased KID may be 0 or below
FALLING = " falling"  # after the name of a set: its solvers with less guidance the more noise there is
INTERVAL = " interval"  # after the name of a set: its solvers with guidance in an interval of times alone
POLISHED_SET = " polished"  # after the name of a set: its solvers with settings that diffusers has no options for
WITHOUT = " without guidance"  # after the name of a set: its solvers without guidance, one network call a step
LABELS = ("solver", "timesteps", "settings")


def write_page(folder: Path) -> None:
    """Fills the tables of FOLDER/solvers.md, which is begun if there is none: the best at each NFE."""
    sets = in_sets(read_rows(folder / "solvers.json"))
    tables = {f"solvers_{as_word(name)}": settings_table(best_solvers(rows)) for name, rows in sets.items()}
    fill_page(folder / "solvers.md", "Solvers at their best", tables)


def best_solvers(rows: list[Row]) -> list[Row]:
    """Of the rows of a set, the best at each NFE, ascending."""
    order = sorted(rows, key=lambda row: (row["calls"], score(row["tuned"])), reverse=True)
    return [*{row["calls"]: row for row in order}.values()][::-1]


def score(distances: Mapping[str, float]) -> float:
    """Mean log distance over the spaces, by which settings are tuned and solvers are ranked; lower is better."""
    return mean(math.log(max(distance, LEAST)) for distance in distances.values())


def settings_table(rows: list[Row]) -> str:
    """The best solver at each NFE: its distances, tuned / stock, and its settings in diffusers."""
    lines = []
    for row in rows:
        settings = {**row["settings"]}
        settings |= settings.pop("polish", {})
        spacing = settings.pop("timestep_spacing", "own")
        timesteps = ", ".join(map(str, settings.pop("timesteps", [spacing])))
        distances = (
            f"{three_digits(each)} / {three_digits(row['stock'][name])}" for name, each in row["tuned"].items()
        )
        named = ", ".join(f"{name} {value}" for name, value in settings.items())
        lines.append([row["calls"], row["solver"], *distances, timesteps, named])
    lines.append(["", "floor", *map(three_digits, rows[0]["floor"].values()), "", ""])
    return write_table(["NFE", "solver", *rows[0]["tuned"], "timesteps", "settings"], LABELS, lines)
