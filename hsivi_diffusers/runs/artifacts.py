"""Files of a run: prompts, records, sample grids and figures, and the folder of its pipeline."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .default_prompts import default_prompts

ADAPTER = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` of diffusers looks for
# Files in the folder of a run: what it was asked for, from its start on; what came of it, at its end; its prompts.
OPTIONS, TRAINING, PROMPTS = "options.json", "training.json", "prompts.txt"
DEFAULT = "default"  # names the list of the package; a file of this name is "./default"
GRID_ROWS, GRID_COLUMNS = 4, 8  # of a sample grid, whose first row is the teacher's
CARD_GRID_WIDTH = 1600  # pixels of a sample grid in a card, at most
NUMBERS = ("seconds", "network_calls", "peak_memory_mib", "processes")  # of training.json


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Returns the prompts of a list, or of a text file with one prompt per line, or `default_prompts` for "default".

    Raises:
        ValueError: There is no such file, it is not text, a prompt of a list has a line break, or there are no prompts.
    """
    accepted = "give the path of a text file with one prompt per line, 'default' for those of the package, or from "
    accepted += "Python a list"
    texts = default_prompts() if prompts == DEFAULT else prompts
    if isinstance(texts, str):
        if not Path(texts).is_file():
            raise ValueError(f"prompts={prompts!r} is no file: {accepted}")
        try:
            texts = Path(texts).read_bytes().decode("utf-8-sig").split("\n")  # splitlines() splits at U+2028, too
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts={prompts!r} is no text in UTF-8 ({error}): {accepted}") from error
    found = [stripped for text in texts if (stripped := text.strip())]
    if broken := next((text for text in found if re.search("[\r\n]", text)), None):
        raise ValueError(f"the prompt {broken!r} has a line break: give each prompt in one line")
    if not found:
        raise ValueError(f"prompts={prompts!r} has no text: {accepted}")
    return found


def read_record(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a run, or refuses, with ValueError, a damaged one."""
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        for name in NUMBERS:
            if not isinstance(record.get(name), int | float | None):
                raise TypeError(f"{name} is not a number")
    except (ValueError, TypeError) as error:  # not JSON, not text, not an object
        raise ValueError(f"{path} is damaged ({error}): make it again, or remove it") from error
    return record


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, see `read_record`; empty if there is none, or a damaged one."""
    try:
        return read_record(path)
    except (OSError, ValueError):
        return {}


def holds_pipeline(folder: Path) -> bool:
    """Whether a folder holds a saved pipeline, or a LoRA."""
    return any((folder / name).is_file() for name in ("model_index.json", ADAPTER))


def pipeline_of(name: str) -> Path:
    """The folder of a pipeline, by its name or that of its run."""
    inside = Path(name) / "pipeline"
    return inside if inside.is_dir() else Path(name)


def folder_of_run(name: str) -> Path:
    """The folder of the run of a pipeline; of a pipeline without a run, and of a repo id, the path itself."""
    folder = pipeline_of(name).absolute()
    return folder.parent if folder.is_dir() and folder.name == "pipeline" else folder


def run_of(name: str) -> dict[str, Any]:
    """The options that a pipeline was trained with, empty without a run."""
    record = folder_of_run(name) / OPTIONS
    return read_record(record) if record.is_file() else {}


def sample_grids(run_dir: Path) -> dict[int, Path]:
    """The sample grids of a run, by the number of updates before them, ascending."""
    paths = [path for path in run_dir.glob("samples/step-*.png") if path.stem.removeprefix("step-").isdecimal()]
    return dict(sorted((int(path.stem.removeprefix("step-")), path) for path in paths))


def column_prompts(prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
    """The prompts of the columns of a sample grid, in turn: the first that are trained."""
    shares = options.get("class_shares")
    trained = shares if isinstance(shares, list) else [1.0] * len(prompts)
    return [prompt for prompt, share in zip(prompts, trained, strict=False) if share][:GRID_COLUMNS]


def read_run(run_dir: str | Path | None, grid: Sequence[Any] | None = None) -> dict[str, Any]:
    """Reads what a model card shows of a run.

    Args:
        run_dir: Folder of the run; None for no run.
        grid: `layer_timesteps` of the pipeline that is pushed.

    Returns:
        The records "options", "training" and "report", empty where missing, and what there is of the images "samples",
        "curve" and "grid" (the last sample grid) and of "prompts", those of the columns of the grid.

    Raises:
        ValueError: `run_dir` is not the folder of a run, or is that of another sampler, or a file in it is damaged, or
            a figure is a link.
    """
    run: dict[str, Any] = {name: {} for name in ("options", "training", "report")}
    if run_dir is None:
        return run
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r} is not a folder: give that of a run of `hsivi distil`, or None")
    if not any((folder / f"{name}.json").is_file() for name in run):
        raise ValueError(f"run_dir={str(run_dir)!r} holds no run: give the folder that `hsivi distil` wrote, or None")
    config = folder / "pipeline" / "scheduler" / "scheduler_config.json"
    theirs = read_record(config).get("layer_timesteps") if config.is_file() else grid
    if grid is not None and list(grid) != theirs:
        raise ValueError(
            f"run_dir={str(run_dir)!r} is the run of another sampler, layer_timesteps={theirs}, and this pipeline has "
            f"{list(grid)}: give its own run, or None"
        )
    for name in run:
        path = folder / f"{name}.json"
        run[name] = read_record(path) if path.is_file() else {}
    figures = {name: folder / f"{name}.png" for name in ("samples", "curve")}
    if grids := sample_grids(folder):
        figures["grid"] = [*grids.values()][-1]
    prompts = folder / PROMPTS
    if run["options"].get("prompts") and prompts.is_file() and not prompts.is_symlink():
        run["prompts"] = column_prompts(read_prompts(str(prompts)), run["options"])
    run |= {name: _read_figure(path) for name, path in figures.items() if path.is_file() or path.is_symlink()}
    if "grid" in run:
        run["grid"].thumbnail((CARD_GRID_WIDTH, CARD_GRID_WIDTH))
    return run


def _read_figure(path: Path) -> Image.Image:
    """Returns the pixels of an image and nothing else of the file."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and its target would be public: put the image there, or remove it")
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        return Image.frombytes("RGB", pixels.size, pixels.tobytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged ({error}): make it again, or remove it") from error
