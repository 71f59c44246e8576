"""Measures what longer training gains: students of one recipe after several multiples of its updates.

    python -m training.benchmarks.images.lengths --config training/configs/lengths_digits.yaml

Each student is a training of its own, whose learning rate falls over its whole length. It draws from noise on which
nothing was chosen, and is compared with real images and with the teacher's converged sampler: of its ODE and its SDE in
many steps, the one that is nearer to the real images. Real images and tuned solvers have rows beside it. Rows are in
OUTPUT_DIR/lengths.json, where `nfe` is the number of updates; tables and figures are in SET.md beside it. What was
stopped continues by the same command, and rows that exist are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch

from hsivi_diffusers import HSIVIConfig
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.figures import draw_curves
from hsivi_diffusers.evaluation.pages import fill_page, measured_on, write_table
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.folders import in_turn
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.teachers.loading import load_student
from hsivi_diffusers.teachers.solvers import Sampler, make_student

from .benchmark import Entry, costless
from .benchmark_pages import as_word, in_sets, shrink, three_digits
from .benchmark_results import REAL, SOLVER, TEACHER, TEACHER_SDE, Results, Row, hash_networks, read_rows, recipe_of
from .set_teacher import SetTeacher
from .solver_pages import best_solvers, score
from .spaces import make_spaces
from .trainings import Costs, Trainings

LENGTHS = "lengths.json"
CHOICE, REFERENCE = 99, 100  # seeds of the noise by which the teacher's sampler is chosen, and that of its images


@dataclass
class Options:
    _group = "lengths"
    dataset: str | None = option(None, "name of the set in the tables")
    teacher: str | None = option(None, "folder of the teacher")
    classifier: str | None = option(None, "folder of the ImageClassifier")
    real_data: str = option("digits", "real images, see train_teacher.py; of a text-to-image teacher `scenes`")
    student: str | None = option(None, "config of train_hsivi.py, with the options it is given besides")
    updates: int = option(1000, "updates of the student at factor 1")
    factors: list[float] = option([0.25, 1, 4], "multiples of these updates")
    steps: list[int] = option([1, 2, 4], "network calls of the students")
    guidance_scale: float | None = option(None, "scale of guidance of teacher and students")
    seeds: list[int] = option([0, 1, 2], "training seeds")
    noise_seeds: list[int] = option([101, 102, 103, 104, 105], "seeds of the noise")
    solvers: str = option("docs/benchmarks/solvers.json", "solvers that were tuned, by tune_solvers.py")
    solver_steps: list[int] = option([4, 8, 15], "network calls of the solvers")
    teacher_steps: int = option(100, "network calls of the teacher's converged samplers")
    num_samples: int = option(5000, "images of each row")
    batch_size: int = option(500, "images at once")
    output_dir: str = option("docs/benchmarks/lengths", "rows, tables and figures")
    runs_dir: str = option("runs/lengths", "trainings, in a folder for each set")


class Study:
    """Teacher, spaces and students of one set."""

    def __init__(self, options: Options) -> None:
        self.options, runs = options, Path(options.runs_dir) / str(options.dataset)
        self.teacher = SetTeacher(str(options.teacher), options.real_data, options.guidance_scale)
        self.trainings = Trainings(runs, str(options.teacher), options.guidance_scale)
        self.results = Results(Path(options.output_dir), Path(options.runs_dir), str(options.dataset), LENGTHS)
        self.drawn = {name: getattr(options, name) for name in ("num_samples", "batch_size", "teacher_steps")}
        self.drawn |= {"guidance_scale": options.guidance_scale, "real_data": options.real_data}
        self.drawn["networks"] = hash_networks(Path(str(options.teacher)), Path(str(options.classifier)))
        for folder in (runs, self.results.path.parent):
            folder.mkdir(parents=True, exist_ok=True)

    def measure(self) -> None:
        """Adds the rows that are missing: of the teacher, and of students, short trainings first."""
        free, students, seeds = [*self._untrained()], [*self._students()], self.options.noise_seeds
        settings, told = {entry.key: entry.settings for entry in students}, {entry.key: entry.told for entry in free}
        there = self.results.keys(settings, told, self.drawn)
        known = [row["method"] for row in self.results.rows() if row["method"] in self.samplers]
        keys = [*((method, 0, None) for method in known[:1]), *(entry.key for entry in [*free, *students])]
        if known and {*product(keys, seeds)} <= there:
            return
        self.spaces = make_spaces(Path(str(self.options.classifier)), self.teacher.real[0])
        name = known[0] if known else self._nearest()
        converged = self.samplers[name]
        reference = self._draw(converged, REFERENCE)
        self.teacher_spaces = [space.beside(reference) for space in self.spaces]
        entries = [Entry(name, 0, None, partial(costless, converged)), *free, *students]
        for entry in bar(entries, str(self.options.dataset), unit="row"):
            if wanted := [seed for seed in seeds if (entry.key, seed) not in there]:
                sampler, _ = entry.make()
                for seed in wanted:
                    self.results.add(self._row(entry, seed, self._draw(sampler, seed)))

    def _untrained(self) -> Iterator[Entry]:
        """Real images, and the best tuned solver at each number of calls."""
        options = self.options
        yield Entry(REAL, 0, None, partial(costless, self.teacher.draw_real))
        rows = [row for row in read_rows(Path(options.solvers)) if row["dataset"] == options.dataset]
        best = {row["calls"]: row for row in best_solvers(rows)}
        if lacking := sorted({*options.solver_steps} - {*best}):
            raise ValueError(
                f"--solver_steps has {lacking}, and {options.solvers} has solvers of {options.dataset} at {[*best]}: "
                "tune others by tune_solvers.py, or leave them out"
            )
        for calls in options.solver_steps:
            told = {name: best[calls][name] for name in ("solver", "settings")}
            solver = self.teacher.solver(told["solver"], calls, **told["settings"])
            yield Entry(f"{SOLVER} at {calls}", 0, None, partial(costless, solver), told=told)

    def _students(self) -> Iterator[Entry]:
        options = self.options
        for factor, seed, steps in product(sorted(options.factors), options.seeds, options.steps):
            updates = round(factor * options.updates)
            config = f"{options.student} --num_inference_steps {steps} --max_train_steps {updates}"
            settings = self.trainings.settings(config, seed)
            self.teacher.check_student(config, settings)
            make = partial(self._make_student, config, steps, seed, settings)
            yield Entry(name_of(steps), updates, seed, make, settings)

    def _make_student(self, config: str, steps: int, seed: int, settings: HSIVIConfig) -> tuple[Sampler, Costs]:
        folder, costs = self.trainings.student(config, seed, settings)
        teacher = self.teacher.teacher
        student = load_student(folder / "pipeline", teacher)
        return make_student(student, teacher, steps, self.options.guidance_scale), costs

    @cached_property
    def samplers(self) -> dict[str, Sampler]:
        """The teacher's converged samplers, by name."""
        solvers = {TEACHER: "DPM-Solver++", TEACHER_SDE: "DPM-Solver++ SDE"}
        if self.teacher.teacher.schedule.is_flow:
            del solvers[TEACHER_SDE]
        return {name: self.teacher.solver(solver, self.options.teacher_steps) for name, solver in solvers.items()}

    def _nearest(self) -> str:
        """The name of the sampler whose images are nearest to the real ones."""
        return min(self.samplers, key=lambda name: self._score(self.samplers[name]))

    def _score(self, sampler: Sampler) -> float:
        images = self._draw(sampler, CHOICE)
        return score({space.name: space.distance(images) for space in self.spaces})

    def _draw(self, sampler: Sampler, seed: int) -> torch.Tensor:
        return self.teacher.draw(sampler, self.options.num_samples, self.options.batch_size, seed)

    def _row(self, entry: Entry, noise_seed: int, images: torch.Tensor) -> Row:
        return {
            "dataset": self.options.dataset,
            **dict(zip(("method", "nfe", "train_seed"), entry.key, strict=True)),
            **self.drawn,
            "eval_seed": noise_seed,
            "distances": {space.name: space.distance(images) for space in self.spaces},
            "teacher_distances": {space.name: space.distance(images) for space in self.teacher_spaces},
            "recipe": entry.settings and recipe_of(entry.settings),
            **entry.told,
            "measured": measured_on(),
        }


def name_of(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def write_pages(folder: Path) -> None:
    """Fills the table of FOLDER/SET.md of each set, and draws its figures."""
    for name, rows in in_sets(read_rows(folder / LENGTHS)).items():
        rows.sort(key=lambda row: (row["train_seed"] is not None, len(row["method"]), row["method"]))
        figures = []
        for kind, key in (("teacher", "teacher_distances"), ("real", "distances")):
            figures.append(path := folder / f"{as_word(name)}_{kind}.png")
            flat = [{**row, **row[key]} for row in rows]
            if any(row["train_seed"] is not None for row in rows):
                lines = [*dict.fromkeys(row["method"] for row in rows if row["train_seed"] is None)]
                draw_curves(flat, {each: each for each in flat[0][key]}, path, "updates", lines)
                shrink(path)
        fill_page(folder / f"{as_word(name)}.md", name, {"lengths": table(rows)}, [path.name for path in figures])


def table(rows: list[Row]) -> str:
    """Mean distances and their standard errors over the training seeds, of fewer than three over the noise seeds."""
    (teacher,) = {row["method"] for row in rows if row["method"] in (TEACHER, TEACHER_SDE)}
    of_teacher = {space: f"{space}, to {teacher}" for space in rows[0]["distances"]}
    found = pd.DataFrame(
        {**row, **row["distances"], **{of_teacher[space]: each for space, each in row["teacher_distances"].items()}}
        for row in rows
    )
    columns, lines = [*of_teacher, *of_teacher.values()], []
    for (method, updates), group in found.groupby(["method", "nfe"], sort=False):
        seeds = group.train_seed.nunique()
        means = group.groupby("train_seed" if seeds > 2 else "eval_seed")[columns].mean()
        cells = (three_digits(each.mean(), each.sem()) for _, each in means.items())
        lines.append([method, updates or "", seeds or "", *cells])
    return write_table(["sampler", "updates", "training seeds", *columns], ("sampler",), lines)


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    if missing := [name for name in ("dataset", "teacher", "classifier", "student") if not getattr(options, name)]:
        raise ValueError(f"--{', --'.join(missing)} missing: give --config training/configs/lengths_digits.yaml")
    if min(options.noise_seeds, default=0) <= REFERENCE:
        raise ValueError(
            f"--noise_seeds {options.noise_seeds}: give numbers above {REFERENCE}; settings are chosen on others"
        )
    if short := [factor for factor in options.factors if round(factor * options.updates) < 1]:
        raise ValueError(f"--factors {short}: give such as make one update or more of --updates {options.updates}")
    Study(options).measure()
    with in_turn(Path(options.output_dir)):
        write_pages(Path(options.output_dir))


if __name__ == "__main__":
    run_command(main)
