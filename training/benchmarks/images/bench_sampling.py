"""Measures what a pipeline costs beside its network calls, on the CPU.

    OMP_NUM_THREADS=1 python -m training.benchmarks.images.bench_sampling --pipeline runs/digits_t5/pipeline

In one run, by turns: T bare calls of the UNet, a whole HSIVIPipeline call, and DDPMPipeline at as many steps. Prints
the medians of processor time, which other work on the machine does not lengthen, and each as a ratio to the bare calls.
Without --pipeline the digits teacher stands in, with 5 steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, load_teacher
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.teachers.pixels import Pixels


@dataclass
class Benchmark:
    _group = "benchmark"
    pipeline: str | None = option(None, "folder or repo id of an HSIVIPipeline; the digits teacher by default")
    batch_size: int = option(16, "images at once")
    repetitions: int = option(200, "turns")


def load_pipeline(name: str | None) -> HSIVIPipeline:
    if name is not None:
        return HSIVIPipeline.from_pretrained(name)
    teacher = load_teacher("assets/digits_ddpm")
    schedule = teacher.schedule
    grid = HSIVIScheduler.make_layer_timesteps(5, "uniform", len(schedule), start=440)
    scheduler = HSIVIScheduler.from_config(schedule.config, layer_timesteps=grid, noise_eta=1.0, clip_sample=False)
    return HSIVIPipeline(unet=teacher.network, scheduler=scheduler)


def make_contenders(pipeline: HSIVIPipeline, batch_size: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the bare calls first."""
    unet, timesteps = pipeline.unet, pipeline.scheduler.timesteps
    stock = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(prediction_type=pipeline.scheduler.config.prediction_type))
    for each in (pipeline, stock):
        each.set_progress_bar_config(disable=True)
    x = torch.randn(batch_size, *Pixels.of(pipeline, pipeline.scheduler).shape)
    labels = torch.zeros(batch_size, dtype=torch.long) if pipeline.num_classes else None
    told: dict[str, Any] = {} if labels is None else {"class_labels": labels}

    def bare() -> None:
        with torch.no_grad():
            for timestep in timesteps:
                unet(x, timestep, **told)

    steps = len(timesteps)
    contenders: dict[str, Callable[[], object]] = {
        f"{steps} bare calls of the UNet": bare,
        "HSIVIPipeline, output_type='pt'": lambda: pipeline(batch_size, **told, output_type="pt"),
        "HSIVIPipeline, output_type='pil'": lambda: pipeline(batch_size, **told),
    }
    if labels is None and not pipeline.scheduler.is_flow:  # which it cannot draw
        contenders[f"DDPMPipeline at {steps} steps, output_type='pil'"] = lambda: stock(
            batch_size, num_inference_steps=steps
        )
    return contenders


def seconds_of(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Benchmark], __doc__ or "", args=args)
    contenders = make_contenders(load_pipeline(options.pipeline), options.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in bar(range(options.repetitions + 5), "turns"):
        for name, run in contenders.items():
            seconds[name].append(seconds_of(run))
    print(f"batch {options.batch_size}, {options.repetitions} turns, {torch.get_num_threads()} thread(s)")
    reference = next(iter(seconds.values()))[5:]  # the first ones warm up
    for name, every in seconds.items():
        times = every[5:]
        # The median of the turns' own ratios: a disturbance of the machine falls on both of a turn.
        ratio = statistics.median(own / bare for own, bare in zip(times, reference, strict=True))
        print(f"{name:45s} {1e3 * statistics.median(times):8.2f} ms   {ratio:.3f}")


if __name__ == "__main__":
    run_command(main)
