"""Draw images from a distilled pipeline, ours or a stock one: `hsivi sample`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from ..runs.artifacts import PROMPTS, folder_of_run, holds_pipeline, pipeline_of, read_prompts, run_of
from ..runs.bars import bar
from ..runs.folders import check_output_dir, claim_output_dir
from ..runs.options import option
from .options import parse_options

SAMPLE = """Draw images from a distilled pipeline into a folder of PNG files and one contact sheet.

    hsivi sample --pipeline runs/digits_t5/pipeline --output_dir runs/digits_t5/drawn"""


@dataclass
class Sampling:
    _group = "sampling"
    pipeline: str | None = option(None, "folder or repo id of a distilled pipeline, or folder of a run")
    output_dir: str | None = option(None, "folder of the images")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    num_samples: int | None = option(None, "images to draw; one of each prompt that is given, or 64, by default")
    num_inference_steps: int | None = option(None, "steps, one of the trained counts; the largest by default")
    batch_size: int | None = option(None, "images at once; 64 by default, of latents 4")
    seed: int = option(0, "image i has the seed `seed + i`")
    class_label: list[int] = option([], "classes to draw, one image of each in turn; all by default")
    prompt: list[str] = option([], "of a text-to-image sampler, prompts to draw, in turn; those of the run by default")
    prompts: str | None = option(None, "text file with such prompts, one in a line")
    guidance_scale: float | None = option(None, "one of the scales that were trained; the lowest by default")
    device: str | None = option(None, "cpu, cuda or another torch device; the GPU if there is one")


def sample(args: Sequence[str]) -> None:
    """Runs `hsivi sample`."""
    (options,) = parse_options([Sampling], SAMPLE, args, "hsivi sample")
    check_output_dir(options.output_dir, options.overwrite_output_dir)
    for name in ("num_samples", "batch_size"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise ValueError(f"--{name} {given}: give a number of at least 1")
    import torch
    from diffusers.utils import make_image_grid
    from PIL import ImageOps

    from ..evaluation.images import enlarge, show
    from ..pipeline_hsivi import HSIVIPipeline

    device = usable_device(options.device)
    pipeline = load_sampler(options.pipeline).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(options.num_inference_steps)  # refuses a count that was not trained
    pipeline.scheduler.guidance_index(options.guidance_scale)
    ours = isinstance(pipeline, HSIVIPipeline)
    classes = _conditions(options, pipeline)
    given = len(classes) if options.prompt or options.prompts else 0
    size, batch = options.num_samples or given or 64, options.batch_size or (64 if ours else 4)
    output_dir = claim_output_dir(options.output_dir, options.overwrite_output_dir)
    images: list[Any] = []
    for first in bar(range(0, size, batch), desc="sample", unit="batch"):
        numbers = range(first, min(first + batch, size))
        labels = [classes[number % len(classes)] for number in numbers] if classes else None
        generators = [torch.Generator(device).manual_seed(options.seed + number) for number in numbers]
        images += draw(pipeline, labels, generators, options.num_inference_steps, options.guidance_scale)
    for number, image in enumerate(images):
        image.save(output_dir / f"{number:05d}.png")
    columns = math.isqrt(len(images))
    rows = len(images) // columns
    shown = [ImageOps.expand(enlarge(image, 64), 1, "gray") for image in images]
    make_image_grid(shown[: rows * columns], rows=rows, cols=columns).save(output_dir / "grid.png")
    show(output_dir / "grid.png")
    listed = f"{classes}[i % {len(classes)}]" if len(classes) <= 20 else f"number i % {len(classes)}"
    what = "prompt" if classes and isinstance(classes[0], str) else "class"
    turn = f"; image i is of {what} {listed}" if classes else ""
    print(f"{len(images)} images in {output_dir}, {rows * columns} of them in {output_dir / 'grid.png'}{turn}")


def usable_device(name: str | None) -> str:
    """The device of that name; by default the GPU, if there is one.

    Raises:
        ValueError: It cannot be used.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here ({error}): give cpu, or leave it out") from error
    return device


def classes_of(pipeline: Any, name: str) -> list[int]:
    """The classes that a distilled pipeline of that name was trained on, empty without classes; all without a run."""
    number, shares = _num_classes(pipeline), run_of(name).get("class_shares")
    return [label for label, share in enumerate((shares or [1] * number)[:number]) if share]


def _num_classes(pipeline: Any) -> int:
    from ..pipeline_hsivi import HSIVIPipeline
    from ..teachers.denoisers import num_classes
    from ..teachers.teacher import network_of

    return (pipeline.num_classes if isinstance(pipeline, HSIVIPipeline) else num_classes(network_of(pipeline))) or 0


def _conditions(options: Sampling, pipeline: Any) -> Sequence[int | str]:
    """The classes or prompts to draw; those of the run, if that is at hand, by default, and none without classes."""
    from ..teachers.prompts import takes_text

    by_text, number = takes_text(pipeline), _num_classes(pipeline)
    if any(not 0 <= label < number for label in options.class_label):
        known = f"classes 0 to {number - 1}" if number else "no classes, leave it out"
        raise ValueError(f"--class_label {options.class_label}: this pipeline has {known}")
    given = options.prompt or options.prompts
    if given and not by_text:
        raise ValueError(f"--prompt or --prompts {given}: this pipeline takes no text, leave it out")
    if options.prompt and options.prompts:
        raise ValueError("--prompt and --prompts were both given: give one of them")
    if by_text:
        recorded = folder_of_run(str(options.pipeline)) / PROMPTS
        if not given and not recorded.is_file():
            raise ValueError("--prompt or --prompts is missing: say what to draw")
        return read_prompts(given or str(recorded))
    return options.class_label or classes_of(pipeline, str(options.pipeline))


def draw(
    pipeline: Any,
    conditions: Sequence[int | str] | None,
    generators: list[Any],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> list[Any]:
    """Images of a distilled pipeline, one for each generator, of classes or prompts; by default in the most steps."""
    from ..pipeline_hsivi import HSIVIPipeline

    if not isinstance(pipeline, HSIVIPipeline):
        return _draw_stock(pipeline, conditions, generators)
    given: dict[str, Any] = {"class_labels": conditions, "guidance_scale": guidance_scale}
    drawn: Any = pipeline(len(generators), generators, num_inference_steps, **given)
    return list(drawn.images)


def _draw_stock(pipeline: Any, conditions: Sequence[int | str] | None, generators: list[Any]) -> list[Any]:
    """Images of a stock pipeline, which may pass no generator to the steps, and would guide once more."""
    scheduler, parameters = pipeline.scheduler, signature(pipeline.__call__).parameters
    pipeline.vae.enable_slicing()  # images are decoded one by one
    scheduler.step = partial(type(scheduler).step, scheduler, generator=generators)
    given: dict[str, Any] = {"generator": generators, "num_inference_steps": max(scheduler.depths)}
    given |= {"use_resolution_binning": False} if "use_resolution_binning" in parameters else {}
    images: list[Any] = pipeline(conditions, guidance_scale=1.0, **given).images
    return images


def load_sampler(name: str | None, host: Any = None) -> Any:
    """Loads the distilled pipeline of a folder, of a run, or of a repo; for the host see `load_student`.

    Raises:
        ValueError: There is none, or it is of another kind or damaged.
    """
    if not name:
        raise ValueError("--pipeline is missing: give the folder or the repo id of a distilled pipeline")
    from ..runs.folders import near_folder, tell_missing
    from ..teachers.teacher import load_student

    folder = pipeline_of(name)
    if Path(name).is_dir() and not holds_pipeline(folder):
        raise ValueError(
            f"--pipeline {name} holds no pipeline: give the folder of a pipeline or of a finished run; an unfinished "
            "run is resumed by `hsivi distil`"
        )
    tell_missing(name)
    try:
        return load_student(folder if folder.is_dir() else name, host)
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(
            f"--pipeline {name} is no folder here and was not found on the Hub ({type(error).__name__}): check the "
            f"spelling, the connection, and the token of a private repo{near_folder(Path(name))}"
        ) from error
