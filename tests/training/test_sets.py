"""The sets of the benchmarks: digits, Fashion-MNIST and emoji."""

import gzip
import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from hsivi_diffusers.evaluation.images import load_images
from training.benchmarks.images import sets
from training.benchmarks.images.sets import EMOJI_KINDS, load_families


def test_the_other_sources_are_those_of_the_package():
    images, labels = sets.load_images("digits", resolution=8, channels=1)
    assert torch.equal(images, load_images("digits", resolution=8, channels=1)[0])
    assert len(labels) == len(images)
    assert load_families("digits") is None


# ----- clothes -----


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Files of Fashion-MNIST's format: 3 images to train with."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(16) + pixels.tobytes())
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes(8) + bytes([9, 8, 7]))
    monkeypatch.setattr(sets, "FASHION_MNIST", tmp_path)
    return pixels


def test_clothes_have_a_border_of_two_pixels(clothes):
    images, labels = sets.load_images("fashion-mnist", resolution=32, channels=1)
    assert images.shape == (3, 1, 32, 32)
    assert np.array_equal(images[:, 0, 2:30, 2:30].numpy(), clothes)
    assert images.sum() == clothes.sum(dtype=int)
    assert labels.tolist() == [9, 8, 7]
    assert labels.dtype == torch.int64


def test_clothes_come_from_the_hub_where_there_are_no_files(tmp_path, monkeypatch):
    asked = []
    rows = {"image": [Image.new("L", (28, 28), 7)], "label": [4]}
    stand_in = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr(sets, "FASHION_MNIST", tmp_path / "nowhere")
    images, labels = sets.load_images("fashion-mnist", resolution=32, channels=1)
    assert asked == [("zalando-datasets/fashion_mnist", "train")]
    assert images.sum() == 7 * 28 * 28
    assert labels.tolist() == [4]


@pytest.mark.slow
@pytest.mark.skipif(not sets.FASHION_MNIST.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_clothes_of_the_package_are_ten_of_equal_number():
    images, labels = sets.load_images("fashion-mnist", resolution=32, channels=1)
    assert images.shape == (60_000, 1, 32, 32)
    assert labels.bincount().tolist() == [6000] * 10
    assert images.float().mean() / 255 == pytest.approx(0.286 * (28 / 32) ** 2, abs=5e-3)


# ----- emoji -----

MAN, ASTRONAUT, FLAG, GRIN, CUP, TONE, JOINER = 0x1F468, 0x1F680, 0x1F1E6, 0x1F600, 0x2615, 0x1F3FD, 0x200D


class Font(dict):
    """What is read of a font: names of glyphs, the ligatures, and bitmaps, each of a colour of its own."""

    def __init__(self, glyphs, ligatures, colours):
        tables = [types.SimpleNamespace(), types.SimpleNamespace(ExtSubTable=types.SimpleNamespace(ligatures={}))]
        for name, components in ligatures.items():
            ligature = types.SimpleNamespace(LigGlyph=name, Component=components[1:])
            tables[1].ExtSubTable.ligatures.setdefault(components[0], []).append(ligature)
        lookups = [types.SimpleNamespace(SubTable=[table]) for table in tables]
        bitmaps = {name: types.SimpleNamespace(imageData=self.draw(colour)) for name, colour in colours.items()}
        super().__init__(
            GSUB=types.SimpleNamespace(table=types.SimpleNamespace(LookupList=types.SimpleNamespace(Lookup=lookups))),
            CBDT=types.SimpleNamespace(strikeData=[{"blank": types.SimpleNamespace(), **bitmaps}]),
        )
        self.getBestCmap = lambda: glyphs

    @staticmethod
    def draw(colour):
        file = io.BytesIO()
        Image.new("RGBA", (8, 4), colour).save(file, "png")
        return file.getvalue()


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """A font of a cup, a man, an astronaut of two tones and without, the Austrian flag, and a face drawn twice."""
    names = {MAN: "man", ASTRONAUT: "rocket", FLAG: "A", FLAG + 19: "T", GRIN: "face", CUP: "cup", TONE: "tone"}
    glyphs = {**names, TONE + 1: "tone2", JOINER: "joiner", 0x1F603: "face2"}
    ligatures = {
        "astronaut": ["man", "joiner", "rocket"],
        "toned": ["man", "tone", "joiner", "rocket"],
        "toned2": ["man", "tone2", "joiner", "rocket"],
        "at": ["A", "T"],
    }
    drawn = ["cup", "man", "astronaut", "toned", "toned2", "at", "face"]
    colours = {name: (30 * number, 0, 0, 255) for number, name in enumerate(drawn)}
    path = tmp_path / "emoji.ttf"
    path.touch()
    monkeypatch.setattr(sets, "EMOJI_FONT", path)
    font = Font(glyphs, ligatures, {**colours, "face2": colours["face"], "rocket": (0, 0, 255, 0)})
    monkeypatch.setattr(sets, "TTFont", lambda asked: font if asked == path else None)
    return drawn


def test_emoji_are_squares_on_white_in_the_order_of_the_font_with_kinds_and_families_and_none_twice(emoji):
    images, labels = sets.load_images("emoji", resolution=8, channels=3)
    assert images.shape == (len(emoji) + 1, 3, 8, 8)
    assert images[:-1, 0, 4, 0].tolist() == [30 * number for number in range(len(emoji))]
    assert images[:-1, 1:, 2:6].max() == 0
    assert images[:, :, [0, 1, 6, 7]].min() == 255
    assert images[-1].min() == 255
    toned = ["people with a skin tone"] * 2
    kinds = ["food", "people", "people", *toned, "flags", "faces", "travel and places"]
    assert [[*EMOJI_KINDS][label] for label in labels] == kinds
    assert load_families("emoji").tolist() == [0, 1, 2, 2, 2, 3, 4, 2]  # skin tones and sexes are one


def test_a_missing_font_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "EMOJI_FONT", tmp_path / "emoji.ttf")
    with pytest.raises(ValueError, match=r"emoji\.ttf is missing: install the package fonts-noto-color-emoji"):
        sets.load_images("emoji", resolution=8, channels=3)


@pytest.mark.slow
@pytest.mark.skipif(not sets.EMOJI_FONT.is_file(), reason="needs the package fonts-noto-color-emoji")
def test_the_emoji_of_the_package_are_of_every_kind():
    images, labels = sets.load_images("emoji", resolution=32, channels=3)
    families = load_families("emoji")
    assert images.shape[1:] == (3, 32, 32)
    assert len(images) == len(labels) == len(families) > 3500
    assert (labels.bincount(minlength=len(EMOJI_KINDS)) > 100).all()
    assert labels.bincount().argmax() == [*EMOJI_KINDS].index("people with a skin tone")
    assert 1000 < len(families.unique()) == families.max() + 1 < 2000
