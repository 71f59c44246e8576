"""Compares a plan with the memory that an update takes on the CPU, of a text-to-image teacher of random weights.

    python -m training.benchmarks.images.bench_plan --pretrained_teacher_model sd15 --prompts default \\
        --num_inference_steps 2 --guidance_scale 4.5 --mixed_precision no --gradient_checkpointing true \\
        --train_batch_size 1 --critic_updates 1

has the options of `hsivi distil`, and needs the configs of the teacher alone. Its prompts have a few tokens. Prints the
MiB of the plan, the most that the process held during an update with the moments of both optimizers, and their ratio.
It runs on Linux.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from hsivi_diffusers import HSIVIConfig
from hsivi_diffusers.commands.cli import parse_distillation
from hsivi_diffusers.commands.options import run_command
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.updates import run_updates

PROCESS = Path("/proc/self")


def peak_of_update(name: str, revision: str | None, config: HSIVIConfig) -> int:
    """Most bytes that the process holds during an update."""
    config = replace(config, **plan.ONE_UPDATE)
    state = plan.make_state(plan.make_players(name, revision, config), config)
    plan.begin(state)
    (PROCESS / "clear_refs").write_text("5")  # the peak begins here
    next(run_updates(state, 1))  # after the fit to pairs
    (line,) = (each for each in (PROCESS / "status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(args: list[str] | None = None) -> None:
    given = sys.argv[1:] if args is None else args
    teacher, config, _ = parse_distillation(given, "python -m training.benchmarks.images.bench_plan", __doc__ or "")
    named = str(teacher.pretrained_teacher_model), teacher.revision
    memory = plan.measure(*named, config).memory
    planned = sum(memory.values()) - memory.get("pairs", 0)  # of which the update has but one
    measured = peak_of_update(*named, config)
    print(f"planned {planned >> 20}, measured {measured >> 20} MiB, ratio {planned / measured:.2f}")


if __name__ == "__main__":
    run_command(main)
