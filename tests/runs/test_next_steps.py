"""The commands for a run, by its state."""

import json
import shlex
from pathlib import Path

import pytest

from hsivi_diffusers.commands import cli
from hsivi_diffusers.commands.evaluate import Evaluation
from hsivi_diffusers.commands.options import parse_options
from hsivi_diffusers.commands.sample import Sampling
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.runs.next_steps import next_steps

OPTIONS = {"pretrained_teacher_model": "assets/digits_ddpm", "num_inference_steps": [4]}
GROUPS = {"sample": [Sampling], "evaluate": [Evaluation], "push": [cli.Push], "export": [cli.Export]}
FINISHED = {"seconds": 3.0}


@pytest.fixture(params=["run", "it's my $HOME; rm -rf run"])
def run(request, tmp_path, monkeypatch):
    """A finished run in the current folder, whose name must be quoted or need not be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / request.param / "pipeline").mkdir(parents=True)
    (tmp_path / request.param / "pipeline" / "model_index.json").write_text('{"_class_name": "HSIVIPipeline"}')
    return Path(request.param)


def commands(run, options=OPTIONS, training=FINISHED, stopped=False):
    """The words of each command, without those that are Python code."""
    steps = next_steps(run, options, training, stopped)
    return [words for _, text in steps if (words := shlex.split(text, comments=True))[0] in ("cd", "hsivi")]


def read(words):
    """The options that `hsivi` reads."""
    (options,) = parse_options(GROUPS[words[1]], "", words[2:])
    return options


def test_a_finished_run_is_drawn_from_measured_and_pushed(run, tmp_path):
    cd, sample, evaluate, push = commands(run)
    assert cd == ["cd", str(tmp_path)]
    assert Path(read(sample).pipeline) == Path(read(evaluate).run_dir) == Path(read(push).run_dir) == run
    assert run.is_dir()
    assert Path(read(sample).output_dir) == run / "drawn"
    read(sample).check()
    assert (read(push).hub_model_id, read(push).license) == ("user/name", "apache-2.0")
    assert read(evaluate).teacher is None


def test_a_run_that_was_measured_is_not_to_be_measured(run):
    (run / "report.json").write_text("{}")
    assert [words[1] for words in commands(run)[1:]] == ["sample", "push"]


def test_a_teacher_that_was_given_from_python_is_named_for_the_measurement(run):
    assert read(commands(run, {"num_inference_steps": [4]})[2]).teacher == "FOLDER_OR_REPO_OF_THE_TEACHER"


def test_a_lora_with_a_workflow_is_exported(run):
    training = {**FINISHED, "comfyui": {"nodes": {}}}
    assert [words[1] for words in commands(run, training=training)[1:]] == ["sample", "evaluate", "push"]
    (run / "pipeline" / ADAPTER).touch()
    *_, export = commands(run, training=training)
    assert Path(read(export).run_dir) == run
    assert "export" not in [words[1] for words in commands(run, training={**FINISHED, "comfyui": {"refused": "x"}})]


def test_an_unfinished_run_goes_on_and_one_that_was_stopped_does_so_without_grids(run):
    for stopped in (False, True):
        cd, resume = commands(run, training={}, stopped=stopped)
        assert resume[:2] == ["hsivi", "distil"]
        teacher, config, _ = cli.parse_distillation(resume[2:], "hsivi distil", "")
        assert teacher.resume_from_checkpoint == "latest"
        assert Path(config.output_dir) == run
        assert config.validation_steps == (0 if stopped else None)


def test_a_run_of_a_teacher_from_python_goes_on_there(run):
    ((_, cd), (title, code)) = next_steps(run, {"num_inference_steps": [4]}, {}, False)
    assert title == "Continue if it was interrupted"
    compile(code, "code", "exec")
    assert 'trainer.train(resume_from_checkpoint="latest")' in code


def test_the_student_of_a_teacher_of_ones_own_is_only_loaded_in_python(run):
    (run / "pipeline" / "model_index.json").unlink()
    assert [words[0] for words in commands(run)] == ["cd"]
    assert "load_student" in next_steps(run, OPTIONS, FINISHED, False)[-1][1]


def test_a_record_without_a_pipeline_has_no_commands(run):
    (run / "pipeline" / "model_index.json").unlink()
    (run / "pipeline").rmdir()
    assert next_steps(run, OPTIONS, FINISHED, False) == []


def test_a_run_elsewhere_is_named_by_its_whole_path(run, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert read(commands(tmp_path / run)[2]).run_dir == str(tmp_path / run)


@pytest.mark.parametrize("words", ["sample --pipeline", "push --hub_model_id user/name --run_dir", "export --run_dir"])
@pytest.mark.parametrize("teacher", [OPTIONS, {"num_inference_steps": [4]}])
def test_a_command_for_finished_runs_says_how_an_unfinished_one_goes_on(run, tmp_path, capsys, words, teacher):
    (run / "pipeline" / "model_index.json").unlink()
    (run / "options.json").write_text(json.dumps(teacher))
    program, *named = words.split()
    with pytest.raises(SystemExit, match="2"):
        cli.main([program, "--output_dir", str(tmp_path / "drawn"), *named, str(run)])
    *_, remedy = capsys.readouterr().err.strip().split("; this run has not ended: continue it by ")
    if teacher is not OPTIONS:
        assert remedy == "HSIVITrainer of its teacher, in Python"
        return
    _, config, _ = cli.parse_distillation(shlex.split(remedy)[2:], "hsivi distil", "")
    assert Path(config.output_dir).samefile(run)
