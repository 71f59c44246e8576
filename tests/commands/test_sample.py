"""`hsivi sample`."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hsivi_diffusers import HSIVIPipeline
from hsivi_diffusers.commands import cli


@pytest.fixture
def draw(fast_run, tmp_path):
    """Samples into a new folder and returns it; without a run, that of the preset `fast`."""

    def call(name, *arguments, run=fast_run):
        folder = tmp_path / name
        cli.sample([f"--pipeline={run}", f"--output_dir={folder}", "--device=cpu", *arguments])
        return folder

    return call


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(folder, number):
    return np.asarray(Image.open(folder / f"{number:05d}.png")).astype(int)


def test_a_file_for_each_image_and_a_grid_of_the_first(draw, capsys):
    folder = draw("samples", "--num_samples=7", "--batch_size=3")
    assert sorted(os.listdir(folder)) == [*[f"{number:05d}.png" for number in range(7)], "grid.png"]
    grid = np.asarray(Image.open(folder / "grid.png").convert("L"))
    assert grid.shape == (3 * 66, 2 * 66)  # images of 8x8 are enlarged, and framed
    for number in range(6):
        row, column = divmod(number, 2)
        cell = grid[66 * row : 66 * row + 66, 66 * column : 66 * column + 66]
        assert np.array_equal(cell[1:-1:8, 1:-1:8], pixels(folder, number))
        assert set(cell[0]) == {128}
    assert re.fullmatch(r"7 images in \S+samples, 6 of them in \S+grid.png\n", capsys.readouterr().out)


def test_classes_that_were_not_trained_are_drawn_when_they_are_named_alone(class_run, tmp_path, capsys):
    run = shutil.copytree(class_run, tmp_path / "run")
    options = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps({**options, "class_shares": [1.0, 0.0, 2.0]}))
    for pipeline in (run, run / "pipeline"):
        folder = tmp_path / f"drawn {pipeline.name}"
        cli.sample([f"--pipeline={pipeline}", f"--output_dir={folder}", "--num_samples=4"])
        assert "image i is of class [0, 2][i % 2]" in capsys.readouterr().out
    cli.sample([f"--pipeline={run}", f"--output_dir={tmp_path / 'one'}", "--num_samples=4", "--class_label", "1"])
    assert "image i is of class [1][i % 1]" in capsys.readouterr().out
    many = ["--class_label", *["0", "1", "2"] * 7]  # more than are listed
    cli.sample([f"--pipeline={run}", f"--output_dir={tmp_path / 'many'}", "--num_samples=4", *many])
    assert capsys.readouterr().out.endswith("; image i is of class number i % 21\n")


def test_the_same_seed_gives_the_same_bytes(draw):
    first, again, other = (draw(name, "--num_samples=4", f"--seed={name[0]}") for name in ("1st", "1again", "2nd"))
    assert contents(first) == contents(again)
    assert contents(first) != contents(other)


def test_an_image_depends_on_its_own_seed_only(draw):
    """Up to one grey level, for the rounding of a batched product may depend on the size of the batch."""
    whole, parts = draw("whole", "--num_samples=4"), draw("parts", "--num_samples=4", "--batch_size=3")
    later = draw("later", "--num_samples=2", "--seed=2")
    for number in range(4):
        assert abs(pixels(whole, number) - pixels(parts, number)).max() <= 1
    for number in range(2):
        assert abs(pixels(whole, number + 2) - pixels(later, number)).max() <= 1
    assert abs(pixels(whole, 0) - pixels(whole, 1)).max() > 10


def test_images_are_those_of_the_pipeline(draw, paper_run):
    folder = draw("samples", "--num_samples=1", "--seed=9", run=paper_run)
    pipeline = HSIVIPipeline.from_pretrained(paper_run / "pipeline")
    (image,) = pipeline(1, [torch.Generator().manual_seed(9)]).images
    assert np.array_equal(np.asarray(image), pixels(folder, 0))


def test_the_number_of_steps_may_be_chosen_among_those_trained(draw, several_run, tmp_path):
    pipeline = HSIVIPipeline.from_pretrained(several_run / "pipeline")
    for name, given, steps in (("one", ["--num_inference_steps=1"], 1), ("default", [], 4)):
        folder = draw(name, "--num_samples=1", "--seed=9", *given, run=several_run)
        (image,) = pipeline(1, [torch.Generator().manual_seed(9)], steps).images
        assert np.array_equal(np.asarray(image), pixels(folder, 0))
    with pytest.raises(ValueError, match="num_inference_steps=3, .* pass num_inference_steps=1, 2 or 4"):
        draw("three", "--num_inference_steps=3", run=several_run)
    assert not (tmp_path / "three").exists()


def test_a_conditional_pipeline_draws_all_classes_in_turn_or_those_that_are_named(draw, class_run):
    def images(labels):
        generators = [torch.Generator().manual_seed(number) for number in range(4)]
        pipeline = HSIVIPipeline.from_pretrained(class_run / "pipeline")
        return [np.asarray(image) for image in pipeline(4, generators, class_labels=labels).images]

    for name, given, labels in (("all", [], [0, 1, 2, 0]), ("named", ["--class_label", "2", "0"], [2, 0, 2, 0])):
        folder = draw(name, "--num_samples=4", *given, run=class_run)
        for number, image in enumerate(images(labels)):
            assert np.array_equal(image, pixels(folder, number))
    with pytest.raises(ValueError, match="this pipeline has no classes, leave it out"):
        draw("label", "--class_label=1")


@pytest.mark.parametrize("option", ["--num_samples=0", "--batch_size=0"])
def test_nothing_to_draw_is_refused(draw, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option.replace('=', ' ')}: give a number of at least 1"):
        draw("samples", option)
    assert not (tmp_path / "samples").exists()


def test_a_missing_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--pipeline is missing"):
        cli.sample([f"--output_dir={tmp_path / 'samples'}"])
    with pytest.raises((OSError, ValueError), match="nowhere"):
        cli.sample([f"--output_dir={tmp_path / 'samples'}", f"--pipeline={tmp_path / 'nowhere'}"])
    assert not (tmp_path / "samples").exists()


def test_a_folder_without_a_pipeline_and_an_unknown_repo_are_refused(tmp_path, monkeypatch):
    (tmp_path / "unfinished").mkdir()
    given = [f"--output_dir={tmp_path / 'samples'}"]
    with pytest.raises(
        ValueError, match="unfinished holds no pipeline: give the folder of a pipeline or of a finished"
    ):
        cli.sample([*given, f"--pipeline={tmp_path / 'unfinished'}"])
    with pytest.raises(ValueError, match="--pipeline no/body is no folder here and was not found on the Hub"):
        cli.sample([*given, "--pipeline=no/body"])


def test_a_device_that_is_not_there_is_refused(draw):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"--device {device} cannot be used here .*: give cpu, or leave it out"):
            draw("samples", f"--device={device}")


def test_a_run_stands_for_its_pipeline(draw, fast_run, tmp_path):
    """All other tests here give the folder of the run."""
    of_the_run = draw("run", "--num_samples=1")
    cli.sample([f"--pipeline={fast_run / 'pipeline'}", f"--output_dir={tmp_path / 'same'}", "--num_samples=1"])
    assert contents(of_the_run) == contents(tmp_path / "same")


def test_a_filled_output_folder_is_refused_unless_overwritten(draw, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "precious").touch()
    for run in ({}, {"run": tmp_path / "nowhere"}):  # before a pipeline is looked for
        with pytest.raises(ValueError, match="is not empty"):
            draw("samples", "--num_samples=1", **run)
    assert os.listdir(tmp_path / "samples") == ["precious"]
    draw("samples", "--num_samples=1", "--overwrite_output_dir")
    assert sorted(os.listdir(tmp_path / "samples")) == ["00000.png", "grid.png", "precious"]


def test_help(check_help):
    check_help(cli.sample, "sampling")
