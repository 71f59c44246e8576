"""`HSIVITrainer`: distils a pretrained diffusion pipeline into a few steps, without training data."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, LoggerType, set_seed
from diffusers import DiffusionPipeline

from ..runs.artifacts import OPTIONS, PROMPTS, TRAINING, read_record
from ..runs.checkpoints import Checkpoints
from ..runs.folders import remove_folder, write_json, write_text
from ..runs.measures import counted
from ..runs.output import Output, check_inputs, claimed, finished, start_run, starting_run
from ..runs.page import LOG, PAGE, write_page
from ..share.push import push
from ..teachers.adapters import has_adapter
from ..teachers.comfyui import find_workflow
from ..teachers.loading import load_teacher
from ..teachers.starts import check_start
from ..teachers.teacher import Teacher
from ..vi import CriticObjective, DivergenceError, Step
from .config import HSIVIConfig, complete, usual_options
from .networks import HALF, load_networks
from .pairs import InterruptedRunError as InterruptedRunError
from .progress import CollapsedRunError as CollapsedRunError
from .progress import Progress
from .state import PAIRS, TrainingState, adam_of
from .updates import check_objective, fit_calls, run_updates

WRITTEN = (
    TRAINING,
    PAGE,
    LOG,
    PROMPTS,
    PAIRS,
    "pipeline",
    "critic",
    "samples",
    "logs",
    "report.json",
    "report.md",
    "samples.png",
    "curve.png",
)
Callback = Callable[["HSIVITrainer", Step], dict[str, float] | None]


class HSIVITrainer:
    """Distils a pretrained diffusion pipeline into `num_inference_steps` layers (arXiv 2310.17153).

    Under `accelerate launch` every process makes one.

    Args:
        teacher: See `load_teacher`; also a `Teacher` of your own.
        config: Settings; `HSIVIConfig()` by default.
        revision: Branch, tag or commit of the repo.
        callbacks: Each is called as callback(trainer, step) after every student update, in every process. `step` is a
            `vi.Step`: `step.step` is its number, from 0, and `step.layers.loss` the losses, shape (B,).
            `trainer.pipeline` is the student so far. A dictionary of numbers that it returns is shown in the bar and by
            the trackers of the main process.
        objective: Instead of that of the config: any `vi.CriticObjective`, with weights in score units. Layers that
            learn from pairs alone do not ask it; with num_pairs=0 there are none.

    Raises:
        ValueError: The config cannot run, or the teacher cannot be loaded or distilled.

    Example:
        >>> trainer = HSIVITrainer("assets/digits_ddpm", HSIVIConfig(num_inference_steps=4, output_dir="runs/d4"))
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.pipeline(batch_size=16).images  # doctest: +SKIP
    """

    def __init__(
        self,
        teacher: str | os.PathLike[str] | DiffusionPipeline | Teacher,
        config: HSIVIConfig | None = None,
        revision: str | None = None,
        callbacks: Sequence[Callback] = (),
        objective: CriticObjective | None = None,
    ) -> None:
        if not isinstance(config, HSIVIConfig | None):
            raise ValueError(f"config is a {type(config).__name__}: give an HSIVIConfig(num_inference_steps=4, ...)")
        if not isinstance(objective, CriticObjective | None):
            raise ValueError(f"objective={objective!r}: give a vi.CriticObjective, such as vi.KullbackLeibler(weight)")
        if callable(callbacks) or not all(map(callable, callbacks)):
            raise ValueError(f"callbacks={callbacks!r}: give a list of functions of (trainer, step)")
        self.config = config = replace(config) if config is not None else HSIVIConfig()
        config.check()
        check_objective(objective, config)
        adam_of(config)  # refused now, and not after the teacher is loaded
        check_tracker(config.report_to)
        name = os.fspath(teacher) if isinstance(teacher, str | os.PathLike) else None
        inputs: dict[str, Any] = {"pretrained_teacher_model": name}
        inputs["prompts"] = config.prompts if isinstance(config.prompts, str) else None
        run = starting_run(config.init_from)
        inputs["init_from"] = config.init_from if run is None else run / "pipeline"
        if config.init_from is not None and run is None:
            check_start(config.init_from)
        if config.output_dir is not None:
            check_inputs(Output(config.output_dir), WRITTEN, **inputs)
        dtype = HALF.get(config.precision) if config.lora_rank != 0 else None
        loaded = load_teacher(teacher, revision, dtype, config.prompts is not None)
        self.teacher = {"pretrained_teacher_model": name, "revision": revision}
        self.callbacks = list(callbacks)
        self.accelerator = make_accelerator(config)
        set_seed(config.seed)
        networks, identity = load_networks(loaded, config, self.accelerator)
        self.state = TrainingState(networks, config, self.accelerator, identity, objective)
        self.progress = Progress(self.state)
        self.before_start: Callable[[], Any] = lambda: None  # called when the output folder is claimed
        self._has_trained = False

    @property
    def pipeline(self) -> Any:
        """The averaged student on the device of the run: an `HSIVIPipeline`, or a pipeline like the teacher's."""
        return self.state.make_pipeline()

    def train(self, resume_from_checkpoint: str | None = None) -> dict[str, Any]:
        """Trains, and writes pipeline, critic and training.json into the output folder.

        Args:
            resume_from_checkpoint: "latest", or the path of a checkpoint; the result is bit-identical to that of a run
                that was never stopped.

        Returns:
            What training.json holds: seconds, network calls (forward passes of one image through student, critic or
            teacher, in any process), peak memory of the first process, processes and precision.

        Raises:
            ValueError: The output folder is missing, holds something else, or a checkpoint does not fit.
            DivergenceError: A loss or a weight is not finite.
            CollapsedRunError: After a tenth of the run its images are nothing like the teacher's, twice in a row; a
                checkpoint was saved.
            InterruptedRunError: SIGTERM or Ctrl-C came.
        """
        if self._has_trained and resume_from_checkpoint is None:
            raise ValueError(
                "this trainer has trained already: make a new HSIVITrainer, or pass resume_from_checkpoint='latest' if "
                "there is a checkpoint"
            )
        main, config = self.accelerator.is_main_process, self.config
        settings = {**self.teacher, **config.settings()}
        anew = config.overwrite_output_dir and resume_from_checkpoint is None
        limits = (config.checkpointing_steps, config.checkpoints_total_limit)
        run = Output(config.output_dir, anew, resume_from_checkpoint, *limits)
        with ExitStack() as stack:
            if main:  # now, for later a refusal would cost a training or an earlier run
                stack.enter_context(claimed(run))
                self.before_start()
                remedy = " (a finished run can be named by init_from there)"
                start_run(run, settings, WRITTEN, remedy, complete)
            self.accelerator.wait_for_everyone()
            objective = None if self.state.objective is None else type(self.state.objective).__name__
            identity = {**settings, **self.state.identity, "custom_objective": objective}
            if (last := self.state.bridge.scheduler.trained_grids[0][-1]) != 0:  # of 0.2 it is 0
                identity["last_timestep"] = last
            checkpoints = Checkpoints(run, self.accelerator, self.state, identity, complete)
            start, *_ = before = checkpoints.load()
            if self._has_trained and not start:
                raise ValueError("this trainer has trained, and there is no checkpoint: make a new HSIVITrainer")
            if main:  # a run that cannot be resumed keeps its own
                write_json(checkpoints.output_dir / OPTIONS, {**self.teacher, **config.record()})
            self._has_trained = True
            if config.report_to:
                stack.enter_context(trackers(self.accelerator, {**self.teacher, **config.record()}))
            if main and self.state.teacher.takes_text:  # a run that is refused keeps its own
                write_text(checkpoints.output_dir / PROMPTS, "\n".join(self.state.teacher.conditions.prompts) + "\n")
            if start >= config.max_train_steps:
                self.accelerator.print(f"nothing is left to do, the run had {counted(start, 'update')}")
            elif has_adapter(self.state.student.network) and "refused" in (found := self._find_workflow()):
                self.accelerator.print(f"`hsivi export --format comfyui` will refuse this student: {found['refused']}")
            with signals_as_trigger(self.accelerator), self.state.counting_rows():
                seconds, calls = self._run(checkpoints, *before)
            record = checkpoints.output_dir / TRAINING
            summary = read_record(record) if start >= config.max_train_steps and record.exists() else {}
            if "seconds" not in summary:
                summary = self._summarise(seconds, calls)
            if main:
                self.state.save(checkpoints.output_dir)
                remove_folder(checkpoints.output_dir / PAIRS)
                write_json(record, summary)
                write_page(checkpoints.output_dir, usual_options(config.record()))
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        return summary

    def _run(self, checkpoints: Checkpoints, start: int, seconds: float, calls: int | None) -> tuple[float, int | None]:
        """Runs the updates from `start` on; takes seconds and network calls of those before, returns those of all."""
        total, clock, done = self.config.max_train_steps, time.perf_counter(), start

        def spent() -> tuple[float, int | None]:
            counted = sum(self.state.called.values()) * self.accelerator.num_processes
            return seconds + time.perf_counter() - clock, None if calls is None else calls + counted

        try:
            for step in self.progress.watch(run_updates(self.state, start), start, self._call_back):
                done = step.step + 1
                stop = self.accelerator.check_trigger()
                if done % self.config.checkpointing_steps == 0 or done == total or stop:
                    checkpoints.save(done, *spent())
                if stop and done < total:
                    self.progress.leave(done)
                    raise InterruptedRunError(
                        f"stopped and saved after update {done}: continue with resume_from_checkpoint latest"
                    )
        except CollapsedRunError:
            if done % self.config.checkpointing_steps:  # else it is saved
                checkpoints.save(done, *spent())
            raise
        except DivergenceError as error:
            saved = finished(checkpoints.output_dir)
            error.add_note(f"the last good checkpoint is {saved[-1]}" if saved else "there was no checkpoint yet")
            raise
        return spent()

    def _call_back(self, step: Step) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for callback in self.callbacks:
            returned = callback(self, step) or {}
            if not isinstance(returned, dict):
                raise ValueError(f"a callback returned {returned!r}: return a dictionary of numbers, or None")
            numbers.update(returned)
        return numbers

    def _summarise(self, seconds: float, calls: int | None) -> dict[str, Any]:
        """The content of training.json, of the seconds and network calls of all updates."""
        teacher = self.teacher["pretrained_teacher_model"]
        return {
            "seconds": seconds,
            "network_calls": None if calls is None else calls + sum(fit_calls(self.state)),
            "peak_memory_mib": peak_memory(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "base_model": _if_published(teacher),
            "start": published_start(self.config.init_from),
            "call": self.state.teacher.call_arguments(self.state.bridge.scheduler),
            "embeds_guidance": self.state.teacher.embeds_guidance,
            "euler": self.state.teacher.euler_arguments(self.state.bridge.scheduler),
            "comfyui": self._find_workflow(),
            **self.state.identity,
        }

    def _find_workflow(self) -> dict[str, Any]:
        return find_workflow(self.state.teacher, self.state.bridge.scheduler)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Pushes the averaged student with its model card; see `hsivi_diffusers.push` for options; returns the URL."""
        folder = self.config.output_dir
        run_dir = Path(folder) if folder and (Path(folder) / TRAINING).is_file() else None
        if not has_adapter(self.state.student.network):
            return push(self.pipeline, repo_id, run_dir=run_dir, **options)
        if run_dir is None or not self._has_trained:
            raise ValueError("there is no adapter to push yet: call train() first")
        return push(run_dir / "pipeline", repo_id, run_dir=run_dir, **options)


def published_start(init_from: str | None) -> str | None:
    """What was published that the student, or the run that it starts from, began with."""
    if run := starting_run(init_from):
        start: str | None = read_record(run / TRAINING).get("start")
        return start
    return _if_published(init_from)


def _if_published(name: str | None) -> str | None:
    """The name of a repo, or of a file in one; None for what is here."""
    return None if name is None or Path(name).exists() else name


def peak_memory(device: torch.device) -> int | None:
    """Most MiB that tensors took on a GPU, else this process since it began; None where that is not known."""
    measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if measure is not None:
        return int(measure(device)) // 2**20
    with suppress(ImportError):  # on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    return None


def make_accelerator(config: HSIVIConfig) -> Accelerator:
    """Returns the processes and the precision of the run, or refuses them with ValueError."""
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=str(Path(config.output_dir or ".") / "logs"),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}, which under accelerate takes one model, and "
            "two are trained here, student and critic: launch with data parallelism, see training/accelerate_configs, "
            "and save memory with shard_base, mixed_precision bf16 and gradient_checkpointing"
        )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, and each was initialised as a single-process run: on a CPU set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would leave it out
        raise ValueError("mixed_precision='fp16' requires a GPU: on a CPU take 'bf16', or 'no'")
    if accelerator.mixed_precision != config.precision:
        raise ValueError(
            f"mixed_precision={config.precision!r}, and this process has trained in {accelerator.mixed_precision!r}, "
            "which accelerate keeps: give that precision, or start a new process"
        )
    on_cpu = accelerator.device.type == "cpu"
    if accelerator.mixed_precision == "bf16" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        accelerator.print(
            "this CPU has no instructions for mixed_precision='bf16', and takes up to 70 times longer: give 'no'"
        )
    return accelerator


def check_tracker(name: str | None) -> None:
    """Refuses, with ValueError, an unknown tracker, and one without its package, which accelerate would leave out."""
    known = [each for each in LoggerType.list() if each != "all"]
    if name not in (None, "all", *known):
        raise ValueError(f"report_to={name!r} is unknown: choose one of {', '.join(known)}, or all")
    if name is not None and not any(map(find_spec, known if name == "all" else [name])):
        package = "tensorboard" if name == "all" else name
        raise ValueError(f"report_to={name!r}, and its package is not installed: pip install {package}")


@contextmanager
def trackers(accelerator: Accelerator, options: dict[str, Any]) -> Iterator[None]:
    """Starts the trackers of a run with its options, and ends them if it fails or is interrupted."""
    plain = (bool, int, float, str, type(None))  # what trackers accept
    config = {name: value if isinstance(value, plain) else json.dumps(value) for name, value in options.items()}
    accelerator.init_trackers("hsivi", config=config)
    try:
        yield
    except BaseException:
        for tracker in accelerator.trackers:
            tracker.finish()
        raise


@contextmanager
def signals_as_trigger(accelerator: Accelerator) -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C pull accelerate's trigger, and not end the process; a second Ctrl-C ends it at once."""

    def pull(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        accelerator.set_trigger()

    alone = threading.current_thread() is threading.main_thread()  # which alone handles signals
    before = {number: signal.signal(number, pull) for number in (signal.SIGTERM, signal.SIGINT) if alone}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
