"""The command `hsivi`: distil a model, plan it, sample, evaluate, push, export, and show it in the browser."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..runs.artifacts import ADAPTER, OPTIONS, TRAINING, holds_pipeline, pipeline_of, read_record, sample_grids
from ..runs.folders import check_spelling
from ..runs.next_steps import resumption, to_finish
from ..runs.options import did_you_mean, option
from .options import parse_options, print_error, run_command, with_dashes
from .sample import sample  # torch and diffusers, which take seconds, are imported by what needs them

INTERRUPTED = 75  # exit status after SIGTERM or Ctrl-C: EX_TEMPFAIL, "try again"
USAGE = """usage: hsivi COMMAND [OPTIONS]

commands:
  distil     distil a pretrained diffusion pipeline into a few steps
  plan       estimate its memory and time, without training
  sample     draw images from a distilled pipeline
  evaluate   measure a run against solvers of its teacher
  push       push a run to the Hub, with its model card
  export     write the LoRA of a run for ComfyUI, with a workflow
  demo       draw in the browser, a student beside its teacher

`hsivi COMMAND --help` lists the common options of a command, `--help_all` all of them, and `hsivi --version` the
version. `--traceback` shows where an error comes from. `accelerate launch -m hsivi_diffusers distil ...` runs on
several devices.
"""
DISTIL = """Distil a pretrained diffusion pipeline into a few steps; no training data is needed.

    hsivi distil --pretrained_teacher_model google/ddpm-cifar10-32 --num_inference_steps 5 --learning_rate 1e-5 \\
        --critic_learning_rate 5e-5 --output_dir runs/cifar10

Writes OUTPUT_DIR/pipeline (an HSIVIPipeline, a pipeline like the teacher's, or a LoRA with its scheduler), critic,
samples, checkpoints and training.json. The command line overrides the YAML file of --config, which overrides the
preset. A run that was stopped continues by

    hsivi distil --output_dir runs/cifar10 --resume_from_checkpoint latest

with the options it had, except those of the Hub, which must be given again."""
PLAN = """Estimate the memory and time of `hsivi distil` with these options, without training."""
PUSH = """Push the pipeline of a finished run to the Hub, with a model card made from the run's report.

    hsivi push --run_dir runs/digits_t5 --hub_model_id user/digits-hsivi-5 --license apache-2.0

Run `hsivi evaluate` first: the card then says how good the sampler is. With --output_dir FOLDER the files and the card
are written there, to look at them, and nothing is pushed."""


EXPORT = """Write the LoRA of a finished run for another program, with what it needs there.

    hsivi export --run_dir runs/sd4 --format comfyui --output_dir runs/sd4/comfyui

Writes the LoRA, workflow.json and README.md."""
DEMO = """Open a page in the browser that draws from distilled samplers, each beside a solver and its teacher.

    hsivi demo --pipeline runs/digits_t5"""


@dataclass
class Teacher:
    _group = "teacher and checkpoints"
    pretrained_teacher_model: str | None = option(None, "folder or repo id of a pipeline of diffusers")
    revision: str | None = option(None, "branch, tag or commit of the repo", common=False)
    resume_from_checkpoint: str | None = option(None, "`latest`, or the path of a checkpoint")


@dataclass
class Hub:
    _group = "hub"
    hub_model_id: str | None = option(None, "repo to push to: user/name or organisation/name")
    hub_exist_ok: bool = option(False, "push to a repo that already has files; replaces its weights and README.md")
    hub_private_repo: bool = option(False, "make a new repo private", common=False)
    hub_token: str | None = option(None, "access token; that of `hf auth login` by default", common=False)

    def settings(self) -> dict[str, Any]:
        """How to push, as arguments of `hsivi_diffusers.push`."""
        return {"exist_ok": self.hub_exist_ok, "private": self.hub_private_repo or None, "token": self.hub_token}


@dataclass
class PushAtEnd(Hub):
    push_to_hub: bool = option(False, "push the pipeline to the Hub at the end")

    def check(self) -> None:
        """Refuses one of the two options without the other, and what is no name of a repo."""
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id: name the repo, such as user/digits-hsivi-5")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError(f"--hub_model_id {self.hub_model_id} has no effect without --push_to_hub: pass both")
        if self.hub_model_id:
            from ..share.push import check_repo_id

            check_repo_id(self.hub_model_id)


@dataclass
class OnCard:
    _group = "plan"
    card: str | None = option(None, "graphics card to estimate the time for, such as `RTX 4090` or H100")
    price_per_hour: float | None = option(None, "of the card, in any currency")


@dataclass
class Push(Hub):
    run_dir: str | None = option(None, "folder of a run; its pipeline is pushed")
    pipeline: str | None = option(None, "folder of a pipeline, instead of a run")
    base_model: str | None = option(None, "repo id of the teacher, for the card; that of the run by default")
    license: str | None = option(None, "identifier of the licence, such as apache-2.0, for the card")
    fp16: bool = option(True, "push the weights in half precision too, as the variant fp16")
    hub_revision: str | None = option(None, "branch to push to; created if it does not exist")
    output_dir: str | None = option(None, "new folder to write the files and the card to, instead of pushing them")


@dataclass
class Export:
    _group = "export"
    run_dir: str | None = option(None, "folder of a run whose result is a LoRA")
    format: Literal["comfyui"] = option("comfyui", "program that it is for")
    output_dir: str | None = option(None, "folder to write; a new or empty one")


@dataclass
class Demo:
    _group = "demo"
    pipeline: list[str] = option(
        [], "distilled pipelines to choose from: folders, of runs too, or repo ids; in a clone its students by default"
    )
    server_name: str = option("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    server_port: int | None = option(None, "port; the first free one from 7860 on by default")
    device: str | None = option(None, "cpu, cuda or another torch device; the GPU if there is one")


def distil(args: Sequence[str], prog: str = "hsivi distil") -> None:
    """Runs `hsivi distil`."""
    from ..runs.output import Output, check_output, check_place

    teacher, config, hub = read_distillation(args, prog, DISTIL)
    if not config.output_dir:
        raise ValueError("--output_dir is missing: name the folder to write to")
    output = Output(config.output_dir, config.overwrite_output_dir, teacher.resume_from_checkpoint)
    check_output(output)
    check_place(output)  # before the teacher is loaded, and again when the folder is claimed
    from ..distillation.trainer import CollapsedRunError, HSIVITrainer, InterruptedRunError
    from ..evaluation.images import show
    from ..vi import DivergenceError

    trainer = HSIVITrainer(teacher.pretrained_teacher_model, config, teacher.revision)
    trainer.before_start = partial(_claim_repo, hub)
    try:
        summary = trainer.train(teacher.resume_from_checkpoint)
    except InterruptedRunError as error:
        command = resumption(config.output_dir, launched=trainer.accelerator.num_processes > 1)
        again = ", and the options of the Hub" * hub.push_to_hub
        trainer.accelerator.print(f"{with_dashes(str(error))}\ncontinue it: {command}{again}")
        raise SystemExit(INTERRUPTED) from error
    except CollapsedRunError as error:
        raise SystemExit(f"error: {with_dashes(str(error))}") from error
    except DivergenceError as error:
        raise SystemExit(with_dashes("; ".join([f"error: {error}", *error.__notes__]))) from error
    if trainer.accelerator.is_main_process:
        folder = Path(config.output_dir)
        if grids := sample_grids(folder):
            show([*grids.values()][-1])
        prompt = '--prompt "a prompt" ' if trainer.state.teacher.takes_text else ""
        print(
            f"the training took {summary['seconds']:.0f} s; the pipeline is in {folder / 'pipeline'}\n"
            f"look at it: open {folder / 'index.html'} in a browser\n"
            f"measure it: hsivi evaluate --run_dir {folder}\n"
            f"draw from it: hsivi sample --pipeline {folder} {prompt}--output_dir {folder / 'drawn'}"
        )
        if hub.push_to_hub:  # last, for the others would not wait long enough
            _push_trained(trainer, hub)


def _claim_repo(hub: PushAtEnd) -> None:
    if hub.push_to_hub:
        from ..share.push import claim

        with hub_errors_as_oserror():
            claim(str(hub.hub_model_id), **hub.settings())


def read_distillation(args: Sequence[str], prog: str, description: str, *more: type[Any]) -> tuple[Any, ...]:
    """Reads the options of a distillation, and refuses what cannot run; of a resumed run its own are the defaults.

    Args:
        args: Words of the command line.
        prog: Name of the program.
        description: What it does.
        more: Further groups of options, whose instances are returned after those of teacher, distillation and hub.
    """
    from ..distillation.config import read_settings
    from ..runs.output import starting_run

    read = partial(parse_distillation, args, prog, description, *more)
    teacher, config, hub, *rest = read()
    record = _record_of(teacher.resume_from_checkpoint, config.output_dir)
    if record is not None:
        teacher, config, hub, *rest = read(before=read_settings(record))
    config.check()
    hub.check()
    run = starting_run(config.init_from)
    if run is not None and teacher.pretrained_teacher_model is None:
        before = read_record(run / OPTIONS)
        teacher.pretrained_teacher_model, teacher.revision = before["pretrained_teacher_model"], before["revision"]
    if not teacher.pretrained_teacher_model and config.init_from is not None:
        raise ValueError(
            f"--init_from {config.init_from} is no folder of a run, which would name the teacher: check the spelling, "
            "or give --pretrained_teacher_model, too"
        )
    if not teacher.pretrained_teacher_model:
        raise ValueError(_why_no_teacher(teacher.resume_from_checkpoint, config.output_dir, record))
    check_spelling(teacher.pretrained_teacher_model)  # before torch is imported
    return teacher, config, hub, *rest


def parse_distillation(
    args: Sequence[str], prog: str, description: str, *more: type[Any], before: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Reads the options of a distillation, and nothing else."""
    from ..distillation.config import HSIVIConfig

    return parse_options([Teacher, HSIVIConfig, PushAtEnd, *more], description, args, prog, before)


def _why_no_teacher(checkpoint: str | None, output_dir: str | None, record: Path | None) -> str:
    if record is not None:
        return (
            f"the run of {record} was given its teacher from Python: resume it there, by "
            "HSIVITrainer(teacher, config).train(resume_from_checkpoint='latest')"
        )
    if checkpoint and output_dir:
        place = f"--output_dir {output_dir}" if checkpoint == "latest" else f"the folder of {checkpoint}"
        return f"{place} holds no run to resume: name another, or give --pretrained_teacher_model and the other options"
    return "--pretrained_teacher_model is missing: give a folder or repo id of a diffusers pipeline"


def _record_of(checkpoint: str | None, output_dir: str | None) -> Path | None:
    """The options.json of the run that is continued, if there is one."""
    if not checkpoint or not output_dir:
        return None
    record = (Path(output_dir) if checkpoint == "latest" else Path(checkpoint).parent.parent) / OPTIONS
    return record if record.is_file() else None


@contextmanager
def hub_errors_as_oserror() -> Iterator[None]:
    """Makes one OSError of what the client raises for a cut or refused connection, the remedy first."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (RuntimeError, HTTPError) as error:
        notes = getattr(error, "__notes__", [])
        raise OSError(" ".join([*notes, f"({error})"]) if notes else str(error)) from error


def _push_trained(trainer: Any, hub: PushAtEnd) -> None:
    try:
        with hub_errors_as_oserror():
            print(f"pushed to {trainer.push_to_hub(hub.hub_model_id, **hub.settings())}")
    except Exception as error:
        folder = trainer.config.output_dir
        error.add_note(
            f"the training is done and its pipeline is in {Path(folder) / 'pipeline'}: push it with "
            f"hsivi push --run_dir {folder} --hub_model_id {hub.hub_model_id}"
        )
        raise


def plan(args: Sequence[str]) -> None:
    """Runs `hsivi plan`."""
    teacher, config, _, on = read_distillation(args, "hsivi plan", PLAN, OnCard)
    from ..distillation.plan import print_plan

    print_plan(teacher.pretrained_teacher_model, config, teacher.revision, on.card, on.price_per_hour)


def evaluate(args: Sequence[str]) -> None:
    """Runs `hsivi evaluate`."""
    from .evaluate import main

    main(list(args))


def demo(args: Sequence[str]) -> None:
    """Runs `hsivi demo`."""
    (options,) = parse_options([Demo], DEMO, args, "hsivi demo")
    if find_spec("gradio") is None:
        raise ValueError("gradio is missing: pip install 'hsivi-diffusers[demo]'")
    from .demo import serve

    serve(options)


def push_run(args: Sequence[str]) -> None:
    """Runs `hsivi push`."""
    (options,) = parse_options([Push], PUSH, args, "hsivi push")
    if not options.hub_model_id:
        raise ValueError("--hub_model_id is missing: name the repo, such as user/digits-hsivi-5")
    if not (options.run_dir or options.pipeline):
        raise ValueError("--run_dir is missing: give the folder of a run, or --pipeline FOLDER")
    folder = Path(options.pipeline) if options.pipeline else pipeline_of(options.run_dir)
    if not holds_pipeline(folder):
        text = f"{folder} holds no pipeline: give the folder of a finished run, or a saved pipeline"
        raise ValueError(text + to_finish(Path(options.run_dir or folder)))
    from ..share.card import gaps
    from ..share.push import push

    settings = {name: getattr(options, name) for name in ("run_dir", "base_model", "license", "fp16", "output_dir")}
    settings |= {"revision": options.hub_revision, **options.settings()}
    with hub_errors_as_oserror():
        url = push(folder, options.hub_model_id, **settings)
    if options.output_dir is None:
        print(f"pushed to {url}")
        return
    for path in sorted(path for path in Path(url).rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>13,} {path}")
    card = Path(url) / "README.md"
    for gap in gaps(card.read_text(encoding="utf-8"), bool(options.run_dir)):
        print(gap)
    print(f"nothing was pushed: read the card, {card}, and push by the same without --output_dir")


def export_run(args: Sequence[str]) -> None:
    """Runs `hsivi export`."""
    (options,) = parse_options([Export], EXPORT, args, "hsivi export")
    for name in ("run_dir", "output_dir"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing: name a folder")
    adapter, record = Path(options.run_dir) / "pipeline", Path(options.run_dir) / TRAINING
    if not record.is_file() or not holds_pipeline(adapter):
        text = f"{options.run_dir} holds no finished run: give the folder that `hsivi distil` wrote"
        raise ValueError(text + to_finish(Path(options.run_dir)))
    if not (adapter / ADAPTER).is_file():
        raise ValueError(
            f"{adapter} holds a whole pipeline and no LoRA, which ComfyUI does not load: draw with `hsivi sample`, or "
            "train Stable Diffusion, SDXL or a flow transformer with a lora_rank above 0"
        )
    from ..share.comfyui import export
    from ..share.push import check_adapter

    steps = check_adapter(adapter).depths[-1]
    name = f"{Path(options.run_dir).resolve().name}_{steps}_steps"
    lora = export(adapter, read_record(record), name, Path(options.output_dir))
    print(
        f"copy {lora} to models/loras of ComfyUI, and open {lora.parent / 'workflow.json'} in its window\n"
        f"what to choose there: {lora.parent / 'README.md'}"
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "distil": distil,
    "plan": plan,
    "sample": sample,
    "evaluate": evaluate,
    "push": push_run,
    "export": export_run,
    "demo": demo,
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command of `hsivi`; an expected error is one line and exit status 2."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name, *rest = words
    if name == "--version":
        print(f"hsivi-diffusers {version('hsivi-diffusers')}")
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        sys.exit(print_error(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}{hint}"))
    try:
        run_command(partial(COMMANDS[name], rest))
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
