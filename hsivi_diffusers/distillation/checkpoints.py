"""Checkpoints that survive a crash at any moment: complete under their name or absent, and verified on loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..folders import claim_output_dir, remove_folder, replace_folder, sole_writer, write_json
from ..options import changes_since, flatten, option

FINISHED = "checkpoints/checkpoint-*/progress.json"  # in the folder of a run


@dataclass
class Output:
    _argument_group_name = "run"
    output_dir: str | None = option(None, "folder of the run")
    overwrite_output_dir: bool = option(False, "start anew in a folder that is not empty, removing an earlier run")
    resume_from_checkpoint: str | None = option(None, "`latest`, or the path of a checkpoint")
    checkpointing_steps: int = option(500, "updates between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints that are kept")


def check_output(run: Output) -> None:
    """Refuses numbers below 1, and a run that is to start anew and to go on."""
    for name in ("checkpointing_steps", "checkpoints_total_limit"):
        if getattr(run, name) < 1:
            raise ValueError(f"--{name} {getattr(run, name)}: give a number of at least 1")
    if run.overwrite_output_dir and run.resume_from_checkpoint:
        raise ValueError(
            f"--overwrite_output_dir starts anew and --resume_from_checkpoint {run.resume_from_checkpoint} goes on: "
            "pass one of them"
        )


@contextmanager
def claimed(run: Output) -> Iterator[Path]:
    """Makes the output folder or refuses, and keeps other processes out of it for as long as it lasts.

    Raises:
        ValueError: See `claim_output_dir` and `sole_writer`. A resumed run may write to the folder of an earlier one.
    """
    place, resumes = Path(str(run.output_dir)), run.resume_from_checkpoint is not None
    if resumes and place.is_dir() and any(place.iterdir()) and not _holds_run(place):
        raise ValueError(
            f"--output_dir {place} is not empty and holds no run to go on with: name another folder, or pass "
            f"--overwrite_output_dir in the place of --resume_from_checkpoint {run.resume_from_checkpoint}"
        )
    path = claim_output_dir(run.output_dir, run.overwrite_output_dir or resumes)
    with sole_writer(path):
        yield path


def _holds_run(path: Path) -> bool:
    """Tells whether a folder is of a run."""
    return (path / "options.json").is_file() or (path / "checkpoints").is_dir()


def start_run(run: Output, groups: Sequence[Any], leftovers: Sequence[str], remedy: str = "") -> None:
    """Records the options of a run and removes what an earlier one left, or checks that a resumed run has the same.

    Args:
        run: What was asked for.
        groups: Dataclasses of the options that decide what is trained.
        leftovers: Files and folders of an earlier run, which a new one removes; `checkpoints` is one without saying.
            The first is there when a run has ended, and not before.
        remedy: What else may be done with a run of other options.

    Raises:
        ValueError: A resumed run has other options than before, or it has ended and its checkpoints are gone.
    """
    output_dir, checkpoint = Path(str(run.output_dir)), run.resume_from_checkpoint
    path = output_dir / "options.json"
    recorded = [] if checkpoint is None else [path]
    if checkpoint not in (None, "latest"):
        recorded.append(Path(str(checkpoint)).parent.parent / "options.json")
    for record in filter(Path.is_file, recorded):
        if changed := changes_since(record, groups):
            raise ValueError(
                f"{record.parent} holds a run with other options ({changed}): name another --output_dir{remedy}, or "
                "start anew with --overwrite_output_dir and without --resume_from_checkpoint"
            )
    if checkpoint is None:
        for old in (output_dir / name for name in (*leftovers, "checkpoints")):
            if old.is_dir() and not old.is_symlink():
                remove_folder(old)
            else:
                old.unlink(missing_ok=True)
    elif checkpoint == "latest" and (output_dir / leftovers[0]).exists() and not any(output_dir.glob(FINISHED)):
        raise ValueError(
            f"{output_dir} holds a run that has ended, and no checkpoint to go on from: name another --output_dir, or "
            "start anew with --overwrite_output_dir and without --resume_from_checkpoint"
        )
    write_json(path, flatten(groups))


class State(Protocol):
    """What is trained, beside what accelerate knows of."""

    @property
    def shards(self) -> int:
        """Batches of an update, in all processes."""

    def check_finite(self, step: int) -> None:
        """Raises an error of its own if a weight is not finite after so many updates."""

    def save_state(self, folder: Path) -> None:
        """Writes what this process has and accelerate does not save."""

    def load_state(self, folder: Path) -> None:
        """Restores what `save_state` wrote, after accelerate restored its part."""


class Registered:
    """The state of a training of which accelerate saves everything.

    Args:
        accelerator: Of the process.
        ema: The averaged weights, or None if there are none.
        parts: What else has a `state_dict` and was not prepared by accelerate.
    """

    def __init__(self, accelerator: Accelerator, ema: EMAModel | None, *parts: Any) -> None:
        self.accelerator, self.ema = accelerator, ema
        accelerator.register_for_checkpointing(*([] if ema is None else [ema]), *parts)

    @property
    def shards(self) -> int:
        """Batches of an update, one in each process."""
        return self.accelerator.num_processes

    def check_finite(self, step: int) -> None:
        """Raises FloatingPointError if an averaged weight is not finite."""
        averages = [] if self.ema is None else self.ema.shadow_params
        if not all(bool(torch.isfinite(parameter).all()) for parameter in averages):
            raise FloatingPointError(f"a weight is not finite after {step} updates: lower --learning_rate")

    def save_state(self, folder: Path) -> None:
        """Nothing is left to save."""

    def load_state(self, folder: Path) -> None:
        """Moves the averages from the CPU, where accelerate loads them."""
        if self.ema is not None:
            self.ema.to(self.accelerator.device)


class Checkpoints:
    """Folders OUTPUT_DIR/checkpoints/checkpoint-STEP.

    Each holds what accelerate saves, what the state saves, and progress.json, written last: updates done, seconds
    spent, number of shards, and the SHA-256 of every other file.
    """

    def __init__(self, run: Output, accelerator: Accelerator, state: State) -> None:
        self.folder = Path(str(run.output_dir)) / "checkpoints"
        self.run, self.accelerator, self.state = run, accelerator, state

    def save(self, step: int, seconds: float) -> None:
        """Saves the state after `step` updates, under its final name only when it is all on the disk.

        Nothing is written if a weight is not finite: see `State.check_finite` for the error.
        """
        self.state.check_finite(step)
        final, partial = self.folder / f"checkpoint-{step}", self.folder / f"partial-{step}"
        self.accelerator.save_state(str(partial))
        self.state.save_state(partial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(partial / "progress.json", _progress(partial, step, seconds, self.state.shards))
            replace_folder(partial, final)
            written = [path for path in self.finished() if _step(path) <= step]  # a later one may be damaged
            for old in written[: -self.run.checkpoints_total_limit]:
                remove_folder(old)
        self.accelerator.wait_for_everyone()

    def finished(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path.parent for path in self.folder.parent.glob(FINISHED) if not path.parent.suffix]
        return sorted(found, key=_step)

    def load(self) -> tuple[int, float]:
        """Restores what --resume_from_checkpoint names; returns updates done and seconds spent.

        `latest` takes the newest checkpoint that is whole. What a run that was killed left half written goes.

        Raises:
            ValueError: The checkpoint that was named is missing or damaged, all are damaged, or it is of another number
                of shards.
        """
        if self.accelerator.is_main_process:
            for stale in [*self.folder.glob("partial-*"), *self.folder.glob("*.retired")]:
                remove_folder(stale)
        self.accelerator.wait_for_everyone()
        path = self._choose()
        if path is None:
            return 0, 0.0
        progress = json.loads((path / "progress.json").read_text())
        shards = self.state.shards
        if progress["shards"] != shards:
            raise ValueError(
                f"{path} is of a run with {progress['shards']} batches an update, now there are {shards}: choose "
                "the processes and, where there are any, --gradient_accumulation_steps so that their product is as many"
            )
        if self.accelerator.scaler is not None and not (path / "scaler.pt").is_file():
            raise ValueError(f"{path} was not trained in fp16 and has no loss scale: resume it with another precision")
        self.accelerator.load_state(str(path))
        self.state.load_state(path)
        return progress["step"], progress["seconds"]

    def _choose(self) -> Path | None:
        name = self.run.resume_from_checkpoint
        if name is None:
            return None
        if name != "latest":
            if damage := find_damage(Path(name)):
                raise ValueError(f"--resume_from_checkpoint {damage}: name one of {self.folder}, or latest")
            return Path(name)
        damages = []
        for path in reversed(self.finished()):
            damage = find_damage(path)
            if damage is None:
                return path
            self.accelerator.print(f"passed over: {damage}")
            damages.append(damage)
        if damages:
            raise ValueError(
                f"no checkpoint of {self.folder} is whole ({'; '.join(damages)}): start anew with "
                "--overwrite_output_dir and without --resume_from_checkpoint"
            )
        return None


def find_damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, or None if every byte is as it was written."""
    if not (path / "progress.json").is_file():
        return f"{path} holds no checkpoint"
    try:
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        seal = progress.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{path}/progress.json is damaged"
    if seal != _digest(json.dumps(progress, sort_keys=True).encode()):
        return f"{path}/progress.json is damaged"
    for name, digest in progress["files"].items():
        if not (path / name).is_file():
            return f"{path} lacks {name}"
        if _file_digest(path / name) != digest:
            return f"{path / name} is damaged"
    return None


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _progress(folder: Path, step: int, seconds: float, shards: int) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): _file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "progress.json"
    }
    progress = {"step": step, "seconds": seconds, "shards": shards, "files": files}
    return {**progress, "sha256": _digest(json.dumps(progress, sort_keys=True).encode())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
