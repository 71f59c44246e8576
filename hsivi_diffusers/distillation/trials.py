"""Branches on trial: settings that no preset uses, kept together until they are measured or removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..options import option


@dataclass
class Trials:
    """Settings on trial."""

    _group = "on trial"
    kernel: Literal["ddim", "renoise"] = option(
        "ddim", "noise of a layer: DDIM(eta), or fresh noise on the clean image", common=False
    )

    def check(self, scoring: str) -> None:
        """Refuses settings that the others leave without effect."""
        if self.kernel != "ddim" and scoring == "between":
            raise ValueError(
                f"scoring='between' needs kernel='ddim', got {self.kernel!r}, whose layers keep no noise of their "
                "input: set kernel to 'ddim', or scoring to 'random'"
            )
