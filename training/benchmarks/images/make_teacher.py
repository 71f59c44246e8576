"""Makes a teacher of random weights from a folder that holds its configs.

    python -m training.benchmarks.images.make_teacher --teacher training/teachers/cifar10_32 \
        --output_dir runs/teachers/cifar10_32

For trying a recipe, its memory and its speed, before the real weights are downloaded. Such a teacher has learned
nothing, and neither does what is distilled from it. The weights are a function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from hsivi_diffusers.folders import claim_output_dir
from hsivi_diffusers.options import option, parse_options


@dataclass
class Options:
    _group = "teacher"
    teacher: str | None = option(None, "folder of unet/config.json and scheduler/scheduler_config.json")
    output_dir: str | None = option(None, "folder of the pipeline")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    seed: int = option(0, "seed of the weights")


def check_teacher(teacher: str | None) -> Path:
    """Refuses a folder without the two configs."""
    folder = Path(teacher or "")
    if not all((folder / name).is_file() for name in ("unet/config.json", "scheduler/scheduler_config.json")):
        raise ValueError(
            f"--teacher {teacher} lacks unet/config.json or scheduler/scheduler_config.json: name a folder with the "
            "configs of a DDPMPipeline, such as training/teachers/cifar10_32"
        )
    return folder


def make_pipeline(folder: Path, seed: int) -> DDPMPipeline:
    """The pipeline that the configs of the folder describe, with random weights."""
    set_seed(seed)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(folder, subfolder="unet"))
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler.from_pretrained(folder, subfolder="scheduler"))


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    folder = check_teacher(options.teacher)
    output_dir = claim_output_dir(options.output_dir, options.overwrite_output_dir)
    pipeline = make_pipeline(folder, options.seed)
    pipeline.save_pretrained(output_dir)
    print(f"a teacher of {pipeline.unet.num_parameters():,} random parameters is in {output_dir}")


if __name__ == "__main__":
    main()
