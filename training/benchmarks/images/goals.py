"""What is asked of ours on each set, and whether it is reached."""

from __future__ import annotations

from statistics import mean
from typing import Any, NamedTuple

from hsivi_diffusers.evaluation.pages import write_table
from hsivi_diffusers.runs.measures import MEASURES

from .benchmark_results import (
    ALL_SCALES,
    ALL_STEPS,
    BASELINES,
    LATENT_CONSISTENCY,
    NO_LORA,
    NO_NOISE,
    OURS,
    REAL,
    SOLVER,
    TEACHER,
    Group,
    Row,
    grouped,
    three_digits,
    value,
)


class Goal(NamedTuple):
    """What is asked of ours at a number of calls: a distance of at most the factor times that of a group.

    Of a solver it is the least that it has in that space with so many calls or fewer. With `over_floor` both are
    distances over that of real images.
    """

    calls: int
    group: Group
    factor: float = 1.0
    over_floor: bool = False
    ours: str = OURS

    @property
    def words(self) -> str:
        """What ours is held against."""
        words = {1.0: "", 0.5: "half of ", 1 / 1.5: "1/1.5 of "}
        share = words.get(self.factor, f"{self.factor:g} of ")
        name = "" if self.ours == OURS else f"{self.ours}: "
        return f"{name}{share}{self.group[0]} at {self.group[1]}" + (", over the floor" if self.over_floor else "")

    def limit(self, groups: dict[Group, list[Row]], space: str) -> float:
        """The largest distance that reaches the goal."""
        floor = value(groups[REAL, 0], space) if self.over_floor else 0.0
        counts = [nfe for method, nfe in groups if method == self.group[0] == SOLVER and nfe < self.group[1]]
        least = min(value(groups[self.group[0], nfe], space) for nfe in (*counts, self.group[1]))
        return floor + self.factor * (least - floor)


OF_TEXT = {LATENT_CONSISTENCY: 1 / 1.5, NO_LORA: 1.25}  # factor of each method that captions alone have
GOALS = [
    *(Goal(nfe, (SOLVER, nfe), 0.5, over_floor=True) for nfe in (1, 2, 4, 5)),
    *(Goal(nfe, (SOLVER, more)) for nfe, more in ((1, 5), (1, 8), (2, 8), (4, 15))),
    *(Goal(nfe, (baseline, nfe), 1 / 1.5) for baseline in BASELINES for nfe in (1, 2, 4) if baseline not in OF_TEXT),
    *(Goal(nfe, (OURS, nfe), 1.3, ours=ours) for ours in (NO_NOISE, ALL_STEPS, ALL_SCALES) for nfe in (1, 2, 4)),
]


TEXT_GOALS = [  # besides; the floor of their KID is below 0
    Goal(4, (SOLVER, 20)),
    *(Goal(nfe, (method, nfe), factor, over_floor=True) for method, factor in OF_TEXT.items() for nfe in (1, 4)),
]


class MeasureGoal(NamedTuple):
    """What is asked of ours at a number of calls: a measure as good as that of a tuned solver, or a share of it.

    With guidance the steps of the solver, or of the teacher, are two network calls each.
    """

    calls: int
    measure: str
    steps: int
    share: float = 1.0
    method: str = SOLVER
    ours: str = OURS

    def cells(self, groups: dict[Group, list[Row]]) -> list[Any] | None:
        """Calls, what is held against, ours and the limit, and whether it is reached; None where a row lacks."""
        ours = groups.get((self.ours, self.calls), [])
        nfe = self.steps * (2 if self.method != OURS and ours and ours[0].get("guidance_scale", 1) != 1 else 1)
        others = groups.get((self.method, nfe), [])
        if not (ours and others and self.measure in ours[0] and self.measure in others[0]):
            return None
        one, other = (mean(row[self.measure] for row in each) for each in (ours, others))
        known = MEASURES[self.measure]
        limit = self.share * other
        reached = one >= limit if known.higher_is_better else one <= limit
        share = "" if self.share == 1 else f"{self.share:.2g} of "
        name = "" if self.ours == OURS else f"{self.ours}: "
        words = f"{name}{share}{known.head} of {self.method} at {nfe}"
        return [self.calls, words, f"{one:{known.form}} / {limit:{known.form}}", "reached" if reached else "missed"]


MEASURE_GOALS = [
    *(MeasureGoal(4, name, 20) for name in ("recall", "coverage")),
    *(MeasureGoal(nfe, "accuracy", 20, 0.98) for nfe in (1, 2, 4)),
    *(MeasureGoal(nfe, name, 10) for nfe in (1, 2, 4) for name in ("class_fd", "class_recall")),
    *(MeasureGoal(nfe, "retrieval", 50, share, TEACHER) for nfe, share in ((1, 0.85), (4, 0.95))),
    *(MeasureGoal(nfe, "diversity", 50, 0.8, TEACHER) for nfe in (1, 4)),
    *(MeasureGoal(nfe, "accuracy", nfe, 1 / 1.3, OURS, ALL_SCALES) for nfe in (1, 2, 4)),
]


def goals_table(rows: list[Row]) -> str:
    """Each goal in each space: what ours has, and at most should have."""
    groups, spaces = grouped(rows), [*rows[0]["distances"]]
    lines = []
    for goal in [*GOALS, *(TEXT_GOALS if "retrieval" in rows[0] else [])]:
        ours = groups.get((goal.ours, goal.calls))
        if ours is None or goal.group not in groups or (goal.over_floor and (REAL, 0) not in groups):
            continue
        found = [(value(ours, space), goal.limit(groups, space)) for space in spaces]
        missed = [space for space, (one, most) in zip(spaces, found, strict=True) if one > most]
        told = f"missed: {', '.join(missed)}" if missed else "reached"
        lines.append(
            [goal.calls, goal.words, *(f"{three_digits(one)} / {three_digits(most)}" for one, most in found), told]
        )
    for asked in MEASURE_GOALS:
        if cells := asked.cells(groups):
            lines.append([*cells[:3], *[""] * (len(spaces) - 1), cells[3]])
    if not lines:
        return "No goal can be told: the rows lack ours, or what they are held against."
    return write_table(["calls", "held against", *spaces, "reached"], ("held against", "reached"), lines)
