"""The learned noise scale of the layers, one factor per pixel."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class HSIVINoiseScale(ModelMixin, ConfigMixin):
    """Factor exp(log_scale) on the noise, one per pixel, shared by all layers (appendix of the paper).

    Args:
        sample_shape: (channels, height, width) of the samples.

    Raises:
        ValueError: `sample_shape` is not a sequence of positive integers.
    """

    __module__ = "hsivi_diffusers"

    _source = Path(__file__).read_text(encoding="utf-8")

    @register_to_config
    def __init__(self, sample_shape: Sequence[int] = (3, 32, 32)):
        super().__init__()
        if not sample_shape or any(int(size) != size or size < 1 for size in sample_shape):
            raise ValueError(f"sample_shape={sample_shape!r}: give positive integers, such as (3, 32, 32)")
        self.register_to_config(sample_shape=[int(size) for size in sample_shape])
        self.log_scale = torch.nn.Parameter(torch.zeros(1, *self.config.sample_shape))

    def forward(self) -> torch.Tensor:
        """Returns the scale, shape (1, channels, height, width); 1 everywhere before training."""
        return self.log_scale.exp()

    # `wraps`: a pipeline passes the options (variant, ...) that the signature has.
    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves weights and config, and this source file so that the folder loads without the package."""
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization=False would write pickles: leave it out, weights are safetensors")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "hsivi_diffusers.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)
