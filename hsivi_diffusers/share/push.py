"""Pushes a sampler to the Hugging Face Hub: weights, code for those without the package, and a card, in one commit."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of requests or httpx, depending on the version
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from PIL import ImageOps

from ..evaluation.images import enlarge
from ..pipeline_hsivi import HSIVIPipeline, check_finite_weights, network_calls
from ..runs.artifacts import ADAPTER, read_record, read_run
from ..runs.folders import check_empty
from ..runs.state_dicts import load_tensors
from ..scheduling_hsivi import HSIVIScheduler
from .card import is_ours, make_adapter_card, make_card
from .comfyui import read_workflow, save_workflow, workflow_text

AGAIN = "Nothing of yours was lost. Push again later: what has arrived is not sent twice."
CUT = (OSError, RuntimeError, HTTPError)  # raised by a cut connection
# Files of weights of a component: whole, or in shards or of a variant.
WEIGHTS = [
    f"*model{part}.{kind}{index}"
    for part in ("", "[.-]*")
    for kind in ("safetensors", "bin")
    for index in ("", ".index.json")
]


def push(
    pipeline: DiffusionPipeline | str | Path,
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
    output_dir: str | Path | None = None,
) -> str:
    """Uploads a distilled pipeline, or a LoRA file with its scheduler, with its model card, all in one commit.

    It is sent from a temporary folder; no file of yours is touched. If the connection is cut, the Hub is asked whether
    the commit arrived; if it did not, push again: weights that have arrived are not sent twice. In a repo that holds
    files already, the card and the weights of the components that are pushed are replaced; other files stay.

    Args:
        pipeline: An `HSIVIPipeline`, or a stock pipeline whose scheduler is an `HSIVIScheduler` with a trained grid, or
            the folder of such a pipeline or of a LoRA, RUN/pipeline.
        repo_id: "user/name" or "organisation/name".
        run_dir: Folder of the run, for the card; what it lacks is left out.
        base_model: Repo id of the teacher, for the card; that of the run by default, if the Hub knows it.
        license: Identifier of the licence, such as "apache-2.0", for the card.
        fp16: Also upload the weights in half precision, as the variant "fp16"; not of an adapter.
        exist_ok: Add a commit to a repo that already holds files.
        private: Make a new repo private.
        revision: Branch to push to; created if missing.
        commit_message: Of the commit.
        token: Access token; that of `hf auth login` by default.
        output_dir: A new or empty folder, to look at the files first: they are written there, and the Hub is not asked.

    Returns:
        URL of the commit, or the output folder.

    Raises:
        ValueError: The pipeline has no trained grid, has weights that are not finite or would not load as it is,
            `run_dir` is not the folder of its run, `repo_id` or `base_model` is not the name of a repo, or a repo that
            should be private is public, or the output folder is not empty.
        HfHubHTTPError: The Hub refuses: no valid token, no right to write, or a name that is taken.
    """
    for name in [repo_id] if base_model is None else [repo_id, base_model]:
        check_repo_id(name)
    if output_dir is not None:
        check_empty(Path(output_dir))
    folder = Path(pipeline) if isinstance(pipeline, str | Path) else None
    adapter = folder if folder is not None and (folder / ADAPTER).is_file() else None
    if folder is not None and adapter is None:
        pipeline = load_folder(folder)
    scheduler = check_pipeline(pipeline) if adapter is None else check_adapter(adapter)
    run, api = read_run(run_dir, scheduler.config.layer_timesteps), _open_hub(token)
    with tempfile.TemporaryDirectory() as files:
        asked = None if output_dir is not None else api
        about: dict[str, Any] = {"base_model": base_model or _public_teacher(asked, run), "license": license}
        if adapter is None:
            write_repo(Path(files), pipeline, repo_id, run, fp16, **about)
        else:
            write_adapter_repo(Path(files), adapter, scheduler, repo_id, run, **about)
        if output_dir is not None:
            return str(shutil.copytree(files, output_dir, dirs_exist_ok=True))
        claim(repo_id, exist_ok=exist_ok, private=private, token=token)
        with remedies(repo_id):
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # Old shards would take precedence over new weights in one file, and old variants are of other weights.
            components = sorted({path.parent.name for path in Path(files).glob("*/*.safetensors")})
            stale = [f"{name}/{weights}" for name in components for weights in WEIGHTS]
            message = commit_message or f"Upload a sampler of {network_calls(scheduler.depths)}"
            return _upload(api, repo_id, files, revision, message, stale)


def load_folder(folder: Path) -> DiffusionPipeline:
    """Loads a saved pipeline, or refuses, with ValueError, a folder that holds none or a damaged one."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} holds no pipeline: give a pipeline, or the folder RUN/pipeline of a finished run")
    for path in (index, *folder.glob("*/*config.json")):
        read_record(path)
    try:
        return DiffusionPipeline.from_pretrained(folder)
    except (AttributeError, KeyError, TypeError) as error:  # what diffusers raises for nonsense in an index
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}): make the pipeline again") from error


def check_adapter(folder: Path) -> Any:
    """Returns the scheduler of a LoRA, or refuses, with ValueError, a damaged one."""
    if not (folder / "scheduler").is_dir():
        raise ValueError(f"{folder} holds {ADAPTER} without its scheduler: give RUN/pipeline of a finished run")
    bad = [name for name, tensor in load_tensors(folder / ADAPTER).items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{len(bad)} weights of {folder / ADAPTER} are not finite, such as {bad[0]}: train it again")
    return HSIVIScheduler.from_pretrained(folder, subfolder="scheduler")


def check_pipeline(pipeline: Any) -> Any:
    """Returns the scheduler of a pipeline, or refuses, with ValueError, what is not a distilled sampler."""
    kind = type(pipeline).__name__
    if not (isinstance(pipeline, DiffusionPipeline) and hasattr(pipeline, "scheduler")):
        raise ValueError(f"push got a {kind}: give a pipeline, or the folder of one")
    if not getattr(pipeline.scheduler, "trained_grids", None):
        raise ValueError(
            f"the scheduler of this {kind} is not an HSIVIScheduler with a trained grid (layer_timesteps): distil the "
            "model first, with `hsivi distil`"
        )
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            check_finite_weights(part, name)
    if not hasattr(type(pipeline)(**pipeline.components).scheduler, "trained_grids"):
        raise ValueError(
            f"a {kind} replaces the scheduler that it is loaded with, so this one would be lost: push "
            "HSIVIPipeline.from_pipe(pipeline)"
        )
    return pipeline.scheduler


def _public_teacher(api: HfApi | None, run: dict[str, Any]) -> str | None:
    """Returns the teacher of the run if the Hub has it, where that is asked; a local path stays private."""
    name = run["training"].get("base_model")
    try:
        check_repo_id(name)
    except ValueError:
        return None
    with remedies(name):
        return name if api is None or api.repo_exists(name) else None


def _upload(api: HfApi, repo_id: str, folder: str, revision: str | None, message: str, stale: list[str]) -> str:
    """Uploads a folder in one commit and returns its URL, also where the connection was cut after the commit."""
    before = api.repo_info(repo_id, revision=revision).sha
    where: dict[str, Any] = {"repo_id": repo_id, "revision": revision}
    try:
        commit = api.upload_folder(folder_path=folder, commit_message=message, delete_patterns=stale, **where)
        return str(commit.commit_url)
    except CUT as error:
        url = f"{api.endpoint}/{repo_id}"
        note = f"Look at {url} first: if the commit arrived, a second push needs exist_ok=True."
        with suppress(*CUT):
            head, *others = api.list_repo_commits(**where)
            if head.title == message and before in [commit.commit_id for commit in others[:1]]:
                return f"{url}/commit/{head.commit_id}"
            note = f"{repo_id} is as it was." if head.commit_id == before else note
        error.add_note(note)
        raise


def check_repo_id(repo_id: str) -> None:
    """Refuses, with ValueError, what is not the full name of a repo, "user/name"."""
    if not isinstance(repo_id, str):
        raise ValueError(f"repo {repo_id!r} is not a name: give user/name or organisation/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{error}: give user/name or organisation/name") from error
    if "/" not in repo_id:
        raise ValueError(f"repo {repo_id!r} does not say whose it is: give user/name or organisation/name")


def _open_hub(token: str | bool | None) -> HfApi:
    """Returns a client of the Hub; a token that cannot be sent is refused here, for the client would print it."""
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("the token is empty or has characters that no token has, such as a line break: copy it again")
    return HfApi(token=token)


def claim(
    repo_id: str, *, exist_ok: bool = False, private: bool | None = None, token: str | bool | None = None
) -> None:
    """Makes the repo, so that a run that may not push fails before its training; see `push`."""
    check_repo_id(repo_id)
    api = _open_hub(token)
    with remedies(repo_id):
        try:
            # Not with exist_ok: the client then takes any 403 for a repo of yours.
            api.create_repo(repo_id, private=private)
        except HfHubHTTPError as error:
            if not _may_add(api, repo_id, error, exist_ok):
                raise
            if private and not api.repo_info(repo_id).private:
                raise ValueError(
                    f"{repo_id} exists and is public, and private=True was asked for: make it private in its settings, "
                    "or choose another name"
                ) from error


def _may_add(api: HfApi, repo_id: str, refusal: HfHubHTTPError, exist_ok: bool) -> bool:
    """Whether a repo that could not be made exists and may get a commit."""
    if _status(refusal) == 403:  # a token may write to a repo and yet not make new ones; the upload will tell
        user = api.whoami()
        names = {user["name"], *(organisation["name"] for organisation in user.get("orgs", []))}
        if repo_id.split("/")[0] not in names or not api.repo_exists(repo_id):
            return False
    elif _status(refusal) != 409:
        return False
    return exist_ok or not set(api.list_repo_files(repo_id)) - {".gitattributes"}


@contextmanager
def remedies(repo_id: str) -> Iterator[None]:
    """Adds a remedy to an error of the Hub; its type stays."""
    try:
        yield
    except HfHubHTTPError as error:
        remedies = {
            401: "Log in with `hf auth login`, or pass a token that is valid and may write.",
            403: f"This token may not write to {repo_id}: push under your own name or that of an organisation you are "
            "in, with a token that may write.",
            404: f"Check the spelling of {repo_id}, and that your token may see it.",
            409: f"{repo_id} exists and holds files: choose another name, or add a commit to it with exist_ok=True "
            "(--hub_exist_ok).",
        }
        status = _status(error)
        remedy = "" if 400 <= status < 500 and status not in (408, 429) else AGAIN
        error.append_to_message(f"\n{remedies.get(status, remedy)}")
        raise
    except LocalTokenNotFoundError as error:
        error.add_note("Log in with `hf auth login`, or pass a token.")
        raise
    except OfflineModeIsEnabled as error:
        error.add_note("Unset HF_HUB_OFFLINE to push.")
        raise
    except CUT as error:
        error.add_note(f"The Hub was not reached, or the connection was cut. {AGAIN}")
        raise


def _status(error: HfHubHTTPError) -> int:
    return 0 if error.response is None else int(error.response.status_code)


def write_repo(folder: Path, pipeline: Any, repo_id: str, run: dict[str, Any], fp16: bool, **about: Any) -> None:
    """Writes the files that `push` uploads; `about` are further arguments of the card."""
    pipeline.save_pretrained(folder)
    fp16, drawn = fp16 and pipeline.dtype == torch.float32, can_draw(pipeline)
    for name, part in pipeline.components.items():
        if fp16 and isinstance(part, torch.nn.Module):
            kind: Any = type(getattr(part, "_orig_mod", part))  # compiled or not
            half = kind.from_pretrained(folder / name, torch_dtype=torch.float16)  # not read as a whole before
            half.save_pretrained(folder / name, variant="fp16")
    if drawn:
        run = {**run, "grid": draw_grid(pipeline)}
    _save_figures(folder, run)
    make_card(pipeline, repo_id, run, fp16=fp16, drawn=drawn, **about).save(folder / "README.md")
    _make_private(folder, class_names(pipeline))


def write_adapter_repo(
    folder: Path, adapter: Path, scheduler: Any, repo_id: str, run: dict[str, Any], **about: Any
) -> None:
    """Writes the files that `push` uploads of a LoRA; `about` are further arguments of the card."""
    shutil.copy(adapter / ADAPTER, folder)
    scheduler.save_pretrained(folder / "scheduler")
    _save_figures(folder, run)
    comfyui = None
    with suppress(ValueError):  # most students have a workflow
        nodes = read_workflow(adapter, run["training"], f"{repo_id.split('/')[-1]}.safetensors")
        save_workflow(nodes, folder)
        comfyui = workflow_text(nodes, ADAPTER, about["base_model"])
    make_adapter_card(scheduler, repo_id, run, **about, comfyui=comfyui).save(folder / "README.md")
    _make_private(folder, {})


def _save_figures(folder: Path, run: dict[str, Any]) -> None:
    for name, figure in (("grid", "samples.png"), ("samples", "comparison.png"), ("curve", "curve.png")):
        if name in run:
            run[name].save(folder / figure)


def _make_private(folder: Path, names: dict[str, Any]) -> None:
    """Removes local paths from the configs, and adds the names of classes to the index."""
    index = folder / "model_index.json"
    for path in folder.rglob("*.json"):
        if path.name.endswith("config.json") or path == index:
            config = json.loads(path.read_text(encoding="utf-8"))
            added = names if path == index else {}
            if config.pop("_name_or_path", None) is not None or added:
                path.write_text(json.dumps(config | added, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def class_names(pipeline: DiffusionPipeline) -> dict[str, dict[str, str]]:
    """The names of the classes of a DiTPipeline for its index, which diffusers reads and does not write.

    A name of several classes is that of the last one.
    """
    names: dict[str, str] = {}
    for name, number in getattr(pipeline, "labels", {}).items():
        names[str(number)] = f"{names[str(number)]}, {name}" if str(number) in names else name
    return {"id2label": names} if names else {}


def can_draw(pipeline: DiffusionPipeline) -> bool:
    """Whether it is an HSIVIPipeline of grey or RGB images of a fixed size, without classes or with numbered ones."""
    if not is_ours(pipeline):
        return False
    config = pipeline.unet.config
    known = config.class_embed_type is None or bool(config.num_class_embeds)
    return config.sample_size is not None and config.in_channels in (1, 3) and known


def draw_grid(pipeline: HSIVIPipeline, rows: int = 4, columns: int = 8) -> Any:
    """Draws a seeded grid of images; with classes, each in turn."""
    classes, images = pipeline.num_classes, []
    for first in range(0, rows * columns, columns):
        seeds = range(first, first + columns)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        labels = [seed % classes for seed in seeds] if classes else None
        images += pipeline(columns, generator=generators, class_labels=labels, return_dict=False)[0]
    images = [ImageOps.expand(enlarge(image, 64), 2, "white") for image in images]
    return make_image_grid(images, rows=rows, cols=columns)
