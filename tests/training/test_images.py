import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from images import load_images, to_model_range


@pytest.fixture
def save(tmp_path):
    """Saves a uniform picture in a folder."""

    def write(name, value, size=(8, 8), mode="L"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, value).save(path)
        return str(tmp_path / "pictures")

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
    Path(folder, "notes.txt").write_text("no picture")
    Path(folder, "album.png").mkdir()
    images, labels = load_images(folder, resolution=8, channels=1)
    assert labels is None
    assert images.shape == (4, 1, 8, 8)
    assert images.float().mean((1, 2, 3)).tolist() == pytest.approx([60, 180, 0, 120], abs=2)


def test_pictures_are_cropped_to_the_centre_and_resized(tmp_path):
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


def test_a_folder_of_more_pictures_than_open_files_are_allowed(save):
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


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"holds no picture: expected files ending in \.bmp"):
        load_images(str(tmp_path), resolution=8, channels=1)


def test_an_unknown_source_is_refused_where_datasets_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="'somebody/digits' is neither `digits` nor a folder.*pip install datasets"):
        load_images("somebody/digits", resolution=8, channels=1)


@pytest.mark.parametrize("column", ["image", "img"])
def test_a_dataset_is_loaded_by_name(monkeypatch, column):
    class Rows(dict):
        column_names = [column, "label"]

    asked = []
    rows = Rows({column: [Image.new("L", (8, 8), 7), Image.new("RGB", (9, 9), (9, 9, 9))]})
    stand_in = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    images, labels = load_images("somebody/digits", resolution=8, channels=1)
    assert asked == [("somebody/digits", "train")]
    assert images.float().mean((1, 2, 3)).tolist() == [7, 9]
    assert labels is None


def test_the_model_range_is_exact_at_its_ends_and_affine():
    values = to_model_range(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1, 1)
    torch.testing.assert_close((values + 1) * 127.5, torch.arange(256.0), rtol=0, atol=1e-4)
