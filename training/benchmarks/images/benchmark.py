"""Compares few-step samplers of one teacher: solvers, our students, and a consistency model trained for as long.

    python -m training.benchmarks.images.benchmark --config training/configs/benchmark_digits.yaml

Trains what is missing (teacher, classifier, students, rivals), draws the same number of pictures by every method from
the same noise, measures them against real ones, and writes OUTPUT_DIR/results.json, and with it the tables and figures
of OUTPUT_DIR. A row that is there is not measured again, and only what a missing row needs is trained, where a training
that was stopped goes on (that of a classifier, a minute, starts anew): so a benchmark that was stopped is simply
started again. To measure anew, name another --output_dir; to train anew, another --runs_dir too.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.cli import read_distillation
from hsivi_diffusers.distillation.config import HSIVIConfig, read_settings
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.metrics import Measures
from hsivi_diffusers.evaluation.pages import measured_on
from hsivi_diffusers.evaluation.solvers import (
    SOLVERS,
    Sampler,
    make_consistency_sampler,
    make_solver,
    make_student,
    sample,
)
from hsivi_diffusers.folders import in_turn, remove_folder, replace_folder, write_json
from hsivi_diffusers.options import differences, option, parse_options

from .benchmark_pages import RIVAL, is_shown, pictures_path, write_pages
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
    real_data: str = option("digits", "real pictures, see train_teacher.py")
    students: list[str] = option([], "configs of train_hsivi.py, each with the options it is given besides, if any")
    rival: str | None = option(None, "config of train_consistency.py; it is given the time of --rival_of")
    rival_of: str | None = option(None, "the one of --students whose training seconds the rival is given")
    rival_steps: list[int] = option([1, 2, 4, 8], "network calls of the rival")
    seeds: list[int] = option([0, 1, 2], "training seeds of students and rivals")


@dataclass
class Sampling:
    _group = "sampling"
    solvers: list[str] = option(
        ["DDIM", "DPM-Solver++", "DPM-Solver++ SDE", "UniPC", "DEIS", "DDPM"], "solvers of the teacher"
    )
    solver_steps: list[int] = option([1, 2, 3, 4, 5, 8, 10, 15, 20, 50, 100], "their network calls")
    ddpm_steps: list[int] = option([1000], "further network calls of DDPM, if it is among the solvers")
    num_samples: int = option(10_000, "pictures of each row")
    slow_samples: int = option(10_000, "pictures of a row of more than 100 calls")
    batch_size: int = option(500, "pictures at once")
    eval_seed: int = option(0, "seed of the noise")


@dataclass
class Folders:
    _group = "folders"
    output_dir: str = option("docs/benchmarks", "results, pictures, tables and figures")
    runs_dir: str = option("runs/benchmark", "trainings, in a folder for each set")


@dataclass(frozen=True)
class Trained:
    """A sampler that was trained: its folder, and what its training cost."""

    folder: Path
    seconds: float
    network_calls: int | None


Key = tuple[str, int, int | None]  # method, network calls and training seed
Recipe = dict[str, Any] | None  # preset, steps, updates, and settings that are not those of the preset


@dataclass(frozen=True)
class Entry:
    """A row before it is measured; `make` trains what it needs, if that was not done before.

    `recipe` has the options of a student, so that rows of other options are told from it.
    """

    method: str
    nfe: int
    seed: int | None
    make: Callable[[], tuple[Sampler, Trained | None]] = field(compare=False)
    recipe: Recipe = field(default=None, compare=False)

    @property
    def key(self) -> Key:
        """Method, network calls and training seed."""
        return self.method, self.nfe, self.seed


class Comparison:
    """Teacher, measures and results of one set."""

    def __init__(self, parts: Parts, sampling: Sampling, folders: Folders) -> None:
        self.parts, self.sampling = parts, sampling
        self.runs = Path(folders.runs_dir) / str(parts.dataset)
        self.path = Path(folders.output_dir) / "results.json"
        for folder in (self.runs, self.path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        _make(Path(str(parts.teacher)), f"{__package__}.train_teacher", parts.teacher_config, *RESUME)
        _make(Path(str(parts.classifier)), f"{__package__}.train_classifier", parts.classifier_config, *ANEW)
        self.unet, self.schedule = load_teacher(str(parts.teacher))
        self.unet.eval().to(memory_format=torch.channels_last)  # a fifth faster on a CPU, the same pictures

    def entries(self) -> list[Entry]:
        """Every row: what is trained first, then the solvers, the cheap ones first.

        Raises:
            ValueError: Two students have a row in common.
        """
        trained = [entry for config in self.parts.students for entry in self._students(config)]
        if self.parts.rival is not None:
            trained += [
                Entry(RIVAL, nfe, seed, partial(self._make_rival, nfe, seed))
                for seed in self.parts.seeds
                for nfe in self.parts.rival_steps
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
        return [*trained, *(Entry(*count, None, partial(self._make_solver, *count)) for count in counts)]

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

    def _make_solver(self, method: str, nfe: int) -> tuple[Sampler, None]:
        return make_solver(method, nfe, self.unet, self.schedule.config), None

    def _make_student(self, config: str, nfe: int, seed: int) -> tuple[Sampler, Trained]:
        trained = self._train_student(config, seed)
        return make_student(HSIVIPipeline.from_pretrained(trained.folder / "pipeline"), nfe), trained

    def _make_rival(self, nfe: int, seed: int) -> tuple[Sampler, Trained]:
        seconds = self._rival_seconds(seed)
        limit = ["--max_train_seconds", str(seconds), *RESUME]
        trained = self._train(str(self.parts.rival), seed, f"{__package__}.train_consistency", limit)
        given = json.loads((trained.folder / "training.json").read_text())["max_train_seconds"]
        if given != seconds:
            raise ValueError(
                f"{trained.folder} was given {given} s, and the student that it is held against had {seconds} s: "
                "remove it and its rows, or name another --runs_dir and --output_dir"
            )
        pipeline = DDPMPipeline.from_pretrained(trained.folder / "pipeline")
        return make_consistency_sampler(pipeline.unet, pipeline.scheduler.config, nfe), trained

    def _rival_seconds(self, seed: int) -> float:
        """Training seconds of the student that a rival is held against: by its row, if there is one."""
        config = str(self.parts.rival_of)
        keys = {entry.key for entry in self._students(config) if entry.seed == seed}
        known = [row["train_seconds"] for row in self._rows() if _key(row) in keys]
        return float(known[0]) if known else self._train_student(config, seed).seconds

    def _train_student(self, config: str, seed: int) -> Trained:
        """The training of a student.

        Raises:
            ValueError: It was done before with other options.
        """
        trained = self._train(config, seed, DISTIL, RESUME)
        before = read_settings(trained.folder / "options.json")
        if changed := differences(before, self._config(config, seed).settings()):
            raise ValueError(
                f"{trained.folder} was trained with other options than {config} has ({changed}): name another "
                "--runs_dir and --output_dir, or remove it and its rows"
            )
        return trained

    def _train(self, config: str, seed: int, program: str, arguments: Sequence[str]) -> Trained:
        """The training of a config and a seed: done before, or now."""
        path, *others = shlex.split(config)
        name = "_".join(
            [Path(path).stem, *(word.removeprefix("--").replace("/", "-") for word in others), f"seed{seed}"]
        )
        folder = self.runs / name
        if not (folder / "training.json").exists():
            _call(program, [*self._arguments(config, seed), "--output_dir", str(folder), *arguments])
        costs = json.loads((folder / "training.json").read_text())
        return Trained(folder, costs["seconds"], costs.get("network_calls"))

    def measure(self) -> None:
        """Adds the rows that are missing, one after the other."""
        entries = self.entries()
        there = self._measured({entry.key: entry.recipe for entry in entries})
        wanted = [entry for entry in entries if entry.key not in there]
        if not wanted:
            return
        real, _ = load_images(self.parts.real_data, self.unet.config.sample_size, self.unet.config.in_channels)
        measures = Measures(ImageClassifier.from_pretrained(self.parts.classifier).eval(), real.float() / 255)
        progress = tqdm(wanted, desc=str(self.parts.dataset), unit="row")
        for entry in progress:
            progress.set_postfix_str(f"{entry.method} at {entry.nfe}")
            sampler, trained = entry.make()
            pictures = self._draw(entry, sampler)
            try:
                measured = measures(pictures)
            except ValueError as error:
                error.add_note(f"These are the pictures of {entry.method} at {entry.nfe} calls, seed {entry.seed}.")
                raise
            self._keep_pictures(entry, pictures[:16], real)  # first, for a row that is there is not drawn again
            shares = {"class_shares": measures.shares, "real_class_shares": measures.real_shares}
            self._add_row(entry, trained, {**measured, **shares})

    def _number(self, nfe: int) -> int:
        return self.sampling.num_samples if nfe <= 100 else self.sampling.slow_samples

    def _drawn(self, nfe: int) -> dict[str, int]:
        """What a row tells of its pictures; the noise of a batch depends on its size."""
        batch_size, eval_seed = self.sampling.batch_size, self.sampling.eval_seed
        return {"num_samples": self._number(nfe), "batch_size": batch_size, "eval_seed": eval_seed}

    def _draw(self, entry: Entry, sampler: Sampler) -> torch.Tensor:
        number = self._number(entry.nfe)
        return torch.cat(list(sample(sampler, number, self.sampling.batch_size, self.sampling.eval_seed)))

    def _add_row(self, entry: Entry, trained: Trained | None, measured: dict[str, Any]) -> None:
        row = {
            "dataset": self.parts.dataset,
            "method": entry.method,
            "nfe": entry.nfe,
            "train_seed": entry.seed,
            **self._drawn(entry.nfe),
            **measured,
            "train_seconds": trained.seconds if trained else None,
            "train_calls": trained.network_calls if trained else None,
            "recipe": entry.recipe,
            "measured": measured_on(),
        }
        with in_turn(self.path.parent):  # for another set may be measured at the same time
            write_json(self.path, {"rows": [*read_rows(self.path), row]})

    def _measured(self, recipes: Mapping[Key, Recipe]) -> set[Key]:
        """Keys of the rows that are there, where those of students should be of these recipes.

        Raises:
            ValueError: One is of other options or other pictures, and may not be compared.
        """
        rows = self._rows()
        for row in rows:
            if other := differences(row, self._drawn(row["nfe"])):
                raise ValueError(
                    f"{self.path} has {row['method']} at {row['nfe']} of other pictures ({other}): name another "
                    "--output_dir"
                )
            recipe = recipes.get(_key(row))
            if recipe is not None and (other := differences(_whole(row["recipe"]), _whole(recipe))):
                raise ValueError(
                    f"{self.path} has {row['method']} at {row['nfe']}, seed {row['train_seed']}, of other options than "
                    f"--students have now ({other}): remove that row, or name another --output_dir"
                )
        return {_key(row) for row in rows}

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of this set."""
        return [row for row in read_rows(self.path) if row["dataset"] == self.parts.dataset]

    def _keep_pictures(self, entry: Entry, pictures: torch.Tensor, real: torch.Tensor) -> None:
        """Keeps the first pictures of what the figures show, of the first seed, beside the results."""
        if entry.seed not in (None, self.parts.seeds[0]) or not is_shown(entry.method, entry.nfe):
            return
        path = pictures_path(self.path.parent, str(self.parts.dataset))
        drawn = (255 * pictures).round().to(torch.uint8)
        shown = real[torch.linspace(0, len(real) - 1, len(drawn)).long()]
        now = {f"{entry.method} at {entry.nfe}": drawn.contiguous(), "real": shown.contiguous()}
        with in_turn(path.parent):
            save_file({**(load_file(path) if path.exists() else {}), **now}, path)


def recipe_of(config: HSIVIConfig) -> dict[str, Any]:
    """Preset, steps and updates of a student, and its settings that are not those of the preset."""
    given: dict[str, Any] = {
        "preset": config.preset,
        "num_inference_steps": config.depths,
        "max_train_steps": config.max_train_steps,
    }
    usual = HSIVIConfig(**given).settings()
    others = {name: value for name, value in config.settings().items() if value != usual[name] and name != "seed"}
    return {**given, **others}


def _whole(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a recipe."""
    given = {name: recipe[name] for name in ("preset", "num_inference_steps", "max_train_steps")}
    return {**HSIVIConfig(**given).settings(), **recipe}


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


def _call(program: str, arguments: list[str]) -> None:
    """Runs a program, given as a module, to its end."""
    done = subprocess.run([sys.executable, "-m", *program.split(), *arguments], check=False)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(arguments)} ended with status {done.returncode}: see above")


def _key(row: Mapping[str, Any]) -> Key:
    """What a row is of, see `Entry.key`."""
    return row["method"], row["nfe"], row["train_seed"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results.json; none if there is no such file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def main(args: list[str] | None = None) -> None:
    parts, sampling, folders = parse_options([Parts, Sampling, Folders], __doc__ or "", args=args)
    missing = [name for name in ("dataset", "teacher", "classifier") if not getattr(parts, name)]
    if missing:
        raise ValueError(f"--{', --'.join(missing)} missing: give --config training/configs/benchmark_digits.yaml")
    if (parts.rival is None) != (parts.rival_of is None):
        raise ValueError("--rival and --rival_of go together: the second tells how long the first may train")
    if parts.rival_of not in (None, *parts.students):
        raise ValueError(f"--rival_of {parts.rival_of} is none of --students: give one of them, word for word")
    if unknown := [name for name in sampling.solvers if name not in SOLVERS]:  # now, and not after the trainings
        raise ValueError(f"--solvers {', '.join(unknown)} unknown: choose from {', '.join(SOLVERS)}")
    comparison = Comparison(parts, sampling, folders)
    comparison.measure()
    with in_turn(Path(folders.output_dir)):
        write_pages(Path(folders.output_dir))
    print(f"tables and figures are in {Path(folders.output_dir) / 'index.md'}, the rows in {comparison.path}")


if __name__ == "__main__":
    main()
