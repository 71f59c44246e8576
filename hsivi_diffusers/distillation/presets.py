"""Defaults that the preset of a distillation decides."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..runs.options import option


class ByPreset(NamedTuple):
    """A default that the preset decides."""

    fast: Any
    one_call: Any
    paper: Any
    latent: Any


PRESETS = ByPreset._fields


AS_FAST: Any = object()


def by_preset(fast: Any, one_call: Any, paper: Any, help: str, common: bool = False, latent: Any = AS_FAST) -> Any:
    """A field whose default the preset decides: fast, one_call, paper, latent."""
    return option(ByPreset(fast, one_call, paper, fast if latent is AS_FAST else latent), help, common)
