"""A small image classifier whose features images are compared in."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ImageClassifier(ModelMixin, ConfigMixin):
    """Three convolutions, after `num_halvings` that halve height and width, averaged over the image; a linear head.

    Its features are those averages, the layer before the logits.
    """

    @register_to_config
    def __init__(self, channels: int = 1, num_classes: int = 10, num_features: int = 64, num_halvings: int = 0):
        super().__init__()
        self.num_features = num_features
        halvings: list[nn.Module] = []
        for _ in range(num_halvings):
            halvings += [nn.Conv2d(channels, num_features // 4, 3, stride=2, padding=1), nn.SiLU()]
            channels = num_features // 4
        self.features = nn.Sequential(
            *halvings,
            nn.Conv2d(channels, num_features // 2, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(num_features // 2, num_features, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(num_features, num_features, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features, shape (B, num_features), of images in [0, 1], shape (B, channels, H, W)."""
        features: torch.Tensor = self.features(images)
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Returns class logits, shape (B, num_classes)."""
        logits: torch.Tensor = self.head(self(images))
        return logits
