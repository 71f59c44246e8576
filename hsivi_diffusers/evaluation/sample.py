"""Draws pictures from a distilled pipeline into a folder of PNG files and one contact sheet.

python -m hsivi_diffusers.evaluation.sample --pipeline runs/digits_t5/pipeline \
        --output_dir runs/digits_t5/samples --num_samples 64
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from tqdm import tqdm

from ..folders import claim_output_dir
from ..options import option, parse_options
from ..pipeline_hsivi import HSIVIPipeline


@dataclass
class Sampling:
    _argument_group_name = "sampling"
    pipeline: str | None = option(None, "folder or repo id of an HSIVIPipeline")
    output_dir: str | None = option(None, "folder of the pictures")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    num_samples: int = option(64, "pictures to draw")
    num_inference_steps: int | None = option(
        None, "network calls for each, one of the counts that were trained; the largest by default"
    )
    batch_size: int = option(64, "pictures at once")
    seed: int = option(0, "each picture has a generator of its own, seeded with seed + its number")
    class_label: int | None = option(None, "class of all pictures, for a class-conditional pipeline")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to sample")


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Sampling], __doc__ or "", args=args)
    if not options.pipeline:
        raise ValueError("--pipeline is missing: give the folder or the repo id of an HSIVIPipeline")
    if (Path(options.pipeline) / "pipeline").is_dir():
        raise ValueError(f"--pipeline {options.pipeline} is a run: give {Path(options.pipeline) / 'pipeline'}")
    if options.num_samples < 1 or options.batch_size < 1:
        raise ValueError(f"--num_samples {options.num_samples}, --batch_size {options.batch_size}: give at least 1")
    pipeline = HSIVIPipeline.from_pretrained(options.pipeline).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(options.num_inference_steps)  # refuses a count that was not trained
    output_dir = claim_output_dir(options.output_dir, options.overwrite_output_dir)
    pictures = []
    for first in tqdm(range(0, options.num_samples, options.batch_size), desc="sample", unit="batch"):
        seeds = [options.seed + i for i in range(first, min(first + options.batch_size, options.num_samples))]
        labels = None if options.class_label is None else [options.class_label] * len(seeds)
        generators = [torch.Generator(options.device).manual_seed(seed) for seed in seeds]
        pictures += pipeline(len(seeds), generators, options.num_inference_steps, class_labels=labels).images
    for number, picture in enumerate(pictures):
        picture.save(output_dir / f"{number:05d}.png")
    columns = math.isqrt(len(pictures))
    rows = len(pictures) // columns
    make_image_grid(pictures[: rows * columns], rows=rows, cols=columns).save(output_dir / "grid.png")
    print(f"{len(pictures)} pictures in {output_dir}, {rows * columns} of them in {output_dir / 'grid.png'}")


if __name__ == "__main__":
    main()
