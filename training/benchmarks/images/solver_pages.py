"""The page of tuned solvers, from solvers.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from hsivi_diffusers.evaluation.pages import fill_tables, new_parts, write_table
from hsivi_diffusers.folders import write_text

from .benchmark_results import Row, read_rows

LEAST = 1e-4  # an unbiased KID may be 0 or below
LABELS = ("solver", "timesteps", "settings")


def write_page(folder: Path) -> None:
    """Fills the tables of FOLDER/solvers.md, which is begun if there is none: the best at each count, and all."""
    rows, tables = read_rows(folder / "solvers.json"), {}
    for name in dict.fromkeys(row["dataset"] for row in rows):
        of_set = sorted(
            (row for row in rows if row["dataset"] == name), key=lambda row: (row["calls"], score(row["tuned"]))
        )
        tables[f"solvers_{name}"] = settings_table(best_solvers(of_set))
        tables[f"all_solvers_{name}"] = distances_table(of_set)
    page = folder / "solvers.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Solvers at their best\n"
    lacking = [table for table in tables if f"<!-- table: {table} -->" not in text]
    write_text(page, fill_tables(text + new_parts(lacking, []), tables))


def best_solvers(rows: list[Row]) -> list[Row]:
    """Of the rows of a set, the best at each number of calls."""
    order = sorted(rows, key=lambda row: (row["calls"], score(row["tuned"])), reverse=True)
    return [*{row["calls"]: row for row in order}.values()][::-1]


def score(distances: Mapping[str, float]) -> float:
    """Mean log distance over the spaces, by which settings are tuned and solvers are ranked; lower is better."""
    return mean(math.log(max(distance, LEAST)) for distance in distances.values())


def settings_table(rows: list[Row]) -> str:
    """What to load: the best solver at each number of calls, its timesteps and its settings."""
    lines = []
    for row in rows:
        settings = {name: value for name, value in row["settings"].items() if name != "timesteps"}
        timesteps = ", ".join(map(str, row["settings"].get("timesteps", [settings.get("timestep_spacing", "own")])))
        told = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "timestep_spacing")
        lines.append([row["calls"], row["solver"], *map(_written, row["tuned"].values()), timesteps, told])
    lines.append(["", "floor", *map(_written, rows[0]["floor"].values()), "", ""])
    return write_table(["calls", "solver", *rows[0]["tuned"], "timesteps", "settings"], LABELS, lines)


def distances_table(rows: list[Row]) -> str:
    """Every solver at every number of calls, with stock and with tuned settings."""
    lines = [
        [row["calls"], row["solver"], *(_written(row[kind][name]) for kind in ("stock", "tuned") for name in row[kind])]
        for row in rows
    ]
    heads = [f"{name}, {kind}" for kind in ("stock", "tuned") for name in rows[0][kind]]
    return write_table(["calls", "solver", *heads], LABELS, lines)


def _written(distance: float) -> str:
    return f"{distance:.3g}"
