"""Measures what an update of a LoRA distillation costs beside its network calls, on the CPU.

    OMP_NUM_THREADS=1 python -m training.benchmarks.scenes.bench_step

A text-to-image teacher of random weights, of the shapes of assets/scenes or of --teacher, is distilled with preset
latent. By turns: an update, and its network calls alone, forward, and backward where a gradient was asked for. Prints
the medians of processor time, which other work on the machine does not lengthen, and the median of the turns' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import StableDiffusion3Pipeline
from torch import nn

from hsivi_diffusers import HSIVIConfig, HSIVITrainer
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.distillation.state import TrainingState
from hsivi_diffusers.distillation.updates import run_updates
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.options import option

from ..images.bench_sampling import seconds_of
from ..images.scene_set import LONGEST
from .train_teacher import Text, make_networks, make_pipeline, make_tokenizer
from .train_vae import Autoencoder, make_vae

PROMPTS = [f"a {color} book above a {thing}" for color in ("red", "green") for thing in ("cat", "dog", "clock", "star")]
Call = tuple[nn.Module, bool, tuple[Any, ...], dict[str, Any]]  # network, with a gradient or not, what it was told


@dataclass
class Benchmark:
    _group = "benchmark"
    teacher: str | None = option(None, "folder or repo id of a text-to-image pipeline; random weights by default")
    train_batch_size: int = option(4, "images of an update")
    lora_rank: int = option(64, "rank of the adapters; 0 trains copies")
    repetitions: int = option(20, "turns")


def make_teacher() -> StableDiffusion3Pipeline:
    tokenizer, vae = make_tokenizer(), make_vae(Autoencoder())
    return make_pipeline(vae, tokenizer, make_networks(Text(), vae, len(tokenizer)))


@contextmanager
def recording(state: TrainingState) -> Iterator[list[Call]]:
    """Records the calls of student, critic and teacher, without the graph that their arguments were made in."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        trains = any(weight.requires_grad for weight in module.parameters())
        args, told = recursively_apply(torch.Tensor.detach, (args, told))
        calls.append((module, trains and torch.is_grad_enabled(), args, told))

    networks = (state.student.network, state.critic.network, state.teacher.network)
    handles = [each.register_forward_pre_hook(record, with_kwargs=True) for each in networks]
    yield calls
    for handle in handles:
        handle.remove()


def replay(calls: list[Call]) -> None:
    """Makes the calls again."""
    for network, has_gradient, args, told in calls:
        with torch.set_grad_enabled(has_gradient):
            output = network(*args, **told).sample
        if has_gradient:
            output.backward(torch.ones_like(output))
            network.zero_grad()


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Benchmark], __doc__ or "", args=args)
    config = HSIVIConfig(
        prompts=PROMPTS,
        max_sequence_length=None if options.teacher else LONGEST,
        guidance_scale=4.0,
        num_inference_steps=4,
        train_batch_size=options.train_batch_size,
        lora_rank=options.lora_rank,
    )
    state = HSIVITrainer(options.teacher or make_teacher(), config).state
    steps = run_updates(state, 0)
    next(steps)  # the first one fills the pool
    with recording(state) as calls:
        next(steps)
    turns = []
    for _ in bar(range(options.repetitions), "turns"):
        turns.append((seconds_of(partial(next, steps)), seconds_of(partial(replay, calls))))
    update, bare = (statistics.median(each) for each in zip(*turns, strict=True))
    ratio = statistics.median(own / alone for own, alone in turns)
    backward = sum(gradient for _, gradient, *_ in calls)
    print(f"an update {update:.3f} s, its {len(calls)} calls, {backward} with a gradient, {bare:.3f} s: {ratio:.3f}")


if __name__ == "__main__":
    run_command(main)
