"""Real pictures as one uint8 tensor: the digits of scikit-learn, a folder of images, or a dataset by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def load_images(source: str, resolution: int, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loads every picture of a source.

    Args:
        source: `digits` (the 1,797 handwritten digits of scikit-learn, 8x8), a folder (searched recursively), or the
            name of a dataset on the Hub with a column `image` or `img` (needs `pip install datasets`).
        resolution: Height and width; pictures are centre-cropped and resized to it.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        Pictures, uint8 of shape (N, channels, resolution, resolution), and labels of shape (N,) where the source has
        them.

    Raises:
        ValueError: The source is unknown or holds no picture.
    """
    pictures: Iterable[Image.Image]
    if source == "digits":
        digits = load_digits()
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
        pictures, labels = [Image.fromarray(picture) for picture in grey], torch.from_numpy(digits.target).long()
    elif Path(source).is_dir():
        paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        pictures, labels = map(Image.open, paths), None  # one after the other: an open picture is an open file
    else:
        pictures, labels = _load_dataset(source), None
    tensors = [_to_tensor(picture, resolution, channels) for picture in pictures]
    if not tensors:
        raise ValueError(f"{source} holds no picture: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return torch.stack(tensors), labels


def _load_dataset(name: str) -> list[Image.Image]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name!r} is neither `digits` nor a folder; to load it as a dataset by name, `pip install datasets`"
        ) from error
    rows = load_dataset(name, split="train")
    column = "image" if "image" in rows.column_names else "img"
    return list(rows[column])


def _to_tensor(picture: Image.Image, resolution: int, channels: int) -> torch.Tensor:
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (resolution, resolution):
        picture = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).reshape(resolution, resolution, channels).permute(2, 0, 1)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Maps uint8 pictures 0..255 to floats in [-1, 1], the range of diffusers' UNets."""
    return images.float() / 127.5 - 1
