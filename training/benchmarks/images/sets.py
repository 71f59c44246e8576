"""The image sets of the benchmarks: Fashion-MNIST and Noto Color Emoji, besides those of the package."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageOps

from hsivi_diffusers.evaluation import images as package
from hsivi_diffusers.evaluation.images import load_rows, stack_images

# Where Debian's packages dataset-fashion-mnist and fonts-noto-color-emoji put their files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PEOPLE = (
    "1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491 1F574-1F575 1F57A 1F5E3 "
    "1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 1F930-1F931 1F934-1F93E 1F977 1F9B8-1F9B9 "
    "1F9CC-1F9CF 1F9D1-1F9DF 1FAC2-1FAC5 1FAC8 26F7 26F9"
)
TONED = "people with a skin tone"
# Code points of each kind of emoji, whose label is its number. One with points of several kinds is of the first, one
# without any is of the last; one of TONED must have a skin tone besides.
EMOJI_KINDS = {
    "flags": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9 E0020-E007F FE4E5-FE4EE",
    TONED: PEOPLE,
    "people": PEOPLE,
    "hands and body": "1F440-1F450 1F463 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932-1F933 "
    "1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAF0-1FAF8 261D 270A-270D",
    "faces": "1F479-1F47B 1F47D-1F480 1F4A9 1F600-1F644 1F910-1F917 1F920-1F92F 1F970-1F97A 1F9D0 1FAE0-1FAE6 "
    "1FAE8-1FAEA 2620 2639-263A",
    "animals and nature": "1F300 1F308 1F30A 1F311-1F32C 1F330-1F335 1F337-1F33C 1F33E-1F344 1F384 1F38B-1F38D 1F3F5 "
    "1F400-1F43F 1F490 1F4A7 1F525 1F54A 1F577-1F578 1F648-1F64A 1F940 1F980-1F9AE 1FA90 1FAB0-1FABF 1FACD-1FACF "
    "2600-2604 2614 2618 26A1 26C4-26C8 2744 2B50",
    "food": "1F32D-1F32F 1F336 1F33D 1F345-1F37F 1F382 1F3FA 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADE 2615",
    "travel and places": "1F301 1F303-1F310 1F3A0-1F3A2 1F3AA 1F3CD-1F3CE 1F3D4-1F3E6 1F3E8-1F3F0 1F492 1F54B-1F54D "
    "1F5FA-1F5FF 1F680-1F6AA 1F6B2 1F6D1-1F6D7 1F6DD-1F6DF 1F6E3-1F6FB 1F9BC-1F9BD 2693 26E9-26EA 26F0-26F5 26FA 26FD "
    "2708",
    "symbols": "20-22FF 23CF-23EF 23F8-25FF 2605-260D 2611-2613 2616-2668 267B-267F 2695 269B 26A0 26A7-26AB 26CE 26D4 "
    "2705 2714-2721 2728-2797 27A1-32FF 1F170-1F2FF 1F3E7 1F3FB-1F3FF 1F493-1F49F 1F4A0 1F4A2 1F4AE-1F4AF 1F4F4-1F4F6 "
    "1F500-1F50A 1F518-1F524 1F52F-1F549 1F54E-1F567 1F5A4 1F6AB 1F6AD-1F6BE 1F6C2-1F6C5 1F6D0 1F6DC 1F7E0-1F7FF "
    "1F90D-1F90E 1F9E1 1FA75-1FA77 1FAAF FE82C-FE837",
    "objects and activities": "",
}
SKIN_TONES = set(range(0x1F3FB, 0x1F400))
# What the variants of an emoji differ in: tone, joiner, presentation, sex, man or woman, the way they face.
VARIANTS = SKIN_TONES | {0x200D, 0xFE0F, 0x2640, 0x2642, 0x1F468, 0x1F469, 0x1F9D1, 0x27A1}


def load_images(source: str, resolution: int, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loads every image of a source, as the package's `load_images` does, which has other sources.

    `fashion-mnist`: 60,000 pieces of clothing, 28x28 with a border of 2.
    `emoji`: the 4,060 of Noto Color Emoji on white, whose labels are the numbers of EMOJI_KINDS.
    """
    if source == "fashion-mnist":
        images, labels = _load_fashion()
    elif source == "emoji":
        images, labels = _load_emoji()
    else:
        return package.load_images(source, resolution, channels)
    return stack_images(images, resolution, channels), labels


def _load_fashion() -> tuple[list[Image.Image], torch.Tensor]:
    """Fashion-MNIST from Debian's package, or from the Hub."""
    if not FASHION_MNIST.is_dir():
        rows = load_rows("zalando-datasets/fashion_mnist", "train")
        return [ImageOps.expand(each, border=2) for each in rows["image"]], torch.tensor(rows["label"])
    content = {}
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(FASHION_MNIST / f"train-{kind}-ubyte.gz") as file:
            content[kind] = np.frombuffer(file.read(), np.uint8, offset=header)
    grey = np.pad(content["images-idx3"].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return [Image.fromarray(image) for image in grey], torch.from_numpy(content["labels-idx1"].copy()).long()


def load_families(source: str) -> torch.Tensor | None:
    """Number of the family of each image, shape (N,), or None; skin tones of an emoji are one family."""
    if source != "emoji":
        return None
    bases = [tuple(sorted(point for point in points if point not in VARIANTS)) for points in read_emoji().values()]
    numbers = {base: number for number, base in enumerate(dict.fromkeys(bases))}
    return torch.tensor([numbers[base] for base in bases])


def _load_emoji() -> tuple[list[Image.Image], torch.Tensor]:
    """The different bitmaps of Noto Color Emoji, squares on white, in the order of the font, and their kinds."""
    bitmaps = read_emoji()
    images = []
    for bitmap in bitmaps:
        image = Image.open(io.BytesIO(bitmap)).convert("RGBA")
        white = Image.new("RGBA", (max(image.size),) * 2, "white")
        white.alpha_composite(image, tuple((white.width - side) // 2 for side in image.size))
        images.append(white)
    kinds = {name: _points_of(ranges) for name, ranges in EMOJI_KINDS.items()}
    return images, torch.tensor([_kind_of(points, kinds) for points in bitmaps.values()])


def read_emoji() -> dict[bytes, tuple[int, ...]]:
    """The different bitmaps of the font, and the code points of the first glyph of each; their order means nothing."""
    if not EMOJI_FONT.is_file():
        raise ValueError(f"{EMOJI_FONT} is missing: install the package fonts-noto-color-emoji, or name a folder")
    font = TTFont(EMOJI_FONT)
    points: dict[str, tuple[int, ...]] = {glyph: (point,) for point, glyph in font.getBestCmap().items()}
    tables = [table for lookup in font["GSUB"].table.LookupList.Lookup for table in lookup.SubTable]
    for table in (getattr(table, "ExtSubTable", table) for table in tables):
        for first, ligatures in getattr(table, "ligatures", {}).items():
            for each in ligatures:
                points.setdefault(each.LigGlyph, sum((points[name] for name in (first, *each.Component)), ()))
    bitmaps: dict[bytes, tuple[int, ...]] = {}
    for name, glyph in font["CBDT"].strikeData[0].items():
        if hasattr(glyph, "imageData"):
            bitmaps.setdefault(glyph.imageData, points[name])
    return bitmaps


def _points_of(ranges: str) -> set[int]:
    """The code points of ranges such as `A9 1F600-1F644`."""
    ends = [[int(end, 16) for end in part.split("-")] for part in ranges.split()]
    return {point for end in ends for point in range(end[0], end[-1] + 1)}


def _kind_of(points: tuple[int, ...], kinds: dict[str, set[int]]) -> int:
    """The number of the kind of an emoji."""
    for number, (name, kind) in enumerate(kinds.items()):
        if kind.intersection(points) and (name != TONED or SKIN_TONES.intersection(points)):
            return number
    return len(kinds) - 1
