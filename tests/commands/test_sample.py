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
from hsivi_diffusers.commands import cli, sample
from hsivi_diffusers.runs.artifacts import run_of
from hsivi_diffusers.teachers import loading
from short_run import contents


@pytest.fixture
def draw(fast_run, tmp_path):
    """Samples into a new folder and returns it; without a run, that of the preset `fast`."""

    def call(name, *arguments, run=fast_run):
        folder = tmp_path / name
        cli.sample([f"--pipeline={run}", f"--output_dir={folder}", "--device=cpu", *arguments])
        return folder

    return call


def pixels(folder, number):
    return np.asarray(Image.open(folder / f"{number:05d}.png")).astype(int)


def test_a_file_for_each_image_and_a_grid_of_the_first(draw, capsys, monkeypatch):
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
    monkeypatch.setattr(sample, "MOST_SHOWN", 4)
    assert Image.open(draw("few", "--num_samples=7", "--batch_size=3") / "grid.png").size == (2 * 66, 2 * 66)
    assert capsys.readouterr().out.startswith("7 images in ")


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


def test_an_image_depends_on_its_own_seed_only(draw, fast_run):
    """Up to one grey level, for the rounding of a batched product may depend on the size of the batch."""
    whole, again = draw("whole", "--num_samples=4"), draw("again", "--num_samples=4")
    assert (
        contents(whole) == contents(again) == contents(draw("pipeline", "--num_samples=4", run=fast_run / "pipeline"))
    )
    parts, later = draw("parts", "--num_samples=4", "--batch_size=3"), draw("later", "--num_samples=2", "--seed=2")
    for number in range(4):
        assert abs(pixels(whole, number) - pixels(parts, number)).max() <= 1
    for number in range(2):
        assert abs(pixels(whole, number + 2) - pixels(later, number)).max() <= 1
    assert abs(pixels(whole, 0) - pixels(whole, 1)).max() > 10


def test_images_are_those_of_the_pipeline_in_each_number_of_steps(draw, several_run):
    pipeline = HSIVIPipeline.from_pretrained(several_run / "pipeline")
    for name, given, steps in (("one", ["--num_inference_steps=1"], 1), ("default", [], 4)):
        folder = draw(name, "--num_samples=1", "--seed=9", *given, run=several_run)
        (image,) = pipeline(1, [torch.Generator().manual_seed(9)], steps).images
        assert np.array_equal(np.asarray(image), pixels(folder, 0))


def test_a_conditional_pipeline_draws_all_classes_in_turn_or_those_that_are_named(draw, class_run):
    def images(labels):
        generators = [torch.Generator().manual_seed(number) for number in range(4)]
        pipeline = HSIVIPipeline.from_pretrained(class_run / "pipeline")
        return [np.asarray(image) for image in pipeline(4, generators, class_labels=labels).images]

    for name, given, labels in (("all", [], [0, 1, 2, 0]), ("named", ["--class_label", "2", "0"], [2, 0, 2, 0])):
        folder = draw(name, "--num_samples=4", *given, run=class_run)
        for number, image in enumerate(images(labels)):
            assert np.array_equal(image, pixels(folder, number))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_samples=0"], "num_samples=0: give a whole number from 1 to"),
        (["--num_samples=1000000000000"], "num_samples=1000000000000: give a whole number from 1 to"),
        (["--batch_size=0"], "batch_size=0: give a whole number from 1 to"),
        (["--batch_size=1000000000000"], "batch_size=1000000000000: give a whole number from 1 to"),
        (["--seed=-1"], "seed=-1: give a whole number from 0 to"),
        ([f"--seed={2**64}"], f"seed={2**64}: give a whole number from 0 to"),
        (["--device=cuda:99"], "--device cuda:99 cannot be used here .*: give cpu, or leave it out"),
        (["--device=abacus"], "--device abacus cannot be used here .*: give cpu, or leave it out"),
        (["--device=meta"], "--device meta cannot be used here .*: give cpu, or leave it out"),
        (["--prompt", "a cat", "--prompts=cats.txt"], "--prompt and --prompts were both given"),
        (["--prompts=nowhere.txt"], "prompts='nowhere.txt' is no file"),
        (["--num_inference_steps=3"], "num_inference_steps=3, .* num_inference_steps=2"),
        (["--guidance_scale=3"], "guidance_scale=3.0: this sampler was trained with no guidance"),
        (["--pipeline="], "--pipeline is missing"),
        (["--pipeline=./nowhere"], r"'./nowhere' is no folder here: give a folder, or a repo id such as user/name$"),
        (["--pipeline={tmp}/nowhere"], "nowhere' is no folder here"),
        (["--pipeline=assets/digitst5"], r"digitst5' is no folder here.*; did you mean assets/digits_t5\?"),
        (["--pipeline=runs/digits_t44"], r"digits_t44' is no folder here.*; did you mean runs/digits_t4\?"),
        (["--pipeline={tmp}/unfinished"], "unfinished holds no pipeline: give the folder of a pipeline or of a finish"),
        (["--pipeline={tmp}/damaged"], "model_index.json is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_weights_are_loaded(draw, tmp_path, monkeypatch, options, message):
    for folder in ("unfinished", "damaged", "assets/digits_t5", "runs/digits_t4"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "digits_t4" / "options.json").touch()
    (tmp_path / "damaged" / "model_index.json").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_student", lambda *given: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        draw("samples", *(option.format(tmp=tmp_path) for option in options))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--class_label=1", "this pipeline has no classes, leave it out"),
        ("--prompt=a cat", "this pipeline takes no text, leave it out"),
        ("--pipeline=me/digits_t4", "--pipeline me/digits_t4 is no folder .* not found on the Hub .*mean me/digits_t5"),
        ("--pipeline=no/body", "--pipeline no/body is no folder here and was not found on the Hub"),
    ],
)
def test_what_only_the_pipeline_or_the_hub_can_tell_is_refused_too(draw, tmp_path, monkeypatch, option, message):
    (tmp_path / "me" / "digits_t5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        draw("samples", option)
    assert not (tmp_path / "samples").exists()


def test_a_repo_id_reads_no_folder_of_this_machine(tmp_path, monkeypatch):
    """As ./user/options.json, where `user` is a run of a private teacher."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "options.json").write_text('{"pretrained_teacher_model": "private"}')
    monkeypatch.chdir(tmp_path)
    assert run_of("user/name") == run_of("user/pipeline") == {}
    (tmp_path / "user" / "pipeline").mkdir()
    for name in ("user", "user/pipeline"):
        assert run_of(name) == {"pretrained_teacher_model": "private"}
    monkeypatch.chdir(tmp_path / "user" / "pipeline")
    assert run_of(".") == {"pretrained_teacher_model": "private"}


def test_a_filled_output_folder_is_refused_unless_overwritten(draw, tmp_path):
    """And of an earlier drawing nothing stays, of others all."""
    folder, others = tmp_path / "samples", {"00011.png", "20260101.png", "precious"}
    folder.mkdir()
    for name in others:
        (folder / name).touch()
    for run in ({}, {"run": tmp_path / "nowhere"}):  # before a pipeline is looked for
        with pytest.raises(ValueError, match="is not empty: name another folder, or pass --overwrite_output_dir$"):
            draw("samples", "--num_samples=1", **run)
    assert set(os.listdir(folder)) == others
    for number in (9, 4):
        draw("samples", f"--num_samples={number}", "--overwrite_output_dir")
        assert set(os.listdir(folder)) == {*others, "grid.png", *(f"{i:05d}.png" for i in range(number))}


def test_images_are_written_as_they_are_drawn(draw, tmp_path, monkeypatch):
    drawn, batches = sample.draw, []

    def interrupted(*given):
        batches.append(given)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return drawn(*given)

    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw("samples", "--num_samples=7", "--batch_size=2")
    assert sorted(os.listdir(tmp_path / "samples")) == [f"{number:05d}.png" for number in range(4)]
