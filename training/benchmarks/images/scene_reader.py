"""A small network that reads what a scene shows: axis, both objects and the ground."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .scenes import KINDS, SIDE

HALVINGS = 3


class SceneReader(ModelMixin, ConfigMixin):
    """Convolutions that halve the image three times, then a layer of all places, whose outputs are the features."""

    @register_to_config
    def __init__(self, num_features: int = 128) -> None:
        super().__init__()
        widths = (3, 32, 64, num_features)
        convolutions: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            convolutions += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.num_features = num_features
        self.features = nn.Sequential(
            *convolutions,
            nn.Conv2d(num_features, num_features, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(num_features, num_features // 4, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(num_features // 4 * (SIDE // 2**HALVINGS) ** 2, num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, sum(KINDS))

    def forward(self, images: Tensor) -> Tensor:
        """Returns features, shape (B, num_features), of images in [0, 1], shape (B, 3, SIDE, SIDE)."""
        features: Tensor = self.features(images)
        return features

    def logits(self, images: Tensor) -> Sequence[Tensor]:
        """Returns the logits of each of `Scene.labels`."""
        logits: Sequence[Tensor] = self.head(self(images)).split(KINDS, dim=1)
        return logits

    def read(self, images: Tensor) -> Tensor:
        """Returns the labels of the scenes that images show, shape (B, 4)."""
        return torch.stack([each.argmax(1) for each in self.logits(images)], dim=1)

    def agrees(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether all that is read of an image is as its labels (B, 4) say: booleans of shape (B,)."""
        return (self.read(images) == labels).all(1)
