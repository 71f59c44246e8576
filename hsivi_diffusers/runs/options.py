"""Options as dataclass fields: declared, compared, recorded."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, field
from typing import Any

RENAMED = {"guidance_falls": "decay_guidance"}  # since version 0.2


def renamed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run of version 0.2 or later under the names of today."""
    return {RENAMED.get(name, name): value for name, value in recorded.items()}


def did_you_mean(name: str, known: Collection[str], quote: str = "") -> str:
    """The end of a message about an unknown name: the one known that has all of its words, or the nearest."""
    plain = name.strip("-")
    words = set(RENAMED.get(plain, plain).split("_"))
    having = [each for each in known if words <= set(each.strip("-").split("_"))]
    close = having if len(having) == 1 else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else ""


def option(default: Any, help: str, common: bool = True) -> Any:
    """A field of an options dataclass; those that are not common are shown by `--help_all` alone."""
    metadata = {"help": help, "common": common}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flatten(groups: Sequence[Any]) -> dict[str, Any]:
    """The options of several groups, by name."""
    return {name: value for group in groups for name, value in asdict(group).items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says which settings of now differ from those before; empty if none does."""
    return "; ".join(
        f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    )
