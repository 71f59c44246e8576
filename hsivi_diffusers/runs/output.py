"""The output folder of a run: checked and claimed before it is written, with the options and sealed checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifacts import OPTIONS, PROMPTS, read_record
from .folders import LOCK, check_output_dir, remove_folder, sole_writer
from .options import differences, option
from .page import LOG, PAGE

OPTIONS_WRITTEN = {OPTIONS, f"{OPTIONS}.partial"}
WRITTEN_AT_ONCE = {f"{name}{end}" for name in (PAGE, LOG, PROMPTS) for end in ("", ".partial")}
STARTED = (
    OPTIONS_WRITTEN | WRITTEN_AT_ONCE | {"logs", "samples", "checkpoints", "pairs"}
)  # in a folder before the first checkpoint
RESUMPTION = (
    ", or resume a training with --resume_from_checkpoint latest; in Python HSIVIConfig(overwrite_output_dir=True), or "
    "trainer.train(resume_from_checkpoint='latest')"
)
TEACHER = "pretrained_teacher_model"
ANEW = "start over with --overwrite_output_dir and without --resume_from_checkpoint"

Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass
class Output:
    _group = "run"
    output_dir: str | None = option(None, "folder of the run")
    overwrite_output_dir: bool = option(False, "start over in a folder that is not empty; removes the earlier run")
    resume_from_checkpoint: str | None = option(None, "`latest`, or the path of a checkpoint")
    checkpointing_steps: int = option(500, "updates between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints to keep")


def check_output(run: Output) -> None:
    """Refuses, with ValueError, numbers below 1, and a run that is to start over and to continue."""
    for name in ("checkpointing_steps", "checkpoints_total_limit"):
        if getattr(run, name) < 1:
            raise ValueError(f"--{name} {getattr(run, name)}: give a number of at least 1")
    if run.overwrite_output_dir and run.resume_from_checkpoint:
        raise ValueError(
            f"--overwrite_output_dir starts over and --resume_from_checkpoint {run.resume_from_checkpoint} continues: "
            "pass one of them"
        )


def check_inputs(run: Output, written: Sequence[str], **inputs: str | Path | None) -> None:
    """Refuses, with ValueError, an input that the run would overwrite or remove.

    Args:
        run: Its output folder need not exist yet.
        written: Names of the files and folders in the output folder that a run writes, beside `checkpoints`.
        inputs: By option, the path of a file or folder, or the id of a repo.
    """
    output = Path(str(run.output_dir)).resolve()
    removed = {output / name for name in ("checkpoints", *written)}
    for name, given in inputs.items():
        path = Path(given or "").resolve()
        if given is not None and path.exists() and removed & {path, *path.parents}:
            raise ValueError(
                f"{name}={str(given)!r} lies among the files that a run in --output_dir {run.output_dir} removes: name "
                "another folder"
            )


def starting_run(init_from: str | None) -> Path | None:
    """Returns the folder of the finished run that `init_from` names; None if it names something else, or nothing.

    Raises:
        ValueError: The run has not ended.
    """
    run = Path(init_from or "")
    if init_from is None or not _holds_run(run):
        return None
    missing = [name for name in ("pipeline", "critic", OPTIONS) if not (run / name).exists()]
    if missing:
        raise ValueError(f"init_from={init_from!r} lacks {', '.join(missing)}: give the folder of a finished run")
    return run


def _holds_run(path: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (path / OPTIONS).is_file() or (path / "checkpoints").is_dir()


def check_place(run: Output) -> Path:
    """Returns the output folder, which need not exist yet.

    Raises:
        ValueError: See `check_output_dir`. A resumed run may write to the folder of an earlier one, and any run to that
            of one that stopped before its first checkpoint.
    """
    path, resumes = Path(str(run.output_dir)), run.resume_from_checkpoint is not None
    anew = path.is_dir() and _only_started(path)
    if resumes and path.is_dir() and not anew and not _holds_run(path):
        raise ValueError(
            f"--output_dir {path} is not empty and holds no run to continue with: name another folder, or pass "
            f"--overwrite_output_dir instead of --resume_from_checkpoint {run.resume_from_checkpoint}"
        )
    return check_output_dir(run.output_dir, run.overwrite_output_dir or resumes or anew, RESUMPTION)


@contextmanager
def claimed(run: Output) -> Iterator[Path]:
    """Makes the output folder or refuses, and locks it.

    Raises:
        ValueError: See `check_place` and `sole_writer`.
    """
    path = check_place(run)
    path.mkdir(parents=True, exist_ok=True)
    with sole_writer(path):
        yield path


def _only_started(path: Path) -> bool:
    """Whether a folder holds only the start of a run that stopped before its first checkpoint."""
    checkpoints, names = path / "checkpoints", {entry.name for entry in path.iterdir()} - {LOCK}
    unfinished = all(is_partial(entry) for entry in checkpoints.iterdir()) if checkpoints.is_dir() else True
    return unfinished and names <= STARTED and (bool(names & OPTIONS_WRITTEN) or not names)


def start_run(
    run: Output,
    settings: Mapping[str, Any],
    leftovers: Sequence[str],
    remedy: str = "",
    complete: Complete = dict,
) -> None:
    """Removes what an earlier run left, or checks that a resumed run has the options that it had.

    Args:
        run: Output folder, and whether to resume.
        settings: Options that a resumed run must have in common with the earlier one.
        leftovers: Files and folders that a new run removes, beside `checkpoints`; the first marks the end of a run.
        remedy: Addition to the message about other options.
        complete: Turns recorded settings into those that a run of today would record.

    Raises:
        ValueError: A resumed run has other options than before, or it has ended and its checkpoints are gone.
    """
    output_dir, checkpoint = Path(str(run.output_dir)), run.resume_from_checkpoint
    if checkpoint is None:
        for old in (output_dir / name for name in (*leftovers, "checkpoints")):
            if old.is_dir() and not old.is_symlink():
                remove_folder(old)
            else:
                old.unlink(missing_ok=True)
    else:
        for folder, recorded in _recorded(output_dir, checkpoint):
            if settings.get(TEACHER) and TEACHER in recorded and recorded[TEACHER] is None:
                raise ValueError(
                    f"{folder} holds a run whose teacher was loaded in Python: resume it there, with that pipeline, "
                    f"name another --output_dir{remedy}, or {ANEW}"
                )
            if changed := differences(complete(recorded), settings):
                raise ValueError(
                    f"{folder} holds a run with other options ({changed}): resume with the same ones, name another "
                    f"--output_dir{remedy}, or {ANEW}"
                )
    if checkpoint == "latest" and (output_dir / leftovers[0]).exists() and not finished(output_dir):
        raise ValueError(
            f"{output_dir} holds a run that has ended, and no checkpoint to continue from: name another --output_dir, "
            f"or {ANEW}"
        )


def _recorded(output_dir: Path, checkpoint: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and settings of the run to resume: from options.json, or from a checkpoint if it is missing."""
    record = output_dir / OPTIONS
    if record.is_file():
        yield output_dir, read_record(record)
    if not record.is_file() or checkpoint != "latest":
        named = finished(output_dir)[::-1] if checkpoint == "latest" else [Path(checkpoint)]
        path = next((path for path in named if find_damage(path) is None), None)
        if path is not None:
            yield path.parent.parent, read_progress(path)["identity"]


# ----- checkpoints as folders -----


def finished(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first: `checkpoint-` and digits, and no other folder."""
    found = (path.parent for path in output_dir.glob("checkpoints/checkpoint-*/progress.json"))
    return sorted((path for path in found if re.fullmatch("checkpoint-[0-9]+", path.name)), key=step_of)


def is_partial(path: Path) -> bool:
    """Whether a folder is an unfinished or half-removed checkpoint of a killed run."""
    return re.fullmatch(r"partial-[0-9]+|checkpoint-[0-9]+\.retired", path.name) is not None


def find_damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint; None if every byte is as it was written."""
    if not (path / "progress.json").is_file():
        return f"{path} holds no checkpoint"
    try:
        progress = read_progress(path)
        whole = progress.pop("sha256") == _digest(progress)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        return f"{path}/progress.json is damaged"
    if "identity" not in progress:
        return f"{path} was written before version 0.2 and holds pickles, which are not read"
    for name, written in progress["files"].items():
        if not (path / name).is_file():
            return f"{path} lacks {name}"
        if _file_digest(path / name) != written:
            return f"{path / name} is damaged"
    return None


def read_progress(path: Path) -> dict[str, Any]:
    """Reads progress.json of a checkpoint."""
    return dict(json.loads((path / "progress.json").read_text(encoding="utf-8")))


def step_of(path: Path) -> int:
    """The number of updates before a checkpoint, by its name."""
    return int(path.name.split("-")[1])


def seal(folder: Path, progress: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the SHA-256 of every other file of a folder, and of the whole record."""
    files = {
        path.relative_to(folder).as_posix(): _file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "progress.json"
    }
    sealed = {**progress, "files": files}
    return {**sealed, "sha256": _digest(sealed)}


def _digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
