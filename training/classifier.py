"""A small image classifier, whose features the Frechet distance is measured in."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ImageClassifier(ModelMixin, ConfigMixin):
    """Three convolutions and two linear layers.

    Args:
        channels: Of the pictures.
        num_classes: Of the labels.
        num_features: Width of the last hidden layer.
    """

    @register_to_config
    def __init__(self, channels: int = 1, num_classes: int = 10, num_features: int = 64):
        super().__init__()
        self.num_features = num_features
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features, shape (B, num_features), of pictures in [0, 1], shape (B, channels, H, W)."""
        features: torch.Tensor = self.features(images)
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Returns class logits, shape (B, num_classes)."""
        logits: torch.Tensor = self.head(self(images))
        return logits
