"""Sharing a sampler on the Hugging Face Hub: weights, code for those without the package, and a card, in one commit.

The card is made from the pipeline and, where there is one, from the folder of its run: options.json and training.json
of train_hsivi.py, report.json, samples.png and curve.png of evaluate.py.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import ImageOps

from .model_card import make_card
from .pipeline_hsivi import HSIVIPipeline


def push(
    pipeline: DiffusionPipeline,
    repo_id: str,
    *,
    run_dir: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    fp16: bool = True,
    exist_ok: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Uploads a distilled pipeline with its model card, all in one commit.

    Everything is written to a temporary folder first and sent from there; no file of yours is touched. After a cut
    connection, push again: weights that have arrived are not sent twice.

    Args:
        pipeline: An `HSIVIPipeline`, or a stock pipeline whose scheduler is an `HSIVIScheduler` with a trained grid.
        repo_id: "user/name" or "organisation/name".
        run_dir: Folder of the run, for the card; what it lacks is left out of it.
        base_model: Repo id of the teacher, for the card; that of the run by default.
        license: Identifier of the licence, such as "apache-2.0", for the card.
        fp16: Also upload the weights in half precision, as the variant "fp16".
        exist_ok: Add a commit to a repo that already holds files.
        private: Make a new repo private.
        revision: Branch to push to; made if need be.
        commit_message: Of the commit.
        token: Access token; that of `hf auth login` by default.

    Returns:
        URL of the commit.

    Raises:
        ValueError: The pipeline has no trained grid, or `run_dir` is no folder.
        HfHubHTTPError: The Hub refuses: no valid token, no right to write, or a name that is taken.
    """
    grid = pipeline.scheduler.config.get("layer_timesteps")
    if grid is None or not hasattr(pipeline.scheduler, "transition"):
        raise ValueError(
            f"the scheduler of this {type(pipeline).__name__} is no HSIVIScheduler with a trained grid "
            "(layer_timesteps): distil the model first, with training/train_hsivi.py"
        )
    run = read_run(run_dir)
    api = HfApi(token=token)
    claim(repo_id, exist_ok=exist_ok, private=private, token=token)
    with tempfile.TemporaryDirectory() as folder, remedies(repo_id):
        write_repo(Path(folder), pipeline, repo_id, run, base_model, license, fp16)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload a sampler of {len(grid) - 1} network calls",
            delete_patterns=[f"{name}/*" for name in pipeline.components],
        )
    return str(commit.commit_url)


def claim(
    repo_id: str, *, exist_ok: bool = False, private: bool | None = None, token: str | bool | None = None
) -> None:
    """Makes the repo, so that a long run learns at its start whether it may push at its end.

    Args:
        repo_id: See `push`.
        exist_ok: See `push`. An empty repo of that name is always welcome.
        private: See `push`.
        token: See `push`.

    Raises:
        HfHubHTTPError: As in `push`.
    """
    api = HfApi(token=token)
    with remedies(repo_id):
        try:
            api.create_repo(
                repo_id, private=private
            )  # not exist_ok: with it the client takes a 403 for a repo of yours
        except HfHubHTTPError as error:
            status = _status(error)
            if status == 409 and (exist_ok or not set(api.list_repo_files(repo_id)) - {".gitattributes"}):
                return
            if status == 403 and exist_ok and api.repo_exists(repo_id):
                return  # a token may write to a repo and not make new ones; the upload will tell
            raise


@contextmanager
def remedies(repo_id: str) -> Iterator[None]:
    """Adds to an error of the Hub what to do about it; its type stays."""
    try:
        yield
    except HfHubHTTPError as error:
        remedy = {
            401: "Log in with `hf auth login`, or pass a token that is valid and may write.",
            403: f"This token may not write to {repo_id}: push under your own name or that of an organisation you are "
            "in, with a token that may write.",
            404: f"Check the spelling of {repo_id}, and that your token may see it.",
            409: f"{repo_id} exists and holds files: choose another name, or add a commit to it with exist_ok=True "
            "(--hub_exist_ok).",
        }.get(_status(error), "Nothing of yours was lost: push again later, what has arrived is not sent twice.")
        error.append_to_message(f"\n{remedy}")
        raise
    except ValueError:  # of our own, or of a card that the Hub does not accept: it says what is wrong
        raise
    except Exception as error:
        error.add_note(
            f"The push to {repo_id} was cut short; the repo is as it was, and nothing of yours was lost. Push again: "
            "what has arrived is not sent twice."
        )
        raise


def _status(error: HfHubHTTPError) -> int:
    return 0 if error.response is None else int(error.response.status_code)


def read_run(run_dir: str | Path | None) -> dict[str, Any]:
    """Reads what a run left for its card.

    Returns:
        options, training, report: contents of the JSON files, empty where there is none; curve: path of the figure.

    Raises:
        ValueError: `run_dir` is no folder.
    """
    if run_dir is not None and not Path(run_dir).is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r} is no folder: give the folder of a run of train_hsivi.py, or None")
    run: dict[str, Any] = {name: {} for name in ("options", "training", "report")}
    if run_dir is None:
        return run
    for name in run:
        path = Path(run_dir) / f"{name}.json"
        run[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures = {name: Path(run_dir) / f"{name}.png" for name in ("samples", "curve")}
    return {**run, **{name: path for name, path in figures.items() if path.is_file()}}


def write_repo(
    folder: Path,
    pipeline: DiffusionPipeline,
    repo_id: str,
    run: dict[str, Any],
    base_model: str | None = None,
    license: str | None = None,
    fp16: bool = True,
) -> None:
    """Writes into a folder all that `push` uploads."""
    pipeline.save_pretrained(folder)
    fp16 = fp16 and pipeline.dtype == torch.float32
    if fp16:
        half = type(pipeline).from_pretrained(folder).to(torch.float16)
        half.save_pretrained(folder, variant="fp16")
    if isinstance(pipeline, HSIVIPipeline):
        draw_grid(pipeline).save(folder / "samples.png")
    _forget_paths(folder)
    for name, figure in (("samples", "comparison.png"), ("curve", "curve.png")):
        if name in run:
            (folder / figure).write_bytes(run[name].read_bytes())
    make_card(pipeline, repo_id, run, base_model, license, fp16).save(folder / "README.md")


def _forget_paths(folder: Path) -> None:
    """Drops from the configs the folder that each was loaded from: the paths of a machine are no one else's."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def draw_grid(pipeline: HSIVIPipeline, rows: int = 4, columns: int = 8) -> Any:
    """Draws a grid of pictures, seeded; with classes, each in turn."""
    classes, pictures = pipeline.unet.config.num_class_embeds, []
    for first in range(0, rows * columns, columns):
        seeds = range(first, first + columns)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        labels = [seed % classes for seed in seeds] if classes else None
        pictures += pipeline(columns, generator=generators, class_labels=labels, return_dict=False)[0]
    width, height = (max(1, 64 // pictures[0].width) * size for size in pictures[0].size)
    pictures = [ImageOps.expand(picture.resize((width, height), resample=0), 2, "white") for picture in pictures]
    return make_image_grid(pictures, rows=rows, cols=columns)
