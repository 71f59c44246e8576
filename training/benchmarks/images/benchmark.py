"""Compares few-step samplers of one teacher: tuned solvers, our students, and baselines trained for as long.

    python -m training.benchmarks.images.benchmark --config training/configs/benchmark_digits.yaml

Trains what is missing (teacher, classifier, students, baselines), draws the same number of images by every method from
the same noise, measures them against real ones, and writes OUTPUT_DIR/results.json, and with it the tables and figures
of OUTPUT_DIR. Rows that exist are kept, and only what a missing row needs is trained, so a benchmark that was stopped
continues by the same command (the classifier, a minute, starts over). To measure again, name another --output_dir; to
train again, another --runs_dir too. Each of --eval_seeds, draws of noise, has rows of its own, and tables have means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from hsivi_diffusers import HSIVIPipeline
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.evaluation.metrics import FEWEST
from hsivi_diffusers.evaluation.pages import measured_on
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.folders import in_turn
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.teachers.loading import load_student
from hsivi_diffusers.teachers.solvers import Sampler, Solver, make_student
from hsivi_diffusers.teachers.teacher import network_of

from . import train_baseline
from .benchmark_pages import as_word, is_shown, write_pages
from .benchmark_results import (
    ALL_SCALES,
    ALL_STEPS,
    BASELINES,
    CONSISTENCY,
    LATENT_CONSISTENCY,
    NO_LORA,
    NO_NOISE,
    OURS,
    PAIRS,
    POLISHED,
    PROGRESSIVE,
    REAL,
    SOLVER,
    TEACHER,
    TEACHER_SDE,
    UNGUIDED,
    Key,
    Results,
    Row,
    hash_networks,
    read_rows,
    recipe_of,
)
from .latent_consistency import set_grid
from .scenes import SCENES
from .set_teacher import SetTeacher
from .solver_pages import FALLING, INTERVAL, POLISHED_SET, WITHOUT, best_solvers
from .spaces import SetMeasures
from .trainings import ANEW, RESUME, Costs, Trainings, make

REFERENCE_SEED = 1  # of the noise of the teacher's images that all rows are compared with
SHOWN = 10  # images of a row in the figure
MAKERS = ("images.train_teacher", "images.train_classifier")  # of teacher and classifier


@dataclass
class Options:
    _group = "benchmark"
    dataset: str | None = option(None, "name of the set in the tables")
    teacher: str | None = option(None, "folder of the teacher; trained if it is missing")
    teacher_config: str | None = option(None, "config of train_teacher.py")
    classifier: str | None = option(None, "folder of the ImageClassifier; trained if it is missing")
    classifier_config: str | None = option(None, "config of train_classifier.py")
    real_data: str = option("digits", "real images, see train_teacher.py; of a text-to-image teacher `scenes`")
    students: list[str] = option([], "configs of train_hsivi.py, each with the options it is given besides, if any")
    pairs: str | None = option(None, "config of train_baseline.py of a regression on pairs, for one call")
    progressive: str | None = option(None, "config of train_baseline.py of a progressive distillation")
    consistency: str | None = option(None, "config of train_baseline.py of a consistency model")
    lcm_lora: str | None = option(None, "config of train_baseline.py of an LCM-LoRA")
    baseline_steps: list[int] = option([1, 2, 4], "network calls of the baselines, each of which has a student")
    guidance_scale: float | None = option(None, "scale of guidance of teacher, solvers, students and LCM-LoRA")
    seeds: list[int] = option([0, 1, 2], "training seeds of the students")
    baseline_seeds: list[int] = option(
        [],
        "training seeds of the baselines, each one of --seeds; by default those that have rows, or the first",
    )
    solvers: str = option("docs/benchmarks/solvers.json", "solvers that were tuned, by tune_solvers.py")
    teacher_steps: int = option(100, "network calls of the teacher's converged samplers, DPM-Solver++ and its SDE")
    num_samples: int = option(10_000, "images of each row")
    batch_size: int = option(500, "images at once")
    eval_seeds: list[int] = option([0], "seeds of the noise; each has a row of its own")
    output_dir: str = option("docs/benchmarks", "results, tables and figures")
    runs_dir: str = option("runs/benchmark", "trainings and images of the figures, in a folder for each set")


class Entry(NamedTuple):
    """A row before it is measured; `make` trains what it needs, and returns the sampler and what its training cost."""

    method: str
    nfe: int
    seed: int | None
    make: Callable[[], tuple[Sampler, Costs]]
    settings: HSIVIConfig | None = None  # of a student
    told: Mapping[str, Any] = {}  # more that the row tells

    @property
    def key(self) -> Key:
        """Method, network calls and training seed."""
        return self.method, self.nfe, self.seed


def costless(sampler: Sampler) -> tuple[Sampler, Costs]:
    """What `make` of an entry returns for a sampler that needs no training."""
    return sampler, {}


class Comparison:
    """Teacher, measures and results of one set."""

    def __init__(self, options: Options) -> None:
        self.options = options
        # What a row tells of its images, and of the teacher's; the noise of a batch depends on its size.
        self.drawn = {name: getattr(options, name) for name in ("num_samples", "batch_size", "teacher_steps")}
        if REFERENCE_SEED in options.eval_seeds:
            raise ValueError(f"--eval_seeds has {REFERENCE_SEED}, the noise of the teacher's images: name others")
        if options.guidance_scale is not None:
            self.drawn["guidance_scale"] = options.guidance_scale
        runs, teacher = Path(options.runs_dir) / str(options.dataset), str(options.teacher)
        self.trainings = Trainings(runs, teacher, options.guidance_scale)
        self.results = Results(Path(options.output_dir), Path(options.runs_dir), str(options.dataset))
        for folder in (runs, self.results.path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        makers = ("scenes.train_teacher", "scenes.train_reader") if options.real_data == SCENES else MAKERS
        programs = [f"training.benchmarks.{maker}" for maker in makers]
        make(Path(teacher), programs[0], options.teacher_config, *RESUME)
        make(Path(str(options.classifier)), programs[1], options.classifier_config, *ANEW)
        self.drawn["networks"] = hash_networks(Path(teacher), Path(str(options.classifier)))
        self.teacher = SetTeacher(teacher, options.real_data, options.guidance_scale)
        of_class = 2 if self.teacher.scenes else FEWEST  # images of a prompt are compared with each other
        if options.num_samples < (fewest := max(FEWEST, of_class * (self.teacher.classes or 1))):
            raise ValueError(f"--num_samples {options.num_samples}: give {fewest} or more, {of_class} of each class")

    def entries(self) -> list[Entry]:
        """Every row: the floor, the teacher and its solvers, students, and the baselines that have their cost."""
        entries = [
            Entry(REAL, 0, None, partial(costless, self.teacher.draw_real)),
            *self._teachers(),
            *self._solvers(),
            *(entry for config in self.options.students for entry in self._students(config)),
        ]
        keys = [entry.key for entry in entries]
        if twice := sorted({f"{key[0]} at {key[1]}" for key in keys if keys.count(key) > 1}):
            raise ValueError(
                f"--students have {', '.join(twice)} more than once: compare one student of each kind and number of "
                "calls, and the others in another --output_dir"
            )
        return [*entries, *self._baselines(keys)]

    def _baselines(self, keys: list[Key]) -> Iterator[Entry]:
        """The baselines that have a config, of which those are refused that none of the students has a row for."""
        options = self.options
        given = {PAIRS: options.pairs, PROGRESSIVE: options.progressive, CONSISTENCY: options.consistency}
        given[LATENT_CONSISTENCY] = options.lcm_lora
        configs = {method: config for method, config in given.items() if config is not None}
        unguided = [method for method in configs if method != LATENT_CONSISTENCY]
        if unguided and options.guidance_scale is not None:
            raise ValueError(f"{', '.join(unguided)} know no guidance: leave out their configs, or --guidance_scale")
        if odd := [method for method in configs if (method == LATENT_CONSISTENCY) != bool(self.teacher.scenes)]:
            takes = "takes text" if self.teacher.scenes else "takes none"
            raise ValueError(
                f"{', '.join(odd)} cannot be trained: {LATENT_CONSISTENCY} is for teachers that take text, the others "
                f"for those of pixels, and this teacher {takes}: leave out their configs"
            )
        if configs and (lacking := sorted({*options.baseline_seeds} - {*options.seeds})):
            raise ValueError(
                f"--baseline_seeds has {lacking}, and --seeds has not: a baseline is given the cost of our student of "
                "the same seed"
            )
        for method, config in configs.items():
            counts = [1] if method == PAIRS else options.baseline_steps
            make = self._make_consistency if method in (CONSISTENCY, LATENT_CONSISTENCY) else self._make_baseline
            if lacking := [nfe for nfe in counts if (OURS, nfe, options.seeds[0]) not in keys]:
                raise ValueError(
                    f"--baseline_steps has {lacking}, and --students none of so many calls, whose cost the "
                    "baseline is given: leave them out, or add such a student"
                )
            told = {"recipe": train_baseline.recipe_of(config)}
            for nfe, seed in [(each, seed) for each in counts for seed in self._baseline_seeds(method, each)]:
                scale = f" --guidance_scale {options.guidance_scale}" if options.guidance_scale is not None else ""
                own = {PROGRESSIVE: f" --num_inference_steps {nfe}", LATENT_CONSISTENCY: scale}
                words = config + own.get(method, "")
                yield Entry(method, nfe, seed, partial(make, words, nfe, seed), told=told)

    def _baseline_seeds(self, method: str, nfe: int) -> list[int]:
        """Those that are named, or that a baseline was trained with already, or the first."""
        one_model = method in (CONSISTENCY, LATENT_CONSISTENCY)  # for all numbers of calls
        rows = [row for row in self.results.rows() if row["method"] == method and (one_model or row["nfe"] == nfe)]
        there = {row["train_seed"] for row in rows}
        return self.options.baseline_seeds or sorted(there) or self.options.seeds[:1]

    def _teachers(self) -> Iterator[Entry]:
        """The converged samplers of the teacher, of its ODE and, if it has betas, of its SDE."""
        samplers = {TEACHER: self._teacher_sampler()}
        if not self.teacher.teacher.schedule.is_flow:
            samplers[TEACHER_SDE] = self.teacher.solver("DPM-Solver++ SDE", self.options.teacher_steps)
        for name, sampler in samplers.items():
            yield Entry(name, self.options.teacher_steps, None, partial(costless, sampler))

    def _teacher_sampler(self) -> Solver:
        return self.teacher.solver("DPM-Solver++", self.options.teacher_steps)

    def _solvers(self) -> Iterator[Entry]:
        """The best tuned solver at each number of calls with guidance, of any kind, and without, and polished ones."""
        path, dataset = Path(self.options.solvers), str(self.options.dataset)
        if not path.is_file():
            raise ValueError(f"--solvers {path} is missing: name a file that tune_solvers.py has written")
        names = {SOLVER: [dataset], POLISHED: [f"{dataset}{POLISHED_SET}"]}
        if self.teacher.guided.calls > 1:
            names[SOLVER] += [f"{dataset}{FALLING}", f"{dataset}{INTERVAL}"]
            names[UNGUIDED] = [f"{dataset}{WITHOUT}"]
        for method, sets in names.items():
            for row in best_solvers([row for row in read_rows(path) if row["dataset"] in sets]):
                given = row["solver"], row["calls"]
                solver = self.teacher.solver(*given, unguided=method == UNGUIDED, **row["settings"])
                told = {"solver": row["solver"], "settings": row["settings"]}
                yield Entry(method, row["calls"], None, partial(costless, solver), told=told)

    def _students(self, config: str) -> Iterator[Entry]:
        for seed in self.options.seeds:
            settings = self.trainings.settings(config, seed)  # refused now, and not after the trainings before it
            self.teacher.check_student(config, settings)
            name = ALL_STEPS if len(settings.depths) > 1 else OURS
            name = ALL_SCALES if len(settings.scales) > 1 else name
            name = NO_LORA if settings.prompts and settings.lora_rank == 0 else name
            name = NO_NOISE if settings.noise_eta == 0 else name
            for nfe in settings.depths:
                yield Entry(name, nfe, seed, partial(self._make_student, config, nfe, seed, settings), settings)

    def _make_student(self, config: str, nfe: int, seed: int, settings: HSIVIConfig) -> tuple[Sampler, Costs]:
        folder, costs = self.trainings.student(config, seed, settings)
        return self._sampler(load_student(folder / "pipeline", self.teacher.teacher), nfe), costs

    def _sampler(self, pipeline: Any, nfe: int) -> Sampler:
        return make_student(pipeline, self.teacher.teacher, nfe, self.options.guidance_scale)

    def _make_baseline(self, config: str, nfe: int, seed: int) -> tuple[Sampler, Costs]:
        """A progressive distillation to so many calls, or a regression on pairs, whose student takes one."""
        folder, costs = self._train_as_long(config, [nfe], seed)
        return self._sampler(HSIVIPipeline.from_pretrained(folder / "pipeline"), nfe), costs

    def _make_consistency(self, config: str, nfe: int, seed: int) -> tuple[Sampler, Costs]:
        """One model for all numbers of calls, that has at least the cost of each of their students."""
        folder, costs = self._train_as_long(config, self.options.baseline_steps, seed)
        pipeline, teacher = DiffusionPipeline.from_pretrained(folder / "pipeline"), self.teacher.teacher
        scheduler = set_grid(pipeline.scheduler, teacher.schedule, nfe)
        return Solver(scheduler, nfe, teacher, partial(teacher.call, network_of(pipeline))), costs

    def _train_as_long(self, config: str, counts: Sequence[int], seed: int) -> tuple[Path, Costs]:
        """Trains a baseline for at least the seconds and the network calls of our students of these calls."""
        return self.trainings.baseline(config, seed, *self.results.cost_of(OURS, counts, seed))

    def measure(self) -> None:
        """Adds the rows that are missing, one after the other."""
        options, entries, results = self.options, self.entries(), self.results
        seeds, told = options.eval_seeds, {entry.key: entry.told for entry in entries}
        there = results.keys({entry.key: entry.settings for entry in entries}, told, self.drawn)
        if odd := sorted({seed for _, seed in there}.difference(seeds)):
            raise ValueError(
                f"{results.path} has rows of the noise seeds {odd}, and --eval_seeds has not: remove them, or name "
                "another --output_dir"
            )
        wanted = [(entry, [seed for seed in seeds if (entry.key, seed) not in there]) for entry in entries]
        progress = bar([each for each in wanted if each[1]], str(options.dataset), unit="row")
        for entry, missing in progress:
            progress.set_postfix_str(f"{entry.method} at {entry.nfe}")
            sampler, costs = entry.make()
            measures = self.measures  # it loads the real images, and draws the teacher's
            for seed in missing:
                images = self._draw(sampler, seed)
                if seed == seeds[0]:
                    self._keep_images(entry, images)  # before the row
                results.add(self._row(entry, seed, measures(images, self.teacher.asked(len(images))), costs))

    def _row(self, entry: Entry, seed: int, measured: Row, costs: Costs) -> Row:
        return {
            "dataset": self.options.dataset,
            "method": entry.method,
            "nfe": entry.nfe,
            "train_seed": entry.seed,
            **self.drawn,
            "eval_seed": seed,
            **measured,
            "train_seconds": costs.get("seconds"),
            "train_calls": costs.get("network_calls"),
            "recipe": entry.settings and recipe_of(entry.settings),
            **entry.told,
            "measured": measured_on(),
        }

    def _keep_images(self, entry: Entry, images: torch.Tensor) -> None:
        """Keeps the first images of a row that is shown, of its first training seed."""
        of_baseline = entry.method in BASELINES
        seeds = self._baseline_seeds(entry.method, entry.nfe) if of_baseline else self.options.seeds
        if entry.seed in (None, seeds[0]) and is_shown(entry.method, entry.nfe):
            name = f"{entry.method} at {entry.nfe}"
            (real, _), scenes = self.teacher.real, self.teacher.scenes
            if scenes is None:
                self.results.keep_images(name, images[:SHOWN], real)
                return
            chosen = torch.arange(0, len(scenes.prompts), -(-len(scenes.prompts) // SHOWN))
            prompts = [scenes.prompts[number] for number in chosen]
            self.results.keep_images(name, images[chosen], real[chosen], prompts)  # image i is of prompt i

    @cached_property
    def measures(self) -> SetMeasures:
        """The measures of the set, beside images of the teacher."""
        options, real = self.options, self.teacher.real  # refused before anything is drawn
        # From other noise than the rows: a solver of few steps would be near to these images, and not to the teacher.
        converged = self._draw(self._teacher_sampler(), REFERENCE_SEED)
        return SetMeasures(Path(str(options.classifier)), *real, converged, self.teacher.scenes)

    def _draw(self, sampler: Sampler, seed: int) -> torch.Tensor:
        return self.teacher.draw(sampler, self.options.num_samples, self.options.batch_size, seed)


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    missing = [name for name in ("dataset", "teacher", "classifier") if not getattr(options, name)]
    if missing:
        raise ValueError(f"--{', --'.join(missing)} missing: give --config training/configs/benchmark_digits.yaml")
    comparison, folder = Comparison(options), Path(options.output_dir)
    comparison.measure()
    with in_turn(folder):
        write_pages(folder, Path(options.runs_dir))
    print(f"tables and figures are in {folder / as_word(options.dataset)}.md, the rows beside it")


if __name__ == "__main__":
    run_command(main)
