"""Defaults that the preset of a distillation decides."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..options import option


class ByPreset(NamedTuple):
    """A default that the preset decides."""

    fast: Any
    one_call: Any
    paper: Any


PRESETS = ByPreset._fields


def by_preset(fast: Any, one_call: Any, paper: Any, help: str, common: bool = False) -> Any:
    """A field whose default the preset decides: fast, one_call, paper."""
    return option(ByPreset(fast, one_call, paper), help, common)
