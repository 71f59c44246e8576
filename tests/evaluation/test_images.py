import base64
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
    large, _ = load_images("digits", resolution=16, channels=3)
    assert torch.equal(large[:, :, ::2, ::2], images.expand(-1, 3, -1, -1))


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
    assert load_images(save("dog/1.png", 7), resolution=8, channels=1)[1] is None  # a single one is no class
    for name in ("cat/a/2.png", "dog/0.png"):
        folder = save(name, 7)
    assert load_images(folder, resolution=8, channels=1)[1].tolist() == [0, 1, 1]
    save("loose.png", 7)
    assert load_images(folder, resolution=8, channels=1)[1] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"no image", r"holds no image: give a folder with files ending in \.bmp"),
        ("cut.png", b"\x89PNG\r\n\x1a\n", r"cut\.png cannot be read as an image \(.*\): remove it, or save it again"),
        ("text.jpg", b"no image", r"text\.jpg cannot be read as an image"),
        ("bomb.png", None, r"bomb\.png cannot be read as an image \(Image size \(64 pixels\) exceeds"),
    ],
)
def test_a_folder_without_images_or_with_one_that_cannot_be_read_is_refused(save, monkeypatch, name, content, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # an image may have twice as many
    folder = save(name if content is None else "small.png", 7, (8, 8) if content is None else (2, 2))
    if content is not None:
        Path(folder, "small.png").unlink()
        Path(folder, name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_images(folder, resolution=8, channels=1)


def test_an_unknown_source_is_refused_where_datasets_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="'some/digits' is neither `digits` nor a folder here: .*pip install datasets"):
        load_images("some/digits", resolution=8, channels=1)
    with pytest.raises(ValueError, match="'./cats' is no folder here"):
        load_images("./cats", resolution=8, channels=1)


@pytest.mark.parametrize(("column", "labelled"), [("image", {}), ("img", {"label": [3, 0]})])
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
    message = "dataset some/texts has the columns text, label: one must be `image` or `img`"
    with pytest.raises(ValueError, match=message):
        load_images("some/texts", resolution=8, channels=1)


def test_grey_of_16_bits_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).round()
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "depth.png")
    images, _ = load_images(str(tmp_path), resolution=8, channels=1)
    assert np.abs(images[0, 0].numpy() - ramp / 257).max() <= 0.5
    small = Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8))  # of 32 bits, with values of 8
    assert torch.equal(stack_images([small], 8, 1).flatten(), torch.arange(64).byte())


def test_the_model_range_is_exact_at_its_ends_and_affine():
    values = to_model_range(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1, 1)
    torch.testing.assert_close((values + 1) * 127.5, torch.arange(256.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("is_terminal", "name", "is_shown"), [(True, "WezTerm", True), (True, "xterm", False), (False, "WezTerm", False)]
)
def test_an_image_is_shown_in_a_terminal_that_can(tmp_path, monkeypatch, capsys, is_terminal, name, is_shown):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM_PROGRAM", name)
    show(tmp_path / "a.png")
    sent = capsys.readouterr().out
    assert bool(sent) == is_shown
    if is_shown:
        assert base64.b64decode(sent.split(":")[1].rstrip("\a\n")) == (tmp_path / "a.png").read_bytes()
