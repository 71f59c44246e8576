"""Makes a teacher of random weights from a folder that holds its configs.

    python -m training.benchmarks.images.make_teacher --teacher training/teachers/cifar10_32 \
        --output_dir runs/teachers/cifar10_32

For trying a recipe, its memory and its speed, before the real weights are downloaded. Such a teacher has learned
nothing. The weights are the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass

from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.runs.folders import claim_output_dir
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.teachers.loading import read_teacher
from hsivi_diffusers.teachers.pixels import Pixels


@dataclass
class Options:
    _group = "teacher"
    teacher: str | None = option(None, "folder of unet/config.json and scheduler/scheduler_config.json")
    output_dir: str | None = option(None, "folder of the pipeline, which must be empty")


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    set_seed(0)
    teacher = read_teacher(str(options.teacher))
    if not isinstance(teacher, Pixels):
        raise ValueError(f"--teacher {options.teacher} has a {teacher.name}: give one with a UNet2DModel")
    output_dir = claim_output_dir(options.output_dir, keep=False)
    scheduler = DDPMScheduler.from_config(teacher.schedule.config)
    pipeline = DDPMPipeline(unet=teacher.network, scheduler=scheduler)
    pipeline.save_pretrained(output_dir)
    print(f"a teacher of {pipeline.unet.num_parameters():,} random parameters is in {output_dir}")


if __name__ == "__main__":
    run_command(main)
