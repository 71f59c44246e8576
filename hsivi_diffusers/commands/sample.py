"""Draw images from a distilled pipeline, ours or a stock one: `hsivi sample`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..runs.artifacts import PROMPTS, folder_of_run, holds_pipeline, pipeline_of, read_prompts, read_record, run_of
from ..runs.bars import bar
from ..runs.folders import check_output_dir, check_spelling, claim_output_dir, near_folder
from ..runs.next_steps import to_finish
from ..runs.options import option
from .options import check_numbers, parse_options

GRID = "grid.png"
MOST_SHOWN = 1024  # images in it

SAMPLE = """Draw images from a distilled pipeline into a folder of PNG files and one contact sheet.

    hsivi sample --pipeline runs/digits_t5/pipeline --output_dir runs/digits_t5/drawn"""


@dataclass
class Sampling:
    _group = "sampling"
    pipeline: str | None = option(None, "folder or repo id of a distilled pipeline, or folder of a run")
    output_dir: str | None = option(None, "folder of the images")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty; removes the images drawn before")
    num_samples: int | None = option(None, "images to draw; one of each prompt that is given, or 64, by default")
    num_inference_steps: int | None = option(None, "steps, one of the trained counts; the largest by default")
    batch_size: int | None = option(None, "images at once; 100 by default, of latents 4")
    seed: int = option(0, "image i has the seed `seed + i`")
    class_label: list[int] = option([], "classes to draw, one image of each in turn; all by default")
    prompt: list[str] = option([], "prompts for a text-to-image student, drawn in turn; those of the run by default")
    prompts: str | None = option(None, "text file with such prompts, one in a line, or default")
    guidance_scale: float | None = option(None, "one of the guidance scales it was trained with; the lowest by default")
    device: str | None = option(None, "cpu, cuda or another torch device; the GPU if there is one")

    def check(self) -> None:
        """Refuses, before anything is loaded, what no pipeline can draw."""
        check_output_dir(self.output_dir, self.overwrite_output_dir)
        check_numbers(self, num_samples=(1, 1_000_000), batch_size=(1, 10_000), seed=(0, 2**53))
        if self.prompt and self.prompts:
            raise ValueError("--prompt and --prompts were both given: give one of them")
        if self.prompts:
            read_prompts(self.prompts)


def sample(args: Sequence[str]) -> None:
    """Runs `hsivi sample`."""
    (options,) = parse_options([Sampling], SAMPLE, args, "hsivi sample")
    options.check()
    import torch
    from diffusers.utils import make_image_grid
    from PIL import ImageOps

    from ..evaluation.images import enlarge, show
    from ..teachers.loading import kind_of

    device = usable_device(options.device)
    check_trained(options)
    pipeline = load_sampler(options.pipeline).to(device)
    pipeline.set_progress_bar_config(disable=True)
    classes = _conditions(options, pipeline)
    given = len(classes) if options.prompt or options.prompts else 0
    batch = options.batch_size or kind_of(pipeline).draw_batch
    size = options.num_samples or given or 64
    output_dir = claim_output_dir(options.output_dir, options.overwrite_output_dir)
    remove_images(output_dir)
    shown: list[Any] = []  # of the contact sheet
    for first in bar(range(0, size, batch), desc="sample", unit="batch"):
        numbers = range(first, min(first + batch, size))
        labels = [classes[number % len(classes)] for number in numbers] if classes else None
        generators = [torch.Generator(device).manual_seed(options.seed + number) for number in numbers]
        images = draw(pipeline, labels, generators, options.num_inference_steps, options.guidance_scale)
        for number, image in zip(numbers, images, strict=True):
            image.save(image_path(output_dir, number))
        shown += [ImageOps.expand(enlarge(image, 64), 1, "gray") for image in images[: MOST_SHOWN - len(shown)]]
    columns = math.isqrt(len(shown))
    rows = len(shown) // columns
    make_image_grid(shown[: rows * columns], rows=rows, cols=columns).save(output_dir / GRID)
    show(output_dir / GRID)
    listed = f"{classes}[i % {len(classes)}]" if len(classes) <= 20 else f"number i % {len(classes)}"
    what = "prompt" if classes and isinstance(classes[0], str) else "class"
    turn = f"; image i is of {what} {listed}" if classes else ""
    print(f"{size} images in {output_dir}, {rows * columns} of them in {output_dir / GRID}{turn}")


def image_path(folder: Path, number: int) -> Path:
    """The file of an image."""
    return folder / f"{number:05d}.png"


def remove_images(folder: Path) -> None:
    """Removes the images that were drawn into a folder before, which have consecutive numbers, and their sheet."""
    (folder / GRID).unlink(missing_ok=True)
    for number in count():
        if not (path := image_path(folder, number)).is_file():
            return
        path.unlink()


def check_trained(options: Sampling) -> None:
    """Refuses steps and a guidance scale that the sampler was not trained with, before its weights are loaded."""
    from ..scheduling_hsivi import HSIVIScheduler

    folder = folder_of_pipeline(options.pipeline)
    try:
        scheduler = HSIVIScheduler.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError, TypeError):  # which the loading of the whole pipeline reports
        return
    if scheduler.trained_grids:
        scheduler.set_timesteps(options.num_inference_steps)
        scheduler.guidance_index(options.guidance_scale)


def usable_device(name: str | None) -> str:
    """The device of that name; by default the GPU, if there is one.

    Raises:
        ValueError: It cannot be used.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # which no tensor on "meta" has
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here ({error}): give cpu, or leave it out") from error
    return device


def classes_of(pipeline: Any, name: str) -> list[int]:
    """The classes that a distilled pipeline of that name was trained on, empty without classes; all without a run."""
    number, shares = _num_classes(pipeline), run_of(name).get("class_shares")
    return [label for label, share in enumerate((shares or [1] * number)[:number]) if share]


def _num_classes(pipeline: Any) -> int:
    from ..teachers.loading import kind_of

    return kind_of(pipeline).count_classes(pipeline)


def _conditions(options: Sampling, pipeline: Any) -> Sequence[int | str]:
    """The classes or prompts to draw; those of the run, if that is at hand, by default, and none without classes."""
    from ..teachers.loading import kind_of

    by_text, number = kind_of(pipeline).takes_text, _num_classes(pipeline)
    if any(not 0 <= label < number for label in options.class_label):
        known = f"classes 0 to {number - 1}" if number else "no classes, leave it out"
        raise ValueError(f"--class_label {options.class_label}: this pipeline has {known}")
    given = options.prompt or options.prompts
    if given and not by_text:
        raise ValueError(f"--prompt or --prompts {given}: this pipeline takes no text, leave it out")
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
    from ..teachers.loading import kind_of

    return kind_of(pipeline).draw(pipeline, conditions, generators, num_inference_steps, guidance_scale)


def folder_of_pipeline(name: str | None) -> Path | str:
    """The folder of a distilled pipeline, where that of its run may be given, or the id of a repo.

    Raises:
        ValueError: No pipeline is named, there is none in the folder, or its index is damaged.
    """
    if not name:
        raise ValueError("--pipeline is missing: give the folder or the repo id of a distilled pipeline")
    check_spelling(name)
    folder = pipeline_of(name)
    if not folder.is_dir():
        return name
    if not holds_pipeline(folder):
        raise ValueError(
            f"--pipeline {name} holds no pipeline: give the folder of a pipeline or of a finished run, or load a "
            f"student of a Teacher of your own by load_student in Python{to_finish(folder_of_run(name))}"
        )
    if (index := folder / "model_index.json").is_file():
        read_record(index)
    return folder


def load_sampler(name: str | None, teacher: Any = None) -> Any:
    """Loads the distilled pipeline of a folder, of a run, or of a repo; for the teacher see `load_student`.

    Raises:
        ValueError: There is none, or it is of another kind or damaged.
    """
    from ..teachers.loading import load_student

    source = folder_of_pipeline(name)
    try:
        return load_student(source, teacher)
    except OSError as error:
        if isinstance(source, Path):
            raise
        raise ValueError(
            f"--pipeline {name} is no folder here and was not found on the Hub ({type(error).__name__}): check the "
            f"spelling, the connection, and the token of a private repo{near_folder(Path(source))}"
        ) from error
