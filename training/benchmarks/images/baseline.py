"""What the trained baselines share: a frozen teacher, a student that starts as its copy, and where they start."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.teachers.teacher import Teacher

# sqrt(abar) at the last timestep of Stable Diffusion, where the example of diffusers starts its grid. A noise
# prediction becomes a clean image by a division by it; at the last timestep of a DDPM of pixels it is 0.006, and errors
# dominate.
START_ALPHA = 0.068


class Baseline(ABC):
    """A way to train a student of few steps.

    Attributes:
        teacher: Its network is frozen; the student starts as its copy.
        schedule: Of the teacher.
        student: The network that is trained.
        calls_per_image: Network calls of an update for each image of its batch.
        parts: What a checkpoint keeps, besides the optimizer and the averaged weights.
    """

    calls_per_image: int
    parts: dict[str, Any]

    def __init__(self, teacher: Teacher) -> None:
        teacher.network.requires_grad_(False).eval()
        self.teacher, self.schedule = teacher, teacher.schedule
        self.student: Any = copy.deepcopy(teacher.network).requires_grad_(True).train()

    def denoise(
        self, network: Any, schedule: HSIVIScheduler, x: Tensor, timestep: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the clean image and the noise that a network sees in x, clipped as a schedule does."""
        return schedule.predict(self.teacher.call(network, x, timestep, condition), timestep, x)

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
