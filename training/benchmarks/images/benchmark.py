"""Compares few-step samplers of one teacher: solvers, our students, and a consistency model trained for as long.

    python -m training.benchmarks.images.benchmark --config training/configs/benchmark_digits.yaml

Trains what is missing (teacher, classifier, students, baselines), draws the same number of images by every method from
the same noise, measures them against real ones, and writes OUTPUT_DIR/results.json, and with it the tables and figures
of OUTPUT_DIR. A row that is there is not measured again, and only what a missing row needs is trained, where a training
that was stopped goes on (that of a classifier, a minute, starts anew). So start a benchmark that was stopped again. To
measure anew, name another --output_dir; to train anew, another --runs_dir too.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, LCMScheduler
from tqdm import tqdm

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.cli import read_distillation
from hsivi_diffusers.distillation.config import HSIVIConfig, read_settings
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.metrics import Measures
from hsivi_diffusers.evaluation.pages import measured_on
from hsivi_diffusers.evaluation.solvers import Sampler, Solver, make_solver, make_student, sample
from hsivi_diffusers.folders import LOCK, in_turn, remove_folder, replace_folder
from hsivi_diffusers.options import differences, option, parse_options, run_command

from .benchmark_pages import BASELINE, is_shown, write_pages
from .benchmark_results import Key, Recipe, Results, key_of, recipe_of
from .sets import load_images

DISTIL = "hsivi_diffusers distil"
RESUME = ("--resume_from_checkpoint", "latest")
ANEW = ("--overwrite_output_dir", "true")


@dataclass
class Parts:
    _group = "what is compared"
    dataset: str | None = option(None, "name of the set in the tables")
    teacher: str | None = option(None, "folder of the teacher; trained if it is missing")
    teacher_config: str | None = option(None, "config of train_teacher.py")
    classifier: str | None = option(None, "folder of the ImageClassifier; trained if it is missing")
    classifier_config: str | None = option(None, "config of train_classifier.py")
    real_data: str = option("digits", "real images, see train_teacher.py")
    students: list[str] = option([], "configs of train_hsivi.py, each with the options it is given besides, if any")
    baseline: str | None = option(None, "config of train_consistency.py; it is given the time of --baseline_of")
    baseline_of: str | None = option(None, "the one of --students whose training seconds the baseline is given")
    baseline_steps: list[int] = option([1, 2, 4, 8], "network calls of the baseline")
    seeds: list[int] = option([0, 1, 2], "training seeds of students and baselines")


@dataclass
class Sampling:
    _group = "sampling"
    solvers: list[str] = option(
        ["DDIM", "DPM-Solver++", "DPM-Solver++ SDE", "UniPC", "DEIS", "DDPM"], "solvers of the teacher"
    )
    solver_steps: list[int] = option([1, 2, 3, 4, 5, 8, 10, 15, 20, 50, 100], "their network calls")
    ddpm_steps: list[int] = option([1000], "further network calls of DDPM, if it is among the solvers")
    num_samples: int = option(10_000, "images of each row")
    batch_size: int = option(500, "images at once")
    eval_seed: int = option(0, "seed of the noise")


@dataclass
class Folders:
    _group = "folders"
    output_dir: str = option("docs/benchmarks", "results, images, tables and figures")
    runs_dir: str = option("runs/benchmark", "trainings, in a folder for each set")


@dataclass(frozen=True)
class Entry:
    """A row before it is measured; `make` trains what it needs, and returns the sampler and the folder of its training.

    `recipe` has the options of a student, so that rows of other options are told from it.
    """

    method: str
    nfe: int
    seed: int | None
    make: Callable[[], tuple[Sampler, Path | None]] = field(compare=False)
    recipe: Recipe = field(default=None, compare=False)

    @property
    def key(self) -> Key:
        """Method, network calls and training seed."""
        return self.method, self.nfe, self.seed


class Comparison:
    """Teacher, measures and results of one set."""

    def __init__(self, parts: Parts, sampling: Sampling, folders: Folders) -> None:
        self.parts, self.sampling = parts, sampling
        # What a row tells of its images; the noise of a batch depends on its size.
        self.drawn = {name: getattr(sampling, name) for name in ("num_samples", "batch_size", "eval_seed")}
        self.runs = Path(folders.runs_dir) / str(parts.dataset)
        self.results = Results(Path(folders.output_dir), str(parts.dataset))
        for folder in (self.runs, self.results.path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        _make(Path(str(parts.teacher)), f"{__package__}.train_teacher", parts.teacher_config, *RESUME)
        _make(Path(str(parts.classifier)), f"{__package__}.train_classifier", parts.classifier_config, *ANEW)
        self.unet, self.schedule = load_teacher(str(parts.teacher))
        self.unet.eval().to(memory_format=torch.channels_last)  # a fifth faster on a CPU, the same images

    def entries(self) -> list[Entry]:
        """Every row: what is trained first, then the solvers, the cheap ones first."""
        trained = [entry for config in self.parts.students for entry in self._students(config)]
        if self.parts.baseline is not None:
            trained += [
                Entry(BASELINE, nfe, seed, partial(self._make_baseline, nfe, seed))
                for seed in self.parts.seeds
                for nfe in self.parts.baseline_steps
            ]
        keys = [entry.key for entry in trained]
        if twice := sorted({f"{key[0]} at {key[1]}" for key in keys if keys.count(key) > 1}):
            raise ValueError(
                f"--students have {', '.join(twice)} more than once: compare one student of each preset and number of "
                "calls, and the others in another --output_dir"
            )
        counts = [(method, nfe) for nfe in self.sampling.solver_steps for method in self.sampling.solvers]
        if "DDPM" in self.sampling.solvers:
            counts += [("DDPM", nfe) for nfe in self.sampling.ddpm_steps]
        solvers = [make_solver(*count, self.unet, self.schedule.config) for count in counts]
        drawn = [partial(lambda solver: (solver, None), solver) for solver in solvers]
        return [*trained, *(Entry(*count, None, make) for count, make in zip(counts, drawn, strict=True))]

    def _students(self, config: str) -> Iterator[Entry]:
        for seed in self.parts.seeds:
            settings = self._config(config, seed)
            name = "HSIVI paper" if settings.preset == "paper" else "HSIVI fast"
            name += ", one for all" if len(settings.depths) > 1 else ""
            for nfe in settings.depths:
                yield Entry(name, nfe, seed, partial(self._make_student, config, nfe, seed), recipe_of(settings))

    def _config(self, config: str, seed: int) -> HSIVIConfig:
        """The settings of a student, refused now and not after the trainings before it if they cannot run."""
        return read_distillation(self._arguments(config, seed), config, "")[1]

    def _arguments(self, config: str, seed: int) -> list[str]:
        """What the program of a config is called with, for the teacher and a seed."""
        return ["--config", *shlex.split(config), f"--seed={seed}", f"--pretrained_teacher_model={self.parts.teacher}"]

    def _make_student(self, config: str, nfe: int, seed: int) -> tuple[Sampler, Path]:
        folder = self._train_student(config, seed)
        return make_student(HSIVIPipeline.from_pretrained(folder / "pipeline"), nfe), folder

    def _make_baseline(self, nfe: int, seed: int) -> tuple[Sampler, Path]:
        seconds = self._baseline_seconds(seed)
        limit = ["--max_train_seconds", str(seconds), *RESUME]
        folder = self._train(str(self.parts.baseline), seed, f"{__package__}.train_consistency", limit)
        if (given := _costs(folder)["max_train_seconds"]) != seconds:
            raise ValueError(
                f"{folder} was given {given} s, and the student that it is compared with had {seconds} s: "
                "remove it and its rows, or name another --runs_dir and --output_dir"
            )
        pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
        return Solver(LCMScheduler.from_config(pipeline.scheduler.config), nfe, pipeline.unet), folder

    def _baseline_seconds(self, seed: int) -> float:
        """Training seconds of the student that a baseline is compared with: from its row, if there is one."""
        config = str(self.parts.baseline_of)
        keys = {entry.key for entry in self._students(config) if entry.seed == seed}
        known = [row["train_seconds"] for row in self.results.rows() if key_of(row) in keys]
        return float(known[0] if known else _costs(self._train_student(config, seed))["seconds"])

    def _train_student(self, config: str, seed: int) -> Path:
        """The folder of a student; one that was trained before with other options is refused."""
        folder = self._train(config, seed, DISTIL, RESUME)
        before = read_settings(folder / "options.json")
        if changed := differences(before, self._config(config, seed).settings()):
            raise ValueError(
                f"{folder} was trained with other options than {config} has ({changed}): name another "
                "--runs_dir and --output_dir, or remove it and its rows"
            )
        return folder

    def _train(self, config: str, seed: int, program: str, arguments: Sequence[str]) -> Path:
        """The folder of the training of a config and a seed: done before, or now."""
        path, *others = shlex.split(config)
        name = "_".join(
            [Path(path).stem, *(word.removeprefix("--").replace("/", "-") for word in others), f"seed{seed}"]
        )
        folder = self.runs / name
        if not (folder / "training.json").exists():
            _call(program, [*self._arguments(config, seed), "--output_dir", str(folder), *arguments])
        return folder

    def measure(self) -> None:
        """Adds the rows that are missing, one after the other."""
        entries = self.entries()
        there = self.results.keys({entry.key: entry.recipe for entry in entries}, self.drawn)
        wanted = [entry for entry in entries if entry.key not in there]
        if not wanted:
            return
        real, _ = load_images(self.parts.real_data, self.unet.config.sample_size, self.unet.config.in_channels)
        measures = Measures(ImageClassifier.from_pretrained(self.parts.classifier).eval(), real.float() / 255)
        progress = tqdm(wanted, desc=str(self.parts.dataset), unit="row")
        for entry in progress:
            progress.set_postfix_str(f"{entry.method} at {entry.nfe}")
            sampler, folder = entry.make()
            images = self._draw(entry, sampler)
            try:
                measured = measures(images)
            except ValueError as error:
                error.add_note(f"These are the images of {entry.method} at {entry.nfe} calls, seed {entry.seed}.")
                raise
            if entry.seed in (None, self.parts.seeds[0]) and is_shown(entry.method, entry.nfe):
                self.results.keep_images(f"{entry.method} at {entry.nfe}", images[:16], real)  # before the row
            shares = {"class_shares": measures.shares, "real_class_shares": measures.real_shares}
            self.results.add(self._row(entry, folder, {**measured, **shares}))

    def _draw(self, entry: Entry, sampler: Sampler) -> torch.Tensor:
        settings = self.sampling
        return torch.cat(list(sample(sampler, settings.num_samples, settings.batch_size, settings.eval_seed)))

    def _row(self, entry: Entry, folder: Path | None, measured: dict[str, Any]) -> dict[str, Any]:
        costs = _costs(folder) if folder else {}
        return {
            "dataset": self.parts.dataset,
            "method": entry.method,
            "nfe": entry.nfe,
            "train_seed": entry.seed,
            **self.drawn,
            **measured,
            "train_seconds": costs.get("seconds"),
            "train_calls": costs.get("network_calls"),
            "recipe": entry.recipe,
            "measured": measured_on(),
        }


def _costs(folder: Path) -> dict[str, Any]:
    """What a training cost, and the options it had."""
    costs: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return costs


def _make(folder: Path, program: str, config: str | None, *arguments: str) -> None:
    """Trains a part that is missing; one that was stopped goes on, if the arguments say so."""
    if folder.is_dir():
        return
    if config is None:
        raise ValueError(f"{folder} is missing: give the config of {program} that makes it, or another folder")
    partial = folder.with_name(f"{folder.name}.partial")
    _call(program, ["--config", config, "--output_dir", str(partial), *arguments])
    replace_folder(partial, folder)
    remove_folder(folder / "checkpoints")
    (folder / LOCK).unlink(missing_ok=True)


def _call(program: str, arguments: list[str]) -> None:
    """Runs a program, given as a module, to its end."""
    done = subprocess.run([sys.executable, "-m", *program.split(), *arguments], check=False)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(arguments)} ended with status {done.returncode}: see above")


def main(args: list[str] | None = None) -> None:
    parts, sampling, folders = parse_options([Parts, Sampling, Folders], __doc__ or "", args=args)
    missing = [name for name in ("dataset", "teacher", "classifier") if not getattr(parts, name)]
    if missing:
        raise ValueError(f"--{', --'.join(missing)} missing: give --config training/configs/benchmark_digits.yaml")
    if (parts.baseline is None) != (parts.baseline_of is None):
        raise ValueError("--baseline and --baseline_of go together: the second says how long the first may train")
    if parts.baseline_of not in (None, *parts.students):
        raise ValueError(f"--baseline_of {parts.baseline_of} is not among --students: give one of them, word for word")
    comparison = Comparison(parts, sampling, folders)
    comparison.measure()
    with in_turn(Path(folders.output_dir)):
        write_pages(Path(folders.output_dir))
    print(f"tables and figures are in {Path(folders.output_dir) / 'index.md'}, the rows in {comparison.results.path}")


if __name__ == "__main__":
    run_command(main)
