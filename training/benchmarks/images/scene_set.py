"""Scenes as a set of a benchmark: prompts of pairs of objects that nothing was trained on, and real images of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .scenes import SIDE, draw_scenes, render_all
from .spaces import SceneMeasures, load_classifier

PROMPTS, EACH = 200, 25  # prompts, and real images of each
LONGEST = 12  # tokens of a caption


class SceneSet:
    """What a benchmark draws and compares with, the same each time.

    Args:
        resolution: Of the teacher's images.

    Attributes:
        prompts: Captions of scenes of pairs that are held out.
        images: Real images of each prompt in turn, uint8 of shape (N, 3, SIDE, SIDE).
        max_sequence_length: Of the calls of the teacher's pipeline.

    Raises:
        ValueError: Scenes have another resolution.
    """

    max_sequence_length = LONGEST

    def __init__(self, resolution: int) -> None:
        if resolution != SIDE:
            raise ValueError(f"scenes have {SIDE} x {SIDE} pixels, and the teacher {resolution}: give one of scenes")
        random = np.random.default_rng(0)
        self.scenes = draw_scenes(PROMPTS, True, random)
        self.prompts = [scene.caption for scene in self.scenes]
        self.images = render_all(self.scenes * EACH, random)

    def measures(self, classifier: Path) -> SceneMeasures:
        """How images suit the prompts, by the folder of the reader."""
        return SceneMeasures(load_classifier(classifier), torch.tensor([scene.labels for scene in self.scenes]))
