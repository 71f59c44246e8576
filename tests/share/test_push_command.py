"""`hsivi push`, and --push_to_hub of `hsivi distil`, against a Hub on the loopback."""

import json
import shutil

import pytest

from hsivi_diffusers.commands import cli
from hsivi_diffusers.runs.page import LOG, PAGE
from short_run import contents

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def train(arguments):
    """Runs `hsivi distil --push_to_hub` with one update."""

    def run(folder, *more):
        given = arguments(folder, "--push_to_hub", *more, max_train_steps=1, critic_updates=1)
        cli.main(["distil", *given])

    return run


@pytest.fixture
def refused(capsys):
    """Calls a function that ends with exit status 2, and returns what it said."""

    def call(function, *given):
        with pytest.raises(SystemExit) as exit:
            function(*given)
        assert exit.value.code == 2
        return capsys.readouterr().err

    return call


def test_a_finished_run_is_pushed_with_its_card(logged_in, fast_run, capsys, refused):
    arguments = ["push", f"--run_dir={fast_run}", "--hub_model_id=alice/fast"]
    cli.main(arguments)
    head = logged_in.repos["alice/fast"].branches["main"]
    assert f"pushed to {logged_in.url}/alice/fast/commit/{head.sha}" in capsys.readouterr().out
    card = head.files["README.md"].decode()
    assert "preset fast" in card
    assert "base_model" not in card  # the teacher was a folder
    assert head.files[WEIGHTS] == (fast_run / "pipeline" / WEIGHTS).read_bytes()
    text = refused(cli.main, arguments)
    assert "error: " in text
    assert "--hub_exist_ok" in text


def test_what_would_be_pushed_is_written_without_a_hub(logged_in, fast_run, tmp_path, capsys, refused):
    arguments = ["push", f"--run_dir={fast_run}", "--hub_model_id=alice/fast"]
    cli.main([*arguments, f"--output_dir={tmp_path / 'files'}"])
    *listed, unnamed, unmeasured, last = capsys.readouterr().out.splitlines()[-12:]
    assert unnamed == "the card does not name the teacher: if the Hub has it, give its repo by --base_model"
    assert unmeasured == "the card has no measurements: run `hsivi evaluate` first"
    assert last.startswith(f"nothing was pushed: read the card, {tmp_path / 'files' / 'README.md'}")
    assert logged_in.repos == {}
    assert "is not an empty folder" in refused(cli.main, [*arguments, f"--output_dir={tmp_path}"])
    cli.main(arguments)
    written = {str(path): data for path, data in contents(tmp_path / "files").items()}
    pushed = dict(logged_in.repos["alice/fast"].branches["main"].files)
    del pushed[".gitattributes"]  # of the Hub
    assert written == pushed
    assert all(any(line.endswith(f"/{name}") for line in listed) for name in written)


def test_training_pushes_at_its_end_what_it_saved(logged_in, train, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    folder = tmp_path / "run"
    train(folder, "--hub_model_id=org/tiny", "--hub_token=hf_alice")
    files = logged_in.repos["org/tiny"].branches["main"].files
    *lines, pushed = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0].endswith(f"; the pipeline is in {folder / 'pipeline'}")
    assert lines[1:] == [
        f"look at it: open {folder / 'index.html'} in a browser",
        f"measure it: hsivi evaluate --run_dir {folder}",
        f"draw from it: hsivi sample --pipeline {folder} --output_dir {folder / 'drawn'}",
    ]
    assert pushed.startswith("pushed to ")
    assert files[WEIGHTS] == (folder / "pipeline" / WEIGHTS).read_bytes()
    assert "hsivi" in files["README.md"].decode()
    for path in folder.glob("*.json"):
        assert "hf_alice" not in path.read_text()


def test_what_cannot_be_pushed_to_or_from_is_refused_before_the_training(logged_in, train, fast_run, tmp_path, refused):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    assert "push under your own name" in refused(train, folder, "--hub_model_id=bob/tiny", "--overwrite_output_dir")
    assert "is not empty" in refused(train, folder, "--hub_model_id=alice/tiny")
    assert contents(folder) == contents(fast_run)
    assert "alice/tiny" not in logged_in.repos  # none is made where the folder is refused


def test_a_push_that_fails_leaves_the_pipeline_and_says_how_to_push_it(logged_in, train, tmp_path, refused):
    logged_in.refuse_uploads = set(range(1, 9))
    folder = tmp_path / "run"
    text = refused(train, folder, "--hub_model_id=alice/tiny")
    assert f"push it with hsivi push --run_dir {folder} --hub_model_id alice/tiny" in text
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert json.loads((folder / "training.json").read_text())["processes"] == 1


def test_training_needs_a_name_to_push_to(train, distil, tmp_path, refused):
    folder = tmp_path / "run"
    assert "--push_to_hub needs --hub_model_id" in refused(train, folder)
    assert "'tiny' does not say whose it is: give user/name" in refused(train, folder, "--hub_model_id=tiny")
    with pytest.raises(ValueError, match="--hub_model_id alice/tiny has no effect without --push_to_hub: pass both"):
        distil(folder, "--hub_model_id=alice/tiny")
    assert not folder.exists()


def test_a_run_begun_anew_forgets_the_report_of_the_old_one(distil, fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    old = ["report.json", "report.md", "samples.png", "curve.png", "samples/step-1.png", "logs/hsivi", "pairs/0"]
    for name in ("notes.txt", *old):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    distil(folder, "--overwrite_output_dir", max_train_steps=1, critic_updates=1)
    left = {"checkpoints", "critic", "notes.txt", "options.json", "pipeline", "training.json"}
    assert {path.name for path in folder.iterdir()} == {".lock", PAGE, LOG, *left}
