"""Loads teachers and students, of each kind of pipeline; refuses what is no teacher, before its weights are loaded.

A further kind of teacher is a file in this folder and a line in KINDS.
"""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_transformers_available, logging
from huggingface_hub import ModelCard, file_exists, hf_hub_download
from safetensors import safe_open
from torch import nn

from ..pipeline_hsivi import HSIVIPipeline, check_finite_weights, naming_damage
from ..runs.artifacts import ADAPTER, run_of
from ..runs.folders import near_folder
from ..runs.state_dicts import naming_damage_of, stored_dtype
from ..scheduling_hsivi import HSIVIScheduler
from ..share.push import CUT
from .adapters import BASE, read_adapter
from .configs import (
    OF_STUDENT,
    REMEDY,
    Configs,
    check_agreement,
    check_levels,
    configs_of,
    part_of,
    read_configs,
    schedule_of,
)
from .dit import DiT
from .flow_transformers import AuraFlow, Sana, StableDiffusion3
from .flux2 import Flux2, Flux2Klein
from .latents import Latents, TextLatents
from .lumina import Lumina2, ZImage
from .packed_flows import Chroma, Flux, QwenImage
from .pixart import PixArt
from .pixels import Pixels
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .teacher import PipelineTeacher, Teacher, check_prompts, network_of

logger = logging.get_logger(__name__)

KINDS: tuple[type[PipelineTeacher], ...] = (
    Pixels,
    DiT,
    StableDiffusion,
    StableDiffusionXL,
    PixArt,
    StableDiffusion3,
    Flux,
    Chroma,
    QwenImage,
    Flux2,
    Flux2Klein,
    AuraFlow,
    Sana,
    Lumina2,
    ZImage,
)
SUPPORTED = (
    "pipelines of a UNet2DModel and a scheduler, DiT, Stable Diffusion 1 to 3.5, SDXL, PixArt, FLUX.1-dev, FLUX.2-dev, "
    "FLUX.2 Klein base, Chroma, Qwen-Image, AuraFlow, Sana, Lumina Image 2.0 and Z-Image"
)
# diffusers renamed the argument in 0.40, and warns of the old name.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
IN_FLOAT32: dict[str, Any] = {DTYPE: torch.float32}


def kind_named(*names: str) -> type[PipelineTeacher]:
    """The kind of a pipeline by the names of its class and of those it was derived from; `Pixels` if none is known."""
    return next((kind for name in names for kind in KINDS if name in kind.pipelines), Pixels)


def kind_of(pipeline: DiffusionPipeline) -> type[PipelineTeacher]:
    """The kind of a pipeline."""
    return kind_named(*(each.__name__ for each in type(pipeline).__mro__))


def check_configs(name: str, configs: Configs, kind: type[PipelineTeacher]) -> HSIVIScheduler:
    """Returns the noise schedule of a teacher, or refuses it, with ValueError."""
    part = part_of(configs.parts)
    others = sorted({*configs.parts} - {part, "scheduler"})
    if "unet_noise_scale" in configs.parts or configs.kind == HSIVIPipeline.__name__:
        raise ValueError(f"teacher {name} is an HSIVIPipeline, a sampler that was distilled: {OF_STUDENT}")
    if kind is Pixels and (others or part == "transformer"):
        raise ValueError(
            f"teacher {name} is a {configs.kind} with {', '.join(others or [part])}: only {SUPPORTED} can be distilled"
        )
    if kind.takes_text and not is_transformers_available():
        raise ValueError(f"teacher {name} is a {configs.kind}, and transformers is missing: pip install transformers")
    found, wanted = configs.network["_class_name"], kind.network_class.__name__
    bases = (each.__name__ for each in getattr(diffusers, str(found), object).__mro__)
    if wanted not in (found, *bases):
        raise ValueError(f"teacher {name} has a {part} of type {found}, a {wanted} is needed")
    kind.check(name, part, configs.network)
    check_agreement(name, part, configs, kind.outputs(configs.network))
    schedule = schedule_of(name, configs, kind.knows_size, kind.scales_input)
    if kind.is_flow and not schedule.is_flow:
        raise ValueError(
            f"teacher {name}: a {found} is a rectified flow, and its {configs.scheduler['_class_name']} not: "
            "give it a FlowMatchEulerDiscreteScheduler, with the shift of the model that it was made from"
        )
    return schedule


def load_teacher(
    teacher: str | os.PathLike[str] | DiffusionPipeline | Teacher,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    has_prompts: bool = True,
) -> Teacher:
    """Loads a teacher in single precision.

    Args:
        teacher: Folder or repo id of a pipeline of diffusers, or such a pipeline itself, which is copied. Supported are
            pipelines of a `UNet2DModel` and a scheduler, DiT, Stable Diffusion 1 to 3.5, SDXL, PixArt, FLUX.1-dev,
            FLUX.2-dev, FLUX.2 Klein base, Chroma, Qwen-Image, AuraFlow, Sana, Lumina Image 2.0 and Z-Image. The
            scheduler has betas, or is of a rectified flow, or, of Stable Diffusion and SDXL, of EDM. Of a `Teacher` the
            network is copied.
        revision: Branch, tag or commit of a repo.
        dtype: Half precision that will do for the network of a folder or repo, if its file has it and adapters are
            trained.
        has_prompts: Whether there are prompts, without which a teacher that takes text is refused before it is loaded.

    Raises:
        ValueError: The pipeline is missing or damaged, or this method cannot distil it.
    """
    if isinstance(teacher, Teacher | DiffusionPipeline):
        _check_has_prompts(teacher if isinstance(teacher, Teacher) else kind_of(teacher), has_prompts)
    if isinstance(teacher, Teacher):
        check_finite_weights(teacher.network, f"the {teacher.name}")
        loaded = copy.copy(teacher)
        loaded.network = copy.deepcopy(teacher.network)
        return loaded
    if isinstance(teacher, DiffusionPipeline):
        return _of_pipeline(teacher, type(teacher).__name__, copied=True)
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(f"teacher is a {type(teacher).__name__}: give a folder, a repo id, or a loaded pipeline")
    name = os.fspath(teacher)
    folder = _fetch(name, revision, has_prompts)
    dtypes = _dtypes(Path(folder), dtype)
    loaded = _of_pipeline(_load(name, folder, dtypes), repr(name), copied=False)
    loaded.loaded_half = loaded.network.dtype == dtype
    if isinstance(loaded, TextLatents):
        index = DiffusionPipeline.load_config(folder)
        without = {part: None for part in (loaded.part, "vae") if part in index}
        loaded.folder = Path(folder)
        loaded.load_encoders = lambda: _encoders(DiffusionPipeline.from_pretrained(folder, **without, **dtypes))
    return loaded


def _dtypes(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The argument of `from_pretrained` that loads each part in single precision, or in half if that loses nothing.

    The network stays in `dtype` if it is the base of adapters, and encoders in that of the prompts that are kept.
    """
    with suppress(OSError):
        index = DiffusionPipeline.load_config(folder)
        kind = kind_named(str(index.get("_class_name")))
        if issubclass(kind, TextLatents):
            wanted = {part: kind.prompt_dtype for part in index if part.startswith("text_encoder")}
            wanted |= {kind.part: dtype if kind.adapter else None}
            half = {part: each for part, each in wanted.items() if each and each == stored_dtype(folder / part)}
            return {DTYPE: {**half, "default": torch.float32}} if half else IN_FLOAT32
    return IN_FLOAT32


def _of_pipeline(pipeline: Any, name: str, copied: bool) -> Teacher:
    kind = kind_of(pipeline)
    configs = configs_of(pipeline, name)
    if isinstance(network := network_of(pipeline), kind.network_class):
        configs = configs._replace(network={**configs.network, "_class_name": kind.network_class.__name__})
    schedule = check_configs(name, configs, kind)
    if adapted := [part for part, module in pipeline.components.items() if hasattr(module, "peft_config")]:
        raise ValueError(
            f"teacher {name} has adapters in its {', '.join(adapted)}, which would not be distilled: call fuse_lora() "
            "and unload_lora_weights() of the pipeline first"
        )
    check_levels(name, schedule, pipeline.scheduler)
    for part in (part_of(pipeline.components), "vae"):
        if (module := pipeline.components.get(part)) is not None:
            check_finite_weights(module, f"the {part} of teacher {name}")
    teacher = kind.of(pipeline, schedule)
    if copied:  # that of diffusers refuses to make a network with quantised weights float
        teacher.network = nn.Module.float(copy.deepcopy(network))
    if isinstance(teacher, Latents):
        encoders = _encoders(pipeline)
        parts: dict[str, Any] = dict.fromkeys(encoders)
        if copied:
            teacher.load_encoders = lambda: copy.deepcopy(encoders)
            parts["vae"] = teacher.vae = copy.deepcopy(pipeline.vae).float()
        teacher.pipeline = teacher.like(**parts)
    return teacher


def _encoders(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The text encoders of a pipeline, by name."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}


def read_teacher(name: str, revision: str | None = None) -> Teacher:
    """Makes a teacher of random weights, on the default device, from the configs of a pipeline alone, for a plan.

    Raises:
        ValueError: A config is missing, or it is no teacher for this method.
    """
    try:
        configs = read_configs(name, revision)
    except OSError as error:
        raise ValueError(str(error)) from error
    kind = kind_named(configs.kind)
    with torch.device("cpu"):  # which knows the numbers of the noise levels
        schedule = check_configs(repr(name), configs, kind)
    return kind.of_configs(configs, schedule)


def _check_has_prompts(kind: Teacher | type[PipelineTeacher], has_prompts: bool) -> None:
    if kind.takes_text and not has_prompts:
        check_prompts(True, None)


def _fetch(name: str, revision: str | None, has_prompts: bool) -> str:
    """Returns the folder of a pipeline, downloaded if it is a repo; refuses by its configs what is no teacher."""
    path = Path(name)
    with suppress(OSError):  # what is missing, the loading itself reports
        configs = read_configs(name, revision)
        kind = kind_named(configs.kind)
        check_configs(repr(name), configs, kind)
        _check_has_prompts(kind, has_prompts)
    if path.is_dir():
        return name
    try:
        return str(DiffusionPipeline.download(name, revision=revision))
    except Exception as error:  # diffusers raises many types here, and all mean the same to the user
        raise ValueError(
            f"teacher {name!r} is no folder here, and was not loaded from the Hub ({type(error).__name__}): "
            f"{REMEDY}{near_folder(path)}"
        ) from error


def _load(name: str, folder: str, dtypes: dict[str, Any]) -> DiffusionPipeline:
    """Loads a pipeline without its text encoders, which are needed only where prompts are not encoded yet."""
    without: dict[str, Any] = {}
    with suppress(OSError):
        index = DiffusionPipeline.load_config(folder)
        without = {part: None for part in index if part.startswith("text_encoder")}
    try:
        return DiffusionPipeline.from_pretrained(folder, **without, **dtypes)
    except Exception as error:
        raise ValueError(f"teacher {name!r} cannot be loaded ({type(error).__name__}: {error}): {REMEDY}") from error


def load_student(source: str | Path, teacher: Teacher | None = None) -> Any:
    """Loads a sampler: the pipeline of a student, or an adapter, onto the weights of its teacher.

    Args:
        source: Folder or repo id.
        teacher: Where it is loaded already; it stays as it is.

    Raises:
        ValueError: It is of another kind, was not distilled, or is damaged.
        OSError: It is missing.
    """
    folder = Path(source)
    if (folder / ADAPTER).is_file():
        run = run_of(str(source))
        dtype = torch.bfloat16 if run.get("mixed_precision") == "bf16" else None
        return _with_adapter(str(source), run.get("pretrained_teacher_model"), run.get("revision"), teacher, dtype)
    try:
        name = str(DiffusionPipeline.load_config(str(source)).get("_class_name"))
    except OSError:
        if teacher is not None and folder.is_dir():
            return teacher.load_student(folder)
        if folder.is_dir() or not _has_adapter(str(source)):
            raise
        return _with_adapter(str(source), ModelCard.load(str(source)).data.base_model, None, teacher)
    if kind_named(name) is Pixels:
        return HSIVIPipeline.from_pretrained(source)
    with naming_damage():
        pipeline = getattr(diffusers, name).from_pretrained(source, **IN_FLOAT32)
    if not hasattr(pipeline.scheduler, "trained_grids"):
        raise ValueError(f"{str(source)!r} is a {name} that was not distilled: distil it with `hsivi distil`")
    check_finite_weights(network_of(pipeline), part_of(pipeline.components))
    return pipeline


def _has_adapter(repo_id: str) -> bool:
    """Whether a repo holds an adapter; not, if the Hub cannot be asked."""
    with suppress(ValueError, *CUT):
        return file_exists(repo_id, ADAPTER)
    return False


def _with_adapter(
    source: str, name: str | None, revision: str | None, teacher: Teacher | None, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """A pipeline of a teacher's tensors, with the adapter and the scheduler of a folder or repo.

    The teacher is loaded in half precision where its run trained so, see `load_teacher`.
    """
    if not name and teacher is None:
        raise ValueError(
            f"{source} holds an adapter, and nothing beside it names its teacher: load it as its card says, by "
            "load_lora_weights of a pipeline of the teacher"
        )
    teacher = teacher or load_teacher(str(name), revision, dtype)
    if not isinstance(teacher, Latents) or teacher.adapter is None:
        raise ValueError(f"{source} holds an adapter, which a {teacher.name} does not take: give the teacher it had")
    with naming_damage():
        state = _read_adapter(source, teacher)
        return teacher.with_adapter(state, HSIVIScheduler.from_pretrained(source, subfolder="scheduler"))


def _read_adapter(source: str, teacher: Latents) -> dict[str, torch.Tensor]:
    """Reads the weights of an adapter, by their names in the network.

    Damaged or missing ones are refused, and another base is warned of, whose half precision may do as well.
    """
    assert teacher.adapter is not None
    path = Path(source) / ADAPTER
    with (
        naming_damage_of(path),
        safe_open(path if path.is_file() else hf_hub_download(source, ADAPTER), framework="pt") as file,
    ):
        base = (file.metadata() or {}).get(BASE)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = read_adapter(tensors, teacher.network, teacher.adapter.prefix, source)
    if base is not None and base != teacher.weights_sha256:
        logger.warning(
            f"{source} was trained on other weights than it is loaded onto, and its images may be poor: give the "
            "teacher that it was trained on, in the same revision"
        )
    return state
