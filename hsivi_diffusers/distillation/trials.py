"""Branches on trial: settings that no preset uses, kept together until they are measured or removed. There are none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Trials:
    """Settings on trial."""

    _group = "on trial"
