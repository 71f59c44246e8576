"""Branches on trial: settings that no preset uses, kept together until they are measured or removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..options import option
from .bridge import SampleData
from .denoisers import sample_shape


@dataclass
class Trials:
    """Settings on trial."""

    _group = "on trial"
    kernel: Literal["ddim", "renoise"] = option(
        "ddim", "noise of a layer: DDIM(eta), or fresh noise on the clean image", common=False
    )
    level_power: float = option(
        1.0, "p > 0: random levels are low + (high - low) u^p, u uniform; above 1 has less noise", common=False
    )
    teacher_share: float = option(
        0.0, "share of the teacher's score in the critic's target, 0 <= m < 1; 0.5 is CoSIM", common=False
    )
    train_data: str | None = option(
        None, "real images, for the adversarial term: `digits`, a folder, or a dataset", common=False
    )
    adversarial_weight: float = option(
        0.0, "weight of an adversarial term on the critic's features, against train_data; try 0.001", common=False
    )

    def check(self, scoring: str) -> None:
        """Refuses settings that the others leave without effect."""
        if self.kernel != "ddim" and scoring == "between":
            raise ValueError(
                f"scoring='between' needs kernel='ddim', got {self.kernel!r}, whose layers keep no noise of their "
                "input: set kernel to 'ddim', or scoring to 'random'"
            )
        if self.adversarial_weight and not self.train_data:
            raise ValueError(f"adversarial_weight={self.adversarial_weight} needs real images: name them by train_data")
        if self.train_data and not self.adversarial_weight:
            raise ValueError(
                f"train_data={self.train_data!r} has no effect: set adversarial_weight too, or leave train_data out"
            )


def load_data(name: str, teacher: UNet2DModel) -> SampleData:
    """Loads real images, to be drawn with replacement: of a conditional teacher those of the class that is asked for.

    Raises:
        ValueError: There are none, or the teacher takes others, or classes of which there is none.
    """
    from ..images import load_images, to_model_range

    channels, height, width = sample_shape(teacher)
    if channels not in (1, 3) or height != width:
        raise ValueError(
            f"train_data={name!r}: the teacher's images of {channels} x {height} x {width} are not loaded: take a "
            "teacher of square images of 1 or 3 channels, or leave train_data out"
        )
    images, labels = load_images(name, height, channels)
    classes = teacher.config.num_class_embeds
    if classes is not None and labels is None:
        raise ValueError(f"train_data={name!r} tells no labels, and the teacher has {classes} classes: take other data")
    kinds = torch.zeros(len(images), dtype=torch.long) if classes is None or labels is None else labels
    counts = kinds.bincount(minlength=classes or 1)
    if classes is not None and (len(counts) > classes or bool((counts == 0).any())):
        raise ValueError(
            f"train_data={name!r} has images of the classes {kinds.unique().tolist()}, and the teacher is for 0 to "
            f"{classes - 1}, each of which it needs: take the data of the teacher"
        )
    by_kind, first = kinds.argsort(stable=True), counts.cumsum(0) - counts

    def sample(size: int, condition: Tensor | None, generator: torch.Generator | None) -> Tensor:
        kind = torch.zeros(size, dtype=torch.long) if condition is None else condition.cpu()
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return to_model_range(images[by_kind[first[kind] + (uniform * counts[kind]).long()]])

    return sample
