"""Measures what longer training buys: students of one recipe after several multiples of its updates.

    python -m training.benchmarks.images.lengths --config training/configs/lengths_digits.yaml

Each student is a training of its own, whose learning rate falls over its whole length. It draws from noise on which
nothing was chosen, and is compared with real images and with the teacher's converged sampler: of its ODE and its SDE in
many steps, the one that is nearer to the real images. Rows are in OUTPUT_DIR/lengths.json, the tables in SET.md beside
it. What was stopped continues by the same command, and rows that exist are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.figures import draw_curves
from hsivi_diffusers.evaluation.pages import measured_on, write_table
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.teachers.loading import load_student
from hsivi_diffusers.teachers.solvers import Sampler, make_student

from .benchmark_pages import as_word, by_noise, fill_page, in_sets, shrink, three_digits
from .benchmark_results import REAL, TEACHER, TEACHER_SDE, Results, Row, hash_networks, read_rows
from .set_teacher import SetTeacher
from .solver_pages import score
from .spaces import make_spaces
from .trainings import Trainings

LENGTHS = "lengths.json"
CHOICE, REFERENCE = 99, 100  # seeds of the noise by which the teacher's sampler is chosen, and that of its images
Draw = Callable[[int], torch.Tensor]  # images in [0, 1], by the seed of the noise


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
    seeds: list[int] = option([0], "training seeds")
    noise_seeds: list[int] = option([101, 102, 103, 104, 105], "seeds of the noise")
    teacher_steps: int = option(100, "network calls of the teacher's converged samplers")
    num_samples: int = option(5000, "images of each row")
    batch_size: int = option(500, "images at once")
    output_dir: str = option("docs/benchmarks/lengths", "rows, tables and figures")
    runs_dir: str = option("runs/lengths", "trainings, in a folder for each set")


class Entry(NamedTuple):
    """A row before it is measured; `make` trains what it needs."""

    method: str
    updates: int
    seed: int | None
    make: Callable[[], Draw]


class Study:
    """Teacher, spaces and students of one set."""

    def __init__(self, options: Options) -> None:
        self.options, runs = options, Path(options.runs_dir) / str(options.dataset)
        self.teacher = SetTeacher(str(options.teacher), options.real_data, options.guidance_scale)
        self.trainings = Trainings(runs, str(options.teacher), options.guidance_scale)
        self.results = Results(Path(options.output_dir), Path(options.runs_dir), str(options.dataset), LENGTHS)
        self.drawn = {name: getattr(options, name) for name in ("num_samples", "batch_size", "teacher_steps")}
        self.drawn["networks"] = hash_networks(Path(str(options.teacher)), Path(str(options.classifier)))
        for folder in (runs, self.results.path.parent):
            folder.mkdir(parents=True, exist_ok=True)

    def measure(self) -> None:
        """Adds the rows that are missing: of real images, of the teacher, and of students, short trainings first."""
        there = self.results.keys({}, {}, self.drawn)
        real, _ = self.teacher.load_real()
        self.spaces = make_spaces(Path(str(self.options.classifier)), real)
        name, converged = self._converged()
        self.teacher_spaces = [space.beside(self._draw(converged, REFERENCE)) for space in self.spaces]
        entries = [
            Entry(REAL, 0, None, lambda: partial(self._draw_real, real)),
            Entry(name, 0, None, lambda: partial(self._draw, converged)),
            *self._students(),
        ]
        for entry in bar(entries, str(self.options.dataset), unit="row"):
            if wanted := [seed for seed in self.options.noise_seeds if (entry[:3], seed) not in there]:
                draw = entry.make()
                for seed in wanted:
                    self.results.add(self._row(entry, seed, draw(seed)))

    def _students(self) -> Iterator[Entry]:
        options = self.options
        for factor, seed, steps in product(sorted(options.factors), options.seeds, options.steps):
            updates = round(factor * options.updates)
            yield Entry(name_of(steps), updates, seed, partial(self._make_student, steps, updates, seed))

    def _make_student(self, steps: int, updates: int, seed: int) -> Draw:
        config = f"{self.options.student} --num_inference_steps {steps} --max_train_steps {updates}"
        folder, _ = self.trainings.student(config, seed, self.trainings.settings(config, seed))
        teacher = self.teacher.teacher
        student = load_student(folder / "pipeline", teacher)
        return partial(self._draw, make_student(student, teacher, steps, self.options.guidance_scale))

    def _converged(self) -> tuple[str, Sampler]:
        """The teacher's converged sampler, with its name."""
        samplers: dict[str, Sampler] = {TEACHER: self._solver("DPM-Solver++")}
        if not self.teacher.teacher.schedule.is_flow:
            samplers[TEACHER_SDE] = self._solver("DPM-Solver++ SDE")
        known = [row["method"] for row in self.results.rows() if row["method"] in samplers]
        return min(((name, samplers[name]) for name in known[:1] or samplers), key=lambda each: self._score(each[1]))

    def _score(self, sampler: Sampler) -> float:
        images = self._draw(sampler, CHOICE)
        return score({space.name: space.distance(images) for space in self.spaces})

    def _solver(self, name: str) -> Sampler:
        return self.teacher.solver(name, self.options.teacher_steps)

    def _draw(self, sampler: Sampler, seed: int) -> torch.Tensor:
        return self.teacher.draw(sampler, self.options.num_samples, self.options.batch_size, seed)

    def _draw_real(self, real: torch.Tensor, seed: int) -> torch.Tensor:
        size, generator = self.options.num_samples, torch.Generator().manual_seed(seed)
        return real[torch.randint(len(real), (size,), generator=generator)]

    def _row(self, entry: Entry, noise_seed: int, images: torch.Tensor) -> Row:
        return {
            "dataset": self.options.dataset,
            **dict(zip(("method", "nfe", "train_seed"), entry[:3], strict=True)),
            **self.drawn,
            "eval_seed": noise_seed,
            "distances": {space.name: space.distance(images) for space in self.spaces},
            "teacher_distances": {space.name: space.distance(images) for space in self.teacher_spaces},
            "measured": measured_on(),
        }


def name_of(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def write_pages(folder: Path) -> None:
    """Fills the table of FOLDER/SET.md of each set, and draws its figures."""
    for name, rows in in_sets(read_rows(folder / LENGTHS)).items():
        students, figures = [row for row in rows if row["train_seed"] is not None], []
        for kind, key in (("teacher", "teacher_distances"), ("real", "distances")):
            figures.append(path := folder / f"{as_word(name)}_{kind}.png")
            flat = [{**row, **row[key]} for row in students]
            if flat:
                draw_curves(flat, {each: each for each in flat[0][key]}, path, "updates")
                shrink(path)
        fill_page(folder / f"{as_word(name)}.md", name, {"lengths": table(rows)}, [path.name for path in figures])


def table(rows: list[Row]) -> str:
    """Mean distances over training and noise seeds, and their standard errors over the noise seeds."""
    spaces = [*rows[0]["distances"]]
    found = pd.DataFrame(
        {
            **row,
            **row["distances"],
            **{f"{space}, to teacher": each for space, each in row["teacher_distances"].items()},
        }
        for row in sorted(rows, key=lambda row: (row["train_seed"] is not None, row["method"], row["nfe"]))
    )
    columns, lines = [*spaces, *(f"{space}, to teacher" for space in spaces)], []
    for (method, updates), group in found.groupby(["method", "nfe"], sort=False):
        means = by_noise(group)[columns]
        cells = (three_digits(each.mean(), each.sem()) for _, each in means.items())
        lines.append([method, updates or "", group.train_seed.nunique() or "", *cells])
    return write_table(["sampler", "updates", "training seeds", *columns], ("sampler",), lines)


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    if missing := [name for name in ("dataset", "teacher", "classifier", "student") if not getattr(options, name)]:
        raise ValueError(f"--{', --'.join(missing)} missing: give --config training/configs/lengths_digits.yaml")
    if min(options.noise_seeds) <= REFERENCE:
        raise ValueError(
            f"--noise_seeds {options.noise_seeds}: give numbers above {REFERENCE}, for others have been chosen on"
        )
    Study(options).measure()
    write_pages(Path(options.output_dir))


if __name__ == "__main__":
    run_command(main)
