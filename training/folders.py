"""Folders that nothing is lost from: claimed before they are written to, and whole or absent afterwards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def claim_output_dir(output_dir: str | None, keep: bool) -> Path:
    """Makes the output folder, and refuses one that holds something.

    Args:
        output_dir: Path of the folder.
        keep: The user resumes or asked to overwrite, so that a filled folder is welcome.

    Raises:
        ValueError: No folder was named, it is a file, or it is not empty and `keep` is false.
    """
    if not output_dir:
        raise ValueError("--output_dir is missing: name the folder to write to")
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {path} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()) and not keep:
        raise ValueError(
            f"--output_dir {path} is not empty: name another folder, go on with --resume_from_checkpoint latest "
            "(where the script has it), or pass --overwrite_output_dir"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def replace_folder(new: Path, old: Path) -> None:
    """Puts a finished folder in the place of another, so that a reader finds the one or the other, also after a crash.

    What is in it is on the disk before it gets its name.
    """
    for path in [*new.rglob("*"), new]:
        _to_disk(path)
    if old.exists():
        remove_folder(old)
    os.replace(new, old)
    _to_disk(old.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder that has lost its name first, so that half of it is never taken for the whole."""
    retired = path.with_name(f"{path.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if path.exists():
        os.replace(path, retired)
    shutil.rmtree(retired, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if os.name == "nt":  # knows no such call for folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
