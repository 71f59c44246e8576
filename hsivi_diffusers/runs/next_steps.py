"""What to do with a run next: commands of a terminal, and Python code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import join
from typing import Any

from .artifacts import ADAPTER, OPTIONS, TRAINING, holds_pipeline, read_json
from .student_code import student_code

IN_PYTHON = """\
trainer = HSIVITrainer(teacher, config)  # those of the run
trainer.train(resume_from_checkpoint="latest")"""


def next_steps(
    run_dir: Path, options: Mapping[str, Any], training: Mapping[str, Any], stopped: bool
) -> list[tuple[str, str]]:
    """What each step is for, and its commands or code.

    Paths are relative to the current folder where the run lies in it, as that of the teacher may be.

    Args:
        run_dir: Folder of the run.
        options: Its options.json.
        training: Its training.json, empty of an unfinished run.
        stopped: Whether the run was stopped because its images had collapsed.
    """
    here, path = Path.cwd(), Path(os.path.abspath(run_dir))
    run = path.relative_to(here) if path.is_relative_to(here) else path
    first = ("Open this folder in a terminal", join(["cd", str(here)]))
    if not training:
        return [first, _continuation(str(run), options, stopped)]
    if not (path / "pipeline").is_dir():
        return []
    code = ("Load it in Python", student_code(path / "pipeline", str(run / "pipeline"), options, training))
    if not holds_pipeline(path / "pipeline"):
        return [first, code]
    push = ["hsivi", "push", "--run_dir", str(run), "--hub_model_id", "user/name", "--license", "apache-2.0"]
    named = [] if options.get("pretrained_teacher_model") else ["--teacher", "FOLDER_OR_REPO_OF_THE_TEACHER"]
    steps = [
        first,
        ("Draw images", ["hsivi", "sample", "--pipeline", str(run), "--output_dir", str(run / "drawn")]),
    ]
    if not (path / "report.json").is_file():
        evaluate = ["hsivi", "evaluate", "--run_dir", str(run), *named]
        steps.append(("Compare it with solvers of its teacher", evaluate))
    steps.append(("Publish it, under your name and a licence that its teacher's allows", push))
    workflow = training.get("comfyui")
    if (path / "pipeline" / ADAPTER).is_file() and isinstance(workflow, dict) and "nodes" in workflow:
        export = ["hsivi", "export", "--run_dir", str(run), "--format", "comfyui", "--output_dir", str(run / "comfyui")]
        steps.append(("Write it for ComfyUI", export))
    return [(title, text if isinstance(text, str) else join(text)) for title, text in steps] + [code]


def _continuation(run: str, options: Mapping[str, Any], stopped: bool) -> tuple[str, str]:
    title = "Continue all the same" if stopped else "Continue if it was interrupted"
    if not options.get("pretrained_teacher_model"):
        return title, IN_PYTHON
    return title, resumption(run) + " --validation_steps 0" * stopped


def to_finish(run: Path) -> str:
    """How to continue a run that has not ended, as the end of a refusal; empty for any other folder."""
    options = read_json(run / OPTIONS)
    if not options or (run / TRAINING).is_file():
        return ""
    by = resumption(str(run)) if options.get("pretrained_teacher_model") else "HSIVITrainer of its teacher, in Python"
    return f"; this run has not ended: continue it by {by}"


def resumption(run: str, launched: bool = False) -> str:
    """The command that continues a run, with the options that it had; `launched` in several processes."""
    program = ["accelerate", "launch", "-m", "hsivi_diffusers"] if launched else ["hsivi"]
    return join([*program, "distil", "--output_dir", run, "--resume_from_checkpoint", "latest"])
