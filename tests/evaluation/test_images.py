import base64
import gzip
import io
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hsivi_diffusers.evaluation.images import load_images, show, stack_images, to_model_range
from training.benchmarks.images import sets
from training.benchmarks.images.sets import EMOJI_KINDS, load_families


@pytest.fixture
def save(tmp_path):
    """Saves a uniform image in a folder."""

    def write(name, value, size=(8, 8), mode="L"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, value).save(path)
        return str(tmp_path / "images")

    return write


def test_digits_are_those_of_scikit_learn_on_the_full_range():
    images, labels = load_images("digits", resolution=8, channels=1)
    digits = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert np.abs(images[:, 0].numpy() - digits.images * 255 / 16).max() <= 0.5
    assert labels.tolist() == digits.target.tolist()


def test_digits_are_resized_and_coloured_on_demand():
    grey, _ = load_images("digits", resolution=8, channels=1)
    large, _ = load_images("digits", resolution=16, channels=3)
    assert large.shape == (1797, 3, 16, 16)
    assert torch.equal(large[:, 0, ::2, ::2], grey[:, 0])
    assert torch.equal(large[:, 0], large[:, 2])


def test_a_folder_is_searched_recursively_in_the_order_of_its_paths(save):
    for value, name in enumerate(["b/c/2.JPEG", "a/9.png", "z.bmp", "b/1.webp"]):
        folder = save(name, 60 * value)
    Path(folder, "notes.txt").write_text("no image")
    Path(folder, "album.png").mkdir()
    images, labels = load_images(folder, resolution=8, channels=1)
    assert labels is None
    assert images.shape == (4, 1, 8, 8)
    assert images.float().mean((1, 2, 3)).tolist() == pytest.approx([60, 180, 0, 120], abs=2)


def test_images_are_cropped_to_the_centre_and_resized(tmp_path):
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:2, 4:6], wide[2:, 6:8] = 40, 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    images, _ = load_images(str(tmp_path), resolution=2, channels=1)
    assert images.tolist() == [[[[40, 0], [0, 200]]]]


def test_colour_comes_first_and_grey_is_made_of_it(save):
    folder = save("red.png", (255, 0, 10), mode="RGB")
    colour, _ = load_images(folder, resolution=8, channels=3)
    grey, _ = load_images(folder, resolution=8, channels=1)
    assert colour[0, :, 3, 3].tolist() == [255, 0, 10]
    assert grey.shape == (1, 1, 8, 8)
    assert grey.unique().tolist() == [round(0.299 * 255 + 0.114 * 10)]


def test_a_folder_of_more_images_than_open_files_are_allowed(save):
    resource = pytest.importorskip("resource")
    for number in range(80):
        folder = save(f"{number:02d}.png", number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, hard))
    try:
        images, _ = load_images(folder, resolution=8, channels=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert images[:, 0, 0, 0].tolist() == list(range(80))


def test_subfolders_are_classes_where_all_images_lie_in_them(save):
    for name in ("dog/1.png", "cat/a/2.png", "dog/0.png"):
        folder = save(name, 7)
    assert load_images(folder, resolution=8, channels=1)[1].tolist() == [0, 1, 1]
    save("loose.png", 7)
    assert load_images(folder, resolution=8, channels=1)[1] is None


def test_a_single_subfolder_is_no_class(save):
    assert load_images(save("all/1.png", 7), resolution=8, channels=1)[1] is None


def test_the_other_sources_are_those_of_the_package():
    images, labels = sets.load_images("digits", resolution=8, channels=1)
    assert torch.equal(images, load_images("digits", resolution=8, channels=1)[0])
    assert len(labels) == len(images)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no image: give a folder with files ending in \.bmp"):
        load_images(str(tmp_path), resolution=8, channels=1)


def test_an_unknown_source_is_refused_where_datasets_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="'somebody/digits' is neither `digits` nor a folder here: .*pip install datasets"
    ):
        load_images("somebody/digits", resolution=8, channels=1)


@pytest.mark.parametrize("labelled", [{}, {"label": [3, 0]}])
@pytest.mark.parametrize("column", ["image", "img"])
def test_a_dataset_is_loaded_by_name(monkeypatch, column, labelled):
    class Rows(list):
        column_names = [column, *labelled]

        def __getitem__(self, name):
            return labelled[name]

    asked = []
    rows = Rows([{column: Image.new("L", (8, 8), 7)}, {column: Image.new("RGB", (9, 9), (9, 9, 9))}])
    stand_in = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    images, labels = load_images("somebody/digits", resolution=8, channels=1)
    assert asked == [("somebody/digits", "train")]
    assert images.float().mean((1, 2, 3)).tolist() == [7, 9]
    assert labels is None if not labelled else labels.tolist() == [3, 0]


def test_a_dataset_without_images_is_refused(monkeypatch):
    rows = types.SimpleNamespace(column_names=["text", "label"])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: rows))
    with pytest.raises(
        ValueError, match="dataset some/texts has the columns text, label: one must be `image` or `img`"
    ):
        load_images("some/texts", resolution=8, channels=1)


def test_grey_of_16_bits_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).round()
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "depth.png")
    images, _ = load_images(str(tmp_path), resolution=8, channels=1)
    assert np.abs(images[0, 0].numpy() - ramp / 257).max() <= 0.5
    small = Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8))  # of 32 bits, with values of 8
    assert torch.equal(stack_images([small], 8, 1).flatten(), torch.arange(64).byte())


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


def test_emoji_are_squares_on_white_in_the_order_of_the_font_and_none_twice(emoji):
    images, _ = sets.load_images("emoji", resolution=8, channels=3)
    assert images.shape == (len(emoji) + 1, 3, 8, 8)
    assert images[:-1, 0, 4, 0].tolist() == [30 * number for number in range(len(emoji))]
    assert images[:-1, 1:, 2:6].max() == 0
    assert images[:, :, [0, 1, 6, 7]].min() == 255
    assert images[-1].min() == 255


def test_the_label_of_an_emoji_is_its_kind(emoji):
    _, labels = sets.load_images("emoji", resolution=8, channels=3)
    kinds = [[*EMOJI_KINDS][label] for label in labels]
    toned = ["people with a skin tone"] * 2
    assert kinds == ["food", "people", "people", *toned, "flags", "faces", "travel and places"]


def test_skin_tones_and_sexes_of_an_emoji_are_one_family(emoji):
    families = load_families("emoji").tolist()
    assert families == [0, 1, 2, 2, 2, 3, 4, 2]


def test_other_sources_tell_of_no_families():
    assert load_families("digits") is None


def test_a_missing_font_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "EMOJI_FONT", tmp_path / "emoji.ttf")
    with pytest.raises(ValueError, match=r"emoji\.ttf is missing: install the package fonts-noto-color-emoji"):
        sets.load_images("emoji", resolution=8, channels=3)


@pytest.mark.skipif(not sets.EMOJI_FONT.is_file(), reason="needs the package fonts-noto-color-emoji")
def test_the_emoji_of_the_package_are_of_every_kind():
    images, labels = sets.load_images("emoji", resolution=32, channels=3)
    families = load_families("emoji")
    assert images.shape[1:] == (3, 32, 32)
    assert len(images) == len(labels) == len(families) > 3500
    assert (labels.bincount(minlength=len(EMOJI_KINDS)) > 100).all()
    assert labels.bincount().argmax() == [*EMOJI_KINDS].index("people with a skin tone")
    assert 1000 < len(families.unique()) == families.max() + 1 < 2000


# ----- ranges -----


def test_the_model_range_is_exact_at_its_ends_and_affine():
    values = to_model_range(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1, 1)
    torch.testing.assert_close((values + 1) * 127.5, torch.arange(256.0), rtol=0, atol=1e-4)


# ----- shown -----


@pytest.mark.parametrize(
    ("is_terminal", "name", "is_shown"), [(True, "WezTerm", True), (True, "xterm", False), (False, "WezTerm", False)]
)
def test_an_image_is_shown_in_a_terminal_that_can(tmp_path, monkeypatch, capsys, is_terminal, name, is_shown):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM_PROGRAM", name)
    show(tmp_path / "a.png")
    told = capsys.readouterr().out
    assert bool(told) == is_shown
    if is_shown:
        assert base64.b64decode(told.split(":")[1].rstrip("\a\n")) == (tmp_path / "a.png").read_bytes()
