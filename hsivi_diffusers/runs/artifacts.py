"""What a run left: the folder of its sampler, and what its card tells."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ADAPTER = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` of diffusers looks for
PROMPTS = "prompts.txt"  # in the folder of a run
COLUMNS = 8  # of a sample grid
WIDEST = 1600  # pixels of a sample grid in a card
SAMPLERS = ("model_index.json", ADAPTER)  # one of them is in the folder of a sampler


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Returns prompts that are given as a list, or as the path of a text file with one in a line.

    Raises:
        ValueError: There is no such file, it is no text, or there are no prompts.
    """
    accepted = "give the path of a text file with one prompt in a line, or from Python a list"
    texts = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(prompts, str):
        if not Path(prompts).is_file():
            raise ValueError(f"prompts={prompts!r} is no file: {accepted}")
        try:
            texts = Path(prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts={prompts!r} is no text in UTF-8 ({error}): {accepted}") from error
    found = [stripped for text in texts if (stripped := text.strip())]
    if not found:
        raise ValueError(f"prompts={prompts!r} has no text: {accepted}")
    return found


def read_record(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a run, or refuses, with ValueError, a damaged one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # no JSON, no text, or no object
        raise ValueError(f"{path} is damaged ({error}): make it again, or remove it") from error


def pipeline_of(name: str) -> Path:
    """The folder of a pipeline, where that of a run may be given."""
    inside = Path(name) / "pipeline"
    return inside if inside.is_dir() else Path(name)


def folder_of_run(name: str) -> Path:
    """The folder of the run of a pipeline; of a pipeline without a run, and of a repo id, the path itself."""
    folder = pipeline_of(name).absolute()
    return folder.parent if folder.is_dir() and folder.name == "pipeline" else folder


def run_of(name: str) -> dict[str, Any]:
    """What a pipeline was trained with, empty without a run."""
    record = folder_of_run(name) / "options.json"
    return read_record(record) if record.is_file() else {}


def sample_grids(run_dir: Path) -> dict[int, Path]:
    """The sample grids of a run, by the number of updates before them, ascending."""
    paths = [path for path in run_dir.glob("samples/step-*.png") if path.stem.removeprefix("step-").isdecimal()]
    return dict(sorted((int(path.stem.removeprefix("step-")), path) for path in paths))


def read_run(run_dir: str | Path | None, grid: Sequence[Any] | None = None) -> dict[str, Any]:
    """Reads what a run left for its card: options, training and report, empty where missing; figures and prompts.

    The figures are samples and curve of the report, and the last sample grid; the prompts are those of its columns.

    The grid, or the list of grids, is that of the pipeline that is pushed.

    Raises:
        ValueError: `run_dir` is not the folder of a run, or is that of another sampler, or a file in it is damaged, or
            a figure is a link.
    """
    if run_dir is not None and not Path(run_dir).is_dir():
        raise ValueError(
            f"run_dir={str(run_dir)!r} is not a folder: give the folder of a run of `hsivi distil`, or None"
        )
    run: dict[str, Any] = {name: {} for name in ("options", "training", "report")}
    if run_dir is None:
        return run
    if not any((Path(run_dir) / f"{name}.json").is_file() for name in run):
        raise ValueError(f"run_dir={str(run_dir)!r} holds no run: give the folder that `hsivi distil` wrote, or None")
    config = Path(run_dir) / "pipeline" / "scheduler" / "scheduler_config.json"
    theirs = read_record(config).get("layer_timesteps") if config.is_file() else grid
    if grid is not None and list(grid) != theirs:
        raise ValueError(
            f"run_dir={str(run_dir)!r} is the run of another sampler, layer_timesteps={theirs}, and this pipeline has "
            f"{list(grid)}: give its own run, or None"
        )
    for name in run:
        path = Path(run_dir) / f"{name}.json"
        run[name] = read_record(path) if path.is_file() else {}
    figures = {name: Path(run_dir) / f"{name}.png" for name in ("samples", "curve")}
    if grids := sample_grids(Path(run_dir)):
        figures["grid"] = [*grids.values()][-1]
    prompts = Path(run_dir) / PROMPTS
    if run["options"].get("prompts") and prompts.is_file() and not prompts.is_symlink():
        told = read_prompts(str(prompts))
        shares = run["options"].get("class_shares") or [1.0] * len(told)  # a column has a prompt that was trained
        run["prompts"] = [prompt for prompt, share in zip(told, shares, strict=False) if share][:COLUMNS]
    run |= {name: _read_figure(path) for name, path in figures.items() if path.is_file() or path.is_symlink()}
    if "grid" in run:
        run["grid"].thumbnail((WIDEST, WIDEST))
    return run


def _read_figure(path: Path) -> Image.Image:
    """Returns the pixels of an image and nothing else of the file."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and what it leads to would be public: put the image there, or remove it")
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        return Image.frombytes("RGB", pixels.size, pixels.tobytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged ({error}): make it again, or remove it") from error
