"""Distils a pretrained diffusion UNet into T layers; training data may be used, and is not needed.

    accelerate launch training/train_hsivi.py --config training/configs/digits_t5.yaml

Writes OUTPUT_DIR/pipeline (an HSIVIPipeline), OUTPUT_DIR/critic, OUTPUT_DIR/checkpoints and OUTPUT_DIR/training.json.
Options come from the preset, then the YAML file of --config, then the command line; --preset paper is the recipe of
arXiv 2310.17153. --plan says what a run would cost. A run that is stopped goes on with --resume_from_checkpoint latest.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from ..folders import write_json
from ..hub import claim, push
from ..pipeline_hsivi import HSIVIPipeline
from ..vi import DivergenceError
from .checkpoints import Checkpoints, check_teacher, claimed, start_run
from .config import Hub, Options, check_options, complete, parse_recipe
from .plan import print_plan
from .progress import Monitor
from .trainer import Players, PreemptionError, guides, load_networks

PREEMPTED = 75  # exit status after SIGTERM or Ctrl-C: EX_TEMPFAIL, "try again"
WRITTEN = ("training.json", "pipeline", "critic", "validation", "report.json", "report.md", "samples.png", "curve.png")


def make_accelerator(options: Options) -> Accelerator:
    """The processes and the precision of the run.

    Raises:
        ValueError: The launcher or the precision is none for this script, see `check_accelerator`.
    """
    if options.hardware.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=options.hardware.mixed_precision,
        log_with=options.run.report_to,
        project_dir=str(Path(options.run.output_dir or ".") / options.run.logging_dir),
    )
    check_accelerator(accelerator)
    return accelerator


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuses a plugin that takes a single model, processes that do not know each other, and fp16 on a CPU."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}, which under accelerate takes one model, and "
            "here two are trained, layers and critic: launch with data parallelism, see training/accelerate_configs, "
            "and save memory by --mixed_precision bf16, --gradient_checkpointing and --gradient_accumulation_steps"
        )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, of which each takes itself for the only one: on a CPU set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would leave it out
        raise ValueError("--mixed_precision fp16 requires a GPU: on a CPU take bf16, or no")


@contextmanager
def claim_folders(options: Options) -> Iterator[None]:
    """Makes the output folder and the repo, or refuses: now, for later it would cost a training or an earlier run."""
    run, hub = options.run, options.hub
    check_teacher(run, str(options.teacher.pretrained_teacher_model), WRITTEN)
    with claimed(run):
        if hub.push_to_hub:
            private = hub.hub_private_repo or None
            claim(str(hub.hub_model_id), exist_ok=hub.hub_exist_ok, private=private, token=hub.hub_token)
        remedy = ", where --init_from goes on from the layers and critic of a run that is finished"
        start_run(run, options[:4], WRITTEN, remedy)
        yield


@contextmanager
def signals_as_trigger(accelerator: Accelerator) -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C pull accelerate's trigger, and not end the process; a second Ctrl-C ends it at once."""

    def pull(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        accelerator.set_trigger()

    before = {number: signal.signal(number, pull) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    players: Players, checkpoints: Checkpoints, monitor: Monitor, options: Options, start: int, spent: float
) -> float:
    """Runs the updates from `start` on, before which `spent` seconds went by; returns the seconds of all.

    Raises:
        SystemExit: The run diverged, or SIGTERM or Ctrl-C came: then a checkpoint was saved, if there was an update,
            and the status is 75.
    """
    run, total = options.run, options.training.max_train_steps
    clock = time.perf_counter()

    def seconds() -> float:
        return spent + time.perf_counter() - clock

    try:
        for step in monitor.watch(players.updates(start), start):
            done = step.step + 1
            stop = players.accelerator.check_trigger()
            if done % run.checkpointing_steps == 0 or done == total or stop:
                checkpoints.save(done, seconds())
            if stop and done < total:
                players.accelerator.print(
                    f"stopped: saved after step {done}; go on with --resume_from_checkpoint latest"
                )
                raise SystemExit(PREEMPTED)
    except PreemptionError as error:
        players.accelerator.print(
            "stopped before the first update, nothing was saved: --resume_from_checkpoint latest starts anew"
        )
        raise SystemExit(PREEMPTED) from error
    except DivergenceError as error:
        kept = checkpoints.finished()
        place = f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
        raise SystemExit(f"{error}; {place}") from error
    return seconds()


def summarise(options: Options, seconds: float, calls: int | None, accelerator: Accelerator) -> dict[str, Any]:
    """What training.json says: the cost, and the repo of the teacher if it came from the Hub.

    A network call is a forward pass of one picture through student, critic or teacher, in any process.
    """
    teacher = str(options.teacher.pretrained_teacher_model)
    return {
        "seconds": seconds,
        "network_calls": calls,
        "processes": accelerator.num_processes,
        "gradient_accumulation_steps": options.hardware.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "base_model": None if Path(teacher).exists() else teacher,
    }


def count_calls(counted: int, players: Players, before: int, record: Path) -> int | None:
    """Network calls of a run, of which those after `before` updates were counted; if none was done, of its record.

    The updates before cost what those after do. A run that is resumed does not fit its pairs again, and makes them
    again if they guide the layers; both are told as of a run that was never stopped.
    """
    total = players.options.training.max_train_steps
    made, fitted = players.pair_calls
    if before < total:
        again = made if guides(players.options.method) else 0
        updates = counted - (again if before else made + fitted)
        return round(updates * total / (total - before)) + made + fitted
    calls: int | None = json.loads(record.read_text()).get("network_calls") if record.exists() else None
    return calls


def closing_line(players: Players, start: int, seconds: float, output_dir: Path) -> str:
    steps, rows = players.options.training.max_train_steps, players.rows
    speed = steps * rows / max(seconds, 1e-9)
    done = "nothing was left to do, the run had " if start == steps else ""
    return (
        f"{done}{steps} updates of {rows} rows in {seconds:.0f} s, {speed:.0f} pictures a second\n"
        f"the pipeline is in {output_dir / 'pipeline'}: measure it with evaluate.py, draw with sample.py"
    )


def push_pipeline(output_dir: Path, hub: Hub) -> None:
    """Pushes OUTPUT_DIR/pipeline with its card."""
    try:
        url = push(
            HSIVIPipeline.from_pretrained(output_dir / "pipeline"),
            str(hub.hub_model_id),
            run_dir=output_dir,
            exist_ok=hub.hub_exist_ok,
            private=hub.hub_private_repo or None,
            token=hub.hub_token,
        )
    except Exception as error:
        error.add_note(
            f"The training is done and its pipeline is in {output_dir / 'pipeline'}: push it with "
            f"python -m hsivi_diffusers.distillation.push_to_hub --run_dir {output_dir} "
            f"--hub_model_id {hub.hub_model_id}"
        )
        raise
    print(f"pushed to {url}")


def main(args: list[str] | None = None) -> None:
    options = parse_recipe(__doc__ or "", args)
    complete(options)
    check_options(options)
    if options.run.plan:
        print_plan(options)
        return
    accelerator = make_accelerator(options)
    set_seed(options.training.seed)
    players = Players(load_networks(options, accelerator), options, accelerator)
    monitor = Monitor(players, options, Path(options.run.output_dir or ""))
    with claim_folders(options) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        run(players, monitor, options)
        if accelerator.is_main_process and options.hub.push_to_hub:  # last, for the others would not wait long enough
            push_pipeline(Path(str(options.run.output_dir)), options.hub)


def run(players: Players, monitor: Monitor, options: Options) -> None:
    """Trains, and saves what was trained."""
    accelerator, output_dir = players.accelerator, Path(str(options.run.output_dir))
    if options.run.report_to:
        accelerator.init_trackers(options.run.tracker_project_name)
    checkpoints = Checkpoints(options.run, accelerator, players, players.identity)
    start, spent = checkpoints.load()
    with signals_as_trigger(accelerator), players.counting_rows() as rows:
        seconds = train(players, checkpoints, monitor, options, start, spent)
    if accelerator.is_main_process:
        players.save(output_dir)
        counted = sum(rows.values()) * accelerator.num_processes
        calls = count_calls(counted, players, start, output_dir / "training.json")
        write_json(output_dir / "training.json", summarise(options, seconds, calls, accelerator))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.print(closing_line(players, start, seconds, output_dir))


if __name__ == "__main__":
    main()
