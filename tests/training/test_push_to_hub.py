"""push_to_hub.py, and --push_to_hub of train_hsivi.py, against a Hub on the loopback."""

import json
import shutil
from pathlib import Path

import pytest

import push_to_hub as script
import train_hsivi
from hub_server import run_client

TRAINING = Path(__file__).parents[2] / "training"


def run_script(name, arguments, hub, home, token="hf_alice"):
    code = f"""
import os, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, {str(TRAINING)!r})
import {name}
{name}.main({[str(argument) for argument in arguments]!r})
"""
    return run_client(code, hub, home, token)


def training_arguments(teacher, folder, *more):
    return [
        f"--pretrained_teacher_model={teacher}",
        f"--output_dir={folder}",
        "--num_layers=2",
        "--train_batch_size=4",
        "--max_train_steps=2",
        "--push_to_hub=true",
        *more,
    ]


def test_the_help_names_its_options(check_help):
    check_help(script.main, "push")


def test_a_finished_run_is_pushed_with_its_card(hub, fast_run, tmp_path):
    run = run_script("push_to_hub", [f"--run_dir={fast_run}", "--hub_model_id=alice/fast"], hub, tmp_path)
    assert run.returncode == 0, run.stderr
    head = hub.repos["alice/fast"].branches["main"]
    assert f"pushed to {hub.url}/alice/fast/commit/{head.sha}" in run.stdout
    card = head.files["README.md"].decode()
    assert "preset fast" in card
    assert "base_model" not in card  # the teacher was a folder
    assert (
        head.files["unet/diffusion_pytorch_model.safetensors"]
        == (fast_run / "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes()
    )
    again = run_script("push_to_hub", [f"--run_dir={fast_run}", "--hub_model_id=alice/fast"], hub, tmp_path)
    assert again.returncode == 1
    assert "--hub_exist_ok" in again.stderr


def test_training_pushes_at_its_end_what_it_saved(hub, teacher, tmp_path):
    arguments = training_arguments(teacher, tmp_path / "run", "--hub_model_id=org/tiny", "--hub_token=hf_alice")
    run = run_script("train_hsivi", arguments, hub, tmp_path / "home", token=None)
    assert run.returncode == 0, run.stderr
    files = hub.repos["org/tiny"].branches["main"].files
    made, pushed = run.stdout.splitlines()[-2:]
    assert made == f"the pipeline is in {tmp_path / 'run/pipeline'}: measure it with evaluate.py, draw with sample.py"
    assert pushed.startswith("pushed to ")
    saved = tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors"
    assert files["unet/diffusion_pytorch_model.safetensors"] == saved.read_bytes()
    for path in (tmp_path / "run").glob("*.json"):
        assert "hf_alice" not in path.read_text()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_name_that_cannot_be_pushed_to_is_refused_before_the_training(hub, teacher, fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    arguments = training_arguments(teacher, folder, "--hub_model_id=bob/tiny", "--overwrite_output_dir=true")
    run = run_script("train_hsivi", arguments, hub, tmp_path / "home")
    assert run.returncode == 1
    assert "push under your own name" in run.stderr
    assert contents(folder) == contents(fast_run)


def test_a_push_that_fails_leaves_the_pipeline_and_says_how_to_push_it(hub, teacher, tmp_path):
    hub.refuse_uploads = set(range(1, 9))
    arguments = training_arguments(teacher, tmp_path / "run", "--hub_model_id=alice/tiny")
    run = run_script("train_hsivi", arguments, hub, tmp_path / "home")
    assert run.returncode == 1
    assert f"training/push_to_hub.py --run_dir {tmp_path / 'run'} --hub_model_id alice/tiny" in run.stderr
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--hub_model_id is missing"),
        (["--hub_model_id=alice/x"], "--run_dir is missing"),
        (["--hub_model_id=alice/x", "--run_dir=nowhere"], "holds no pipeline: give the folder of a finished run"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        script.main(arguments)


def test_training_needs_a_name_to_push_to(teacher, tmp_path):
    arguments = training_arguments(teacher, tmp_path / "run")
    with pytest.raises(ValueError, match="--push_to_hub needs --hub_model_id"):
        train_hsivi.main(arguments)
    with pytest.raises(ValueError, match="'tiny' does not say whose it is: give user/name"):
        train_hsivi.main([*arguments, "--hub_model_id=tiny"])
    with pytest.raises(ValueError, match="--hub_model_id alice/tiny names where to push: pass --push_to_hub too"):
        train_hsivi.main([*arguments, "--push_to_hub=false", "--hub_model_id=alice/tiny"])
    assert not (tmp_path / "run").exists()


def test_a_run_begun_anew_forgets_the_report_of_the_old_one(distil, fast_run, tmp_path):
    shutil.copytree(fast_run, tmp_path / "run")
    for name in ("report.json", "report.md", "samples.png", "curve.png"):
        (tmp_path / "run" / name).write_text("old")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    distil(tmp_path / "run", "--overwrite_output_dir=true", preset="fast", max_train_steps=2)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "critic", "notes.txt", "options.json", "pipeline", "training.json"}
