"""Scenes as a set of a benchmark: prompts of pairs of objects that no sampler was trained on, and real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .scenes import SIDE, draw_scenes, render_all
from .spaces import SceneMeasures, load_classifier

PROMPTS, EACH = 200, 25  # prompts, and real images of each
LONGEST = 12  # tokens of a caption, the max_sequence_length of pipelines


class SceneSet:
    """What a benchmark draws and compares with, the same each time.

    Args:
        resolution: Of the teacher's images.

    Attributes:
        scenes: Of pairs that are held out.
        prompts: Their captions.
        images: Real images of each prompt in turn, uint8 of shape (N, 3, SIDE, SIDE).

    Raises:
        ValueError: Scenes have another resolution.
    """

    def __init__(self, resolution: int) -> None:
        if resolution != SIDE:
            raise ValueError(f"scenes have {SIDE} x {SIDE} pixels, and the teacher {resolution}: give one of scenes")
        random = np.random.default_rng(0)
        self.scenes = draw_scenes(PROMPTS, True, random)
        self.prompts = [scene.caption for scene in self.scenes]
        self.images = render_all(self.scenes * EACH, random)

    def draw(self, asked: Tensor, generator: torch.Generator) -> Tensor:
        """New real images in [0, 1] of prompts, by their numbers (N,): objects have other places and sizes."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        return render_all([self.scenes[number] for number in asked], random) / 255

    def measures(self, classifier: Path) -> SceneMeasures:
        """How images suit the prompts, by the folder of the reader."""
        return SceneMeasures(load_classifier(classifier), torch.tensor([scene.labels for scene in self.scenes]))
