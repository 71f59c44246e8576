"""Output folders and files: claimed and locked before they are written, and replaced as a whole."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .artifacts import OPTIONS

LOCK = ".lock"  # file in a folder that is locked; it stays there


def check_output_dir(output_dir: str | None, keep: bool, remedy: str = "") -> Path:
    """Returns the output folder, which must be empty or new unless `keep` is true; `remedy` is what else can be done.

    Raises:
        ValueError: No folder was named, it is a file, or it is not empty and `keep` is false.
    """
    if not output_dir:
        raise ValueError("--output_dir is missing: name the folder to write to")
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {path} is a file: name a folder")
    if path.is_dir() and not keep and any(entry.name != LOCK for entry in path.iterdir()):
        raise ValueError(
            f"--output_dir {path} is not empty: name another folder, or pass --overwrite_output_dir{remedy}"
        )
    return path


def check_empty(path: Path) -> None:
    """Refuses, with ValueError, an output folder that is not new or empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output_dir {path} is not an empty folder: name a new one")


def claim_output_dir(output_dir: str | None, keep: bool) -> Path:
    """Makes the output folder, see `check_output_dir`."""
    path = check_output_dir(output_dir, keep)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def sole_writer(path: Path, timeout: float = 0) -> Iterator[None]:
    """Locks a folder against other runs until the context ends or the process dies.

    Raises:
        ValueError: Another run holds the lock, also after `timeout` seconds; a negative timeout waits forever.
    """
    lock = FileLock(path / LOCK, timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"--output_dir {path} is being written by another run: wait for it, or stop it") from error
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        warnings.warn(f"{path} cannot be locked ({error}): let no second run write to it", stacklevel=2)
    try:
        yield
    finally:
        lock.release()


def in_turn(path: Path) -> AbstractContextManager[None]:
    """Locks a folder, and waits for other processes that have locked it."""
    return sole_writer(path, timeout=-1)


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all; a full disk is an OSError that names it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, see `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def replace_folder(new: Path, old: Path) -> None:
    """Replaces a folder by a finished one, which is synced to the disk first, so that no reader finds half of it."""
    for path in [*new.rglob("*"), new]:
        _to_disk(path)
    retired = _retire(old)
    os.replace(new, old)
    _to_disk(old.parent)
    shutil.rmtree(retired, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder; it is renamed first, so that nobody takes half of it for the whole."""
    shutil.rmtree(_retire(path), ignore_errors=True)


def _retire(path: Path) -> Path:
    """Renames a folder, if it exists, and returns its new path."""
    retired = path.with_name(f"{path.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if path.exists():
        os.replace(path, retired)
    return retired


def _to_disk(path: Path) -> None:
    if os.name == "nt":  # which cannot sync a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def near_folder(folder: Path, likeness: float = 0.6) -> str:
    """Ends a message about a missing folder: suggests one of nearly that name, or says that only its parent is here."""
    if near := _near(folder, likeness):
        return f"; did you mean {near}?"
    parent = folder.parent
    if folder.exists() or not (parent.name and parent.is_dir()):
        return ""
    return f"; the folder {parent} is here, and has no {folder.name}"


def _near(folder: Path, likeness: float) -> Path | None:
    """A folder of nearly the name of one that is missing, if there is one."""
    if folder.exists() or not folder.parent.is_dir():
        return None
    names = [each.name for each in folder.parent.iterdir() if each.is_dir()]
    return next((folder.parent / name for name in difflib.get_close_matches(folder.name, names, 1, likeness)), None)


def check_spelling(name: str, has_owner: bool = True) -> None:
    """Refuses a mistyped folder before the Hub is asked for it, which can take a minute.

    Args:
        name: Of a folder or repo.
        has_owner: Whether a repo is named with its owner, as all but data sets are.

    Raises:
        ValueError: There is no such folder, and it is written like one, or there is one of nearly this name. Names with
            other numbers are different ones, but for runs: of `user/model-v1` only `user/model-v2` may be here.
    """
    path = Path(name)
    slashes = (1,) if has_owner else (0, 1)
    is_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") not in slashes or "\\" in name
    near = _near(path, 0.85)
    means_near = near is not None and (
        (near / OPTIONS).is_file() or re.findall(r"\d", name) == re.findall(r"\d", str(near))
    )
    if not path.exists() and (is_local or means_near):
        raise ValueError(
            f"{name!r} is no folder here: give a folder, or a repo id such as user/name{near_folder(path)}"
        )
