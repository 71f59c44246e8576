"""What the trained baselines share: a frozen teacher, a student that starts as its copy, and where they start."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor

from hsivi_diffusers import HSIVIScheduler

# sqrt(abar) at the last timestep of Stable Diffusion, where the example of diffusers starts its grid. A noise
# prediction becomes a clean image by a division by it; at the last timestep of a DDPM of pixels it is 0.006, and errors
# dominate.
START_ALPHA = 0.068


class Baseline(ABC):
    """A way to train a student of few steps.

    Attributes:
        teacher: Is frozen; the student starts as its copy.
        schedule: Of the teacher.
        calls_per_image: Network calls of an update for each image of its batch.
        parts: What a checkpoint keeps, besides the optimizer and the averaged weights.
    """

    calls_per_image: int
    parts: dict[str, Any]

    def __init__(self, teacher: UNet2DModel, schedule: HSIVIScheduler) -> None:
        self.teacher, self.schedule = teacher.requires_grad_(False).eval(), schedule
        self.student = copy.deepcopy(teacher).requires_grad_(True).train()

    @abstractmethod
    def loss(self, clean: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the loss of a batch of real images, shape (B, C, H, W), and their class labels, shape (B,)."""

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """The student, ready to be sampled."""

    def restore(self) -> None:  # noqa: B027
        """Makes what a run that continues had and no checkpoint keeps."""

    def begin_update(self, share: float) -> None:  # noqa: B027
        """Is called before each update, when a share of the run from 0 to 1 is done."""


def default_start(schedule: HSIVIScheduler) -> int:
    """The timestep where alpha falls to START_ALPHA, or the last."""
    return min(int((schedule.alphas_cumprod.sqrt() > START_ALPHA).sum()), len(schedule) - 1)
