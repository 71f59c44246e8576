"""The command `hsivi`: what it refuses, and its help."""

import os
import runpy
import sys

import pytest

import hsivi_diffusers
from hsivi_diffusers.commands import cli

CHOICES = "choose one of distil, plan, sample, evaluate, push, export, demo"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["distil", "--output_dir", "x"], "--pretrained_teacher_model is missing"),
        (["distil", "--pretrained_teacher_model", "./nowhere", "--output_dir", "x"], "'./nowhere' is no folder here"),
        (
            ["plan", "--pretrained_teacher_model=teacher"],
            "'teacher' is no folder here: give a folder, or a repo id such",
        ),
        (["distil", "--pretrained_teacher_model", "a/b"], "--output_dir is missing"),
        (["distil", "--output_dir=x", "--resume_from_checkpoint=latest"], "--output_dir x holds no run to resume"),
        (["plan", "--num_inference_steps", "0"], "--num_inference_steps=[0]: give one number of steps of at least 1"),
        (["plan", "--bogus"], "unrecognized arguments: --bogus (see `hsivi plan --help`)"),
        (["plan", "--num_inference_stpes=2"], "did you mean --num_inference_steps? (see `hsivi plan --help`)"),
        (["plan", "--guidance_falls=true"], "did you mean --decay_guidance? (see `hsivi plan --help`)"),  # of 0.2
        (["plan", "--num_steps=2"], "did you mean --num_inference_steps? (see `hsivi plan --help`)"),
        (["push", "--hub_model_id", "a/b"], "--run_dir is missing"),
        (["push", "--run_dir", "."], "--hub_model_id is missing"),
        (["push", "--hub_model_id", "a/b", "--run_dir", "."], "holds no pipeline: give the folder of a finished run"),
        (["distill"], f"unknown command 'distill': {CHOICES}; did you mean"),
        (["bogus"], f"unknown command 'bogus': {CHOICES}"),
    ],
)
def test_bad_input_of_a_command_is_one_line_and_exit_status_2(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert os.listdir() == []


def test_the_version_and_ctrl_c_are_one_line(capsys, monkeypatch):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hsivi-diffusers {hsivi_diffusers.__version__}\n"

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="error: interrupted"):
        cli.main(["evaluate"])


def test_traceback_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(ValueError, match="pretrained_teacher_model is missing"):
        cli.main(["distil", "--traceback", f"--output_dir={tmp_path / 'run'}"])


def ask(capsys, *args):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_shows_its_options(capsys, command):
    text = ask(capsys, command, "--help")
    assert text.startswith(f"usage: hsivi {command} ")
    assert "--config" in text
    assert len(ask(capsys, command, "--help_all")) >= len(text)


def test_the_demo_needs_gradio_and_its_help_does_not(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "hsivi_diffusers.commands.demo", None)
    assert "--server_port" in ask(capsys, "demo", "--help")
    with pytest.raises(SystemExit):
        cli.main(["demo"])
    assert capsys.readouterr().err == "error: gradio is missing: pip install 'hsivi-diffusers[demo]'\n"


def test_the_help_of_a_distillation_has_the_defaults_of_the_preset_that_is_named(capsys):
    for args, rate in ((["--help"], 0.001), (["--help", "--num_inference_steps=1"], 0.0005)):
        assert f"rate of the critic (default: {rate})" in " ".join(ask(capsys, "distil", *args).split())
    common, every = (
        " ".join(ask(capsys, "distil", kind, "--preset=paper").split()) for kind in ("--help", "--help_all")
    )
    assert "Adam learning rate of the critic (default: 0.0001)" in common
    assert "critic updates per student update (default: 20)" in every
    assert "critic updates per student update" not in common


def test_the_module_is_the_command(capsys, monkeypatch):
    """As `python -m hsivi_diffusers` runs it."""
    monkeypatch.setattr(sys, "argv", ["hsivi_diffusers", "--help"])
    runpy.run_module("hsivi_diffusers", run_name="__main__")
    assert capsys.readouterr().out == cli.USAGE
