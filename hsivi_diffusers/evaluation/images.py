"""Real images as one tensor, from scikit-learn, a folder or the Hub, and images shown in a terminal."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..runs.folders import check_spelling

TERMINALS = ("iTerm.app", "WezTerm", "vscode", "mintty")
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def load_images(source: str, resolution: int, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns all images of a source, see `stack_images`, and labels, shape (N,), where there are any.

    Args:
        source: `digits` (the 1,797 handwritten digits of scikit-learn, 8x8), a folder (searched recursively; if all its
            images lie in two subfolders or more, these are the classes, in alphabetical order), or the name of a
            dataset on the Hub with a column `image` or `img`, and `label` if it has classes.
        resolution: Height and width; images are centre-cropped and resized to it.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: The source is unknown, holds no image, or one that is damaged.
    """
    images: Iterable[Image.Image]
    labels: torch.Tensor | None
    if source == "digits":
        images, labels = _load_digits()
    elif Path(source).is_dir():
        images, labels = _load_folder(Path(source))
    else:
        images, labels = _load_dataset(source)
    return stack_images(images, resolution, channels), labels


def stack_images(images: Iterable[Image.Image], resolution: int, channels: int) -> torch.Tensor:
    """Returns images of one size, uint8 of shape (N, channels, resolution, resolution)."""
    tensors = [_to_tensor(image, resolution, channels) for image in images]
    if not tensors:
        raise ValueError(f"the source holds no image: give a folder with files ending in {', '.join(sorted(SUFFIXES))}")
    return torch.stack(tensors)


def _load_digits() -> tuple[list[Image.Image], torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("`digits` needs scikit-learn: pip install 'hsivi-diffusers[evaluate]'") from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image) for image in grey], torch.from_numpy(digits.target).long()


def _load_folder(folder: Path) -> tuple[Iterable[Image.Image], torch.Tensor | None]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    parts = [path.relative_to(folder).parts for path in paths]
    classes = sorted({each[0] for each in parts})
    labelled = len(classes) > 1 and all(len(each) > 1 for each in parts)
    labels = torch.tensor([classes.index(each[0]) for each in parts]) if labelled else None
    return map(_open, paths), labels  # one after the other: as they are, all may not fit in memory


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): remove it, or save it again") from error


def _load_dataset(name: str) -> tuple[Iterable[Image.Image], torch.Tensor | None]:
    rows = load_rows(name, "train")
    columns = [each for each in ("image", "img") if each in rows.column_names]
    if not columns:
        raise ValueError(f"dataset {name} has the columns {', '.join(rows.column_names)}: one must be `image` or `img`")
    labels = torch.tensor(rows["label"]) if "label" in rows.column_names else None
    return (row[columns[0]] for row in rows), labels  # one after the other: as they are, all may not fit in memory


def check_source(name: str) -> None:
    """Raises ValueError if images of a source cannot be asked for: it is no folder, and datasets are not installed."""
    if name != "digits" and not Path(name).is_dir():
        check_spelling(name, has_owner=False)
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{name!r} is neither `digits` nor a folder here: correct the path, or, if it is a dataset on the Hub, "
                "pip install datasets"
            ) from error


def load_rows(name: str, split: str) -> Any:
    """Loads one split of a dataset on the Hub."""
    check_source(name)
    from datasets import load_dataset

    return load_dataset(name, split=split)


def _to_tensor(image: Image.Image, resolution: int, channels: int) -> torch.Tensor:
    if image.mode.startswith("I;16"):  # of which Pillow would cut off what is above 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).reshape(resolution, resolution, channels).permute(2, 0, 1)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Maps uint8 images 0..255 to floats in [-1, 1], the range of diffusers' UNets."""
    return images.float() / 127.5 - 1


def enlarge(image: Image.Image, width: int) -> Image.Image:
    """A small image, its pixels as squares, about `width` pixels wide."""
    return ImageOps.scale(image, max(1, width // image.width), Image.Resampling.NEAREST)


def show(path: Path) -> None:
    """Shows an image file in a terminal that can, by the protocol of iTerm2 (https://iterm2.com/documentation-images)."""
    if sys.stdout.isatty() and os.environ.get("TERM_PROGRAM") in TERMINALS:
        content = base64.b64encode(path.read_bytes()).decode()
        print(f"\033]1337;File=inline=1;preserveAspectRatio=1:{content}\a")
