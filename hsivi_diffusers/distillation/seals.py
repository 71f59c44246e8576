"""Checkpoints as folders: which are finished, and whether every byte of one is as it was written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finished(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first: `checkpoint-` and digits, and no other folder."""
    found = (path.parent for path in output_dir.glob("checkpoints/checkpoint-*/progress.json"))
    return sorted((path for path in found if re.fullmatch("checkpoint-[0-9]+", path.name)), key=step_of)


def is_partial(path: Path) -> bool:
    """Whether a folder is what a killed run left of a checkpoint."""
    return re.fullmatch(r"partial-[0-9]+|checkpoint-[0-9]+\.retired", path.name) is not None


def find_damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, or None if every byte is as it was written."""
    if not (path / "progress.json").is_file():
        return f"{path} holds no checkpoint"
    try:
        progress = read_progress(path)
        whole = progress.pop("sha256") == _digest(progress)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        return f"{path}/progress.json is damaged"
    for name, written in progress["files"].items():
        if not (path / name).is_file():
            return f"{path} lacks {name}"
        if _file_digest(path / name) != written:
            return f"{path / name} is damaged"
    return None


def read_progress(path: Path) -> dict[str, Any]:
    """What progress.json of a checkpoint says."""
    return dict(json.loads((path / "progress.json").read_text(encoding="utf-8")))


def step_of(path: Path) -> int:
    """Updates that were done at a checkpoint, by its name."""
    return int(path.name.split("-")[1])


def seal(folder: Path, progress: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the SHA-256 of every other file of a folder, and of it all."""
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
