"""The output folder of a run: which inputs it must not hold, and whose settings it holds."""

import shutil

import pytest

from hsivi_diffusers.commands import cli
from hsivi_diffusers.runs.output import Output, check_inputs, check_output
from short_run import contents
from training.benchmarks.images import train_baseline


@pytest.mark.parametrize("inside", ["pipeline", "checkpoints/kept"])
@pytest.mark.parametrize("program", [cli.distil, train_baseline.main])
def test_a_student_is_not_written_over_its_teacher(teacher, tmp_path, inside, program):
    place = shutil.copytree(teacher, tmp_path / "run" / inside)
    with pytest.raises(ValueError, match="pretrained_teacher_model=.* lies among the files .*: name another folder"):
        program([f"--pretrained_teacher_model={place}", f"--output_dir={tmp_path / 'run'}", "--overwrite_output_dir"])
    assert (place / "unet" / "config.json").exists()


@pytest.mark.parametrize("inside", ["", "checkpoints/kept", "samples/kept"])
def test_a_run_does_not_start_from_a_run_that_it_would_remove(distil, fast_run, tmp_path, inside):
    folder = shutil.copytree(fast_run, tmp_path / "run" / inside)
    (tmp_path / "linked").symlink_to(folder)
    before = contents(tmp_path)
    for init_from in (folder, tmp_path / "linked"):
        with pytest.raises(ValueError, match="init_from=.* lies among the files that a run .*: name another folder"):
            distil(tmp_path / "run", "--overwrite_output_dir", init_from=init_from)
    assert contents(tmp_path) == before


def test_inputs_beside_what_a_run_writes_are_accepted(tmp_path):
    for name in ("prompts.txt", "teacher", "pipeline"):
        (tmp_path / name).mkdir()
    run = Output(str(tmp_path))
    check_inputs(run, ["prompts.txt"], teacher=tmp_path / "teacher", init_from=tmp_path / "pipeline", prompts=None)
    check_inputs(run, ["user"], teacher="user/name")
    with pytest.raises(ValueError, match=r"prompts='.*prompts\.txt' lies among the files"):
        check_inputs(run, ["prompts.txt"], prompts=tmp_path / "linked" / ".." / "prompts.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing_steps": 0}, "--checkpointing_steps 0: give a number of at least 1"),
        ({"checkpoints_total_limit": -1}, "--checkpoints_total_limit -1: give a number of at least 1"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "starts over and .* continues: pass one"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_output(Output("run", **options))
