"""The trainings of a benchmark, each done once: students, baselines, and parts that are missing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hsivi_diffusers.commands.cli import parse_distillation
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.runs.artifacts import OPTIONS, TRAINING, read_record
from hsivi_diffusers.runs.folders import LOCK, remove_folder, replace_folder
from hsivi_diffusers.runs.options import differences
from hsivi_diffusers.teachers.loading import load_teacher
from hsivi_diffusers.teachers.teacher import Teacher

from . import train_baseline
from .benchmark_results import recorded

DISTIL = "hsivi_diffusers distil"
RESUME = ("--resume_from_checkpoint", "latest")
START = "--init_from"
ANEW = ("--overwrite_output_dir", "true")
Costs = dict[str, Any]  # of a training: its training.json


class Trainings:
    """Students and baselines of one teacher, at one scale of guidance.

    Args:
        runs: Folder of their folders. Students of several scales are beside it, for other scales share them.
        teacher: Folder of the teacher.
        guidance_scale: The scale that students take in, or have among several; None without guidance.
    """

    def __init__(self, runs: Path, teacher: str, guidance_scale: float | None) -> None:
        self.runs, self.teacher, self.guidance_scale = runs, teacher, guidance_scale

    def settings(self, config: str, seed: int) -> HSIVIConfig:
        """The settings of a student, with the scale of guidance if it names none.

        At scale 1, none, it is not trained on the last class of the teacher, "no class".

        Raises:
            ValueError: It cannot run, or has other scales.
        """
        settings: HSIVIConfig
        _, settings, _ = parse_distillation(self._arguments(config, seed), config, "")
        settings.check()
        if settings.guidance_scale is None and self.guidance_scale is not None:
            settings.guidance_scale = self.guidance_scale
        if settings.scales and self.guidance_scale not in settings.scales:
            raise ValueError(
                f"--students {config} has guidance_scale {settings.scales}, and the benchmark {self.guidance_scale}: "
                "leave it out, or let it be among several"
            )
        if self.guidance_scale == 1 and settings.scales == [1] and not (settings.prompts or settings.class_shares):
            settings.class_shares = [1.0] * self._teacher.num_conditions(guides=True)
            settings.class_shares += [0.0] * (self._teacher.num_conditions() - len(settings.class_shares))
        return settings

    def student(self, config: str, seed: int, settings: HSIVIConfig) -> tuple[Path, Costs]:
        """Folder and cost of a student of `settings`, with that of the one it starts from.

        That one is named by `--init_from {runs}/NAME_seed{seed}`, and is trained before.
        """
        words = ["--guidance_scale", *map(str, settings.scales)] if settings.scales else []
        words += ["--class_shares", *map(str, settings.class_shares)] if settings.class_shares else []
        folder, costs = self._train(config, seed, DISTIL, [*RESUME, *words], shared=len(settings.scales) > 1)
        if changed := differences(recorded(read_record(folder / OPTIONS), settings), settings.settings()):
            raise ValueError(
                f"{folder} was trained with other options than {config} has ({changed}): name another "
                "--runs_dir and --output_dir, or remove it and its rows"
            )
        return folder, self._with_start(costs, settings.init_from)

    def _with_start(self, costs: Costs, start: str | None) -> Costs:
        """The cost of a run with that of the run it starts from, and so on."""
        if start is None:
            return costs
        before = json.loads((Path(start) / TRAINING).read_text())
        before = self._with_start(before, read_record(Path(start) / OPTIONS)["init_from"])
        pairs = {name: (costs[name], before[name]) for name in ("seconds", "network_calls")}
        return costs | {name: None if None in pair else sum(pair) for name, pair in pairs.items()}

    def baseline(self, config: str, seed: int, seconds: float, calls: int) -> tuple[Path, Costs]:
        """Folder and cost of a baseline that has at least so many seconds and network calls."""
        limit = [f"--max_train_seconds={seconds}", f"--min_network_calls={calls}", *RESUME]
        folder, costs = self._train(config, seed, f"{__package__}.train_baseline", limit)
        if changed := differences(costs, train_baseline.settings_of(config)):
            raise ValueError(
                f"{folder} was trained with other options than {config} has ({changed}): remove it and its rows, or "
                "name another --runs_dir and --output_dir"
            )
        if (costs["max_train_seconds"], costs["min_network_calls"]) != (seconds, calls):
            raise ValueError(
                f"{folder} was not given the cost of what it is compared with, {seconds} s and {calls} "
                "network calls: remove it and its rows, or name another --runs_dir and --output_dir"
            )
        return folder, costs

    def _arguments(self, config: str, seed: int) -> list[str]:
        """What the program of a config is called with, for the teacher and a seed."""
        words = [word.format(runs=self.runs, seed=seed) for word in shlex.split(config)]
        return ["--config", *words, f"--seed={seed}", f"--pretrained_teacher_model={self.teacher}"]

    def _train(
        self, config: str, seed: int, program: str, arguments: Sequence[str], shared: bool = False
    ) -> tuple[Path, Costs]:
        """Folder and cost of the training of a config and a seed: done before, or now."""
        path, *others = shlex.split(config)
        if START in others:
            del others[others.index(START) : others.index(START) + 2]
        words = [word.removeprefix("--").replace("/", "-") for word in others]
        runs = self.runs.with_name(f"scales_of_{Path(self.teacher).name}") if shared else self.runs
        folder = runs / "_".join([Path(path).stem, *words, f"seed{seed}"])
        if not (folder / TRAINING).exists():
            call(program, [*self._arguments(config, seed), "--output_dir", str(folder), *arguments])
        costs = json.loads((folder / TRAINING).read_text())
        if "teacher_sha256" in costs and costs["teacher_sha256"] != self._teacher_sha256:
            raise ValueError(
                f"{folder} was trained of another teacher than {self.teacher} is now: name another --runs_dir and "
                "--output_dir, or remove it and its rows"
            )
        return folder, costs

    @cached_property
    def _teacher(self) -> Teacher:
        return load_teacher(self.teacher)

    @cached_property
    def _teacher_sha256(self) -> str:
        return train_baseline.hash_teacher(self._teacher)


def make(folder: Path, program: str, config: str | None, *arguments: str) -> None:
    """Trains a part that is missing; one that was stopped continues, if the arguments say so."""
    if folder.is_dir():
        return
    if config is None:
        raise ValueError(f"{folder} is missing: give the config of {program} that makes it, or another folder")
    partial = folder.with_name(f"{folder.name}.partial")
    call(program, ["--config", config, "--output_dir", str(partial), *arguments])
    replace_folder(partial, folder)
    remove_folder(folder / "checkpoints")
    (folder / LOCK).unlink(missing_ok=True)


def call(program: str, arguments: list[str]) -> None:
    """Runs a program, given as a module, to its end."""
    done = subprocess.run([sys.executable, "-m", *program.split(), *arguments], check=False)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(arguments)} ended with status {done.returncode}: see above")
