"""What a distillation asks of a pretrained diffusion model. Each kind of model answers in one file of this folder."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..runs.state_dicts import hash_weights, load_tensors, save_tensors
from ..scheduling_hsivi import STOCK, HSIVIScheduler
from .adapters import Adapter, has_adapter, save_adapter
from .comfyui import Files
from .configs import Configs

NEW = {"shift_terminal", "resolution", "edm", "noise_cutoff"}  # keys of schedulers that earlier versions have not
# Not of the teacher: a run chooses the length of its prompts, and quantised weights say something else once saved.
OF_RUNS = {"max_sequence_length", "quantization_config"}
WEIGHTS = "network.safetensors"  # of a network that is no model of diffusers


class Conditions(NamedTuple):
    """How many conditions a network knows: class labels, or numbers of prompts."""

    rows: int = 0
    # The last row is "no class" whether the run guides or not; else it is one only if the run guides.
    has_null: bool = False


class Teacher:
    """A pretrained diffusion model, and all that depends on its kind.

    As it stands it serves a plain torch network f(x, time) of images in [-1, 1]; a kind overrides what is different.
    A teacher of your own is a subclass, or an object of this class, that you give to `HSIVITrainer`.

    Args:
        network: The network; student and critic start as copies of it, and are called in the same way.
        schedule: `HSIVIScheduler` without a grid: noise levels, what the network predicts, clipping of the clean image.
        shape: (C, H, W) of what the network denoises.
        classes: Class labels that the network takes, 0 without classes.

    Attributes:
        clips: The network denoises pixels, whose range is [-1, 1]; not latents.
        adapter: Where a LoRA goes, or None if all weights are trained.
        comfyui: How ComfyUI loads this kind, or None if no workflow is known, see `make_workflow`.
        takes_text: It needs prompts, see `encode_prompts`.
        embeds_guidance: Its networks take the guidance scale as an input, so a guided call is one call.
        loaded_half: The network was loaded in half precision, see `load_teacher`; its hashes are those of single
            precision.
    """

    clips = True
    adapter: ClassVar[Adapter | None] = None
    comfyui: ClassVar[Files | None] = None
    takes_text: ClassVar[bool] = False
    embeds_guidance: ClassVar[bool] = False
    draw_batch = 100  # images drawn at once, by default
    loaded_half = False

    def __init__(self, network: nn.Module, schedule: HSIVIScheduler, shape: tuple[int, int, int], classes: int = 0):
        self.network: Any = network
        self.schedule, self.shape = schedule, shape
        self.conditions: Any = Conditions(classes)

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self

    @property
    def name(self) -> str:
        """The class of the network, for messages."""
        return type(self.network).__name__

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    # ----- calls -----

    def call(self, network: Any, x: Tensor, time: Any, condition: Tensor | None = None) -> Tensor:
        """Calls a network of this kind in its own precision, and returns its output in that of x.

        Args:
            network: The teacher's, the student's or the critic's.
            x: Shape (B, C, H, W).
            time: The network's time, one number or (B,), see `HSIVIScheduler.levels`.
            condition: Numbers of classes or prompts, (B,), or None.
        """
        times = torch.as_tensor(time).to(x.device).expand(len(x))
        scaled = self.schedule.scale_model_input(x, times)
        like = scaled.to(getattr(network, "dtype", None) or next(network.parameters()).dtype)
        given = {} if condition is None else self.arguments(condition, like)
        return self.forward(network, like, times, **given).to(x.dtype)

    def forward(self, network: Any, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        """Returns the output of a network, in its own layout; a model of diffusers wraps it."""
        output = network(x, time, **arguments)
        tensor: Tensor = getattr(output, "sample", output)
        return tensor

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        """Returns the arguments of the network that say a condition, of the device and dtype of a tensor."""
        return {"class_labels": condition}

    def denoise(self, network: Any, x: Tensor, level: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the clean image and the noise that a network sees in x, both (B, C, H, W), at levels (B,)."""
        return self.schedule.predict(self.call(network, x, self.schedule.levels.time(level), condition), level, x)

    def set_guidance(self, w: float) -> None:
        """Sets the guidance scale that the networks are called with from now on, if they take it as an input."""

    def stock_sigmas(self, num_steps: int) -> Tensor | None:
        """Returns the sigmas, before the shift, that the pipeline of a flow sends to its scheduler, if it sends any."""
        return None

    def guide(self, of_condition: Tensor, of_none: Tensor, w: Tensor) -> Tensor:
        """Returns the guided prediction of scale w, shape (B, 1, ...)."""
        return of_none + w * (of_condition - of_none)

    # ----- conditions -----

    @property
    def num_rows(self) -> int:
        """Rows of conditions, with the last one, "no class", if there is one; 0 without conditions."""
        return int(self.conditions.rows)

    def num_conditions(self, guides: bool = False) -> int:
        """Classes or prompts that are drawn, 0 without: all rows but "no class".

        Raises:
            ValueError: The run guides, and the teacher has no classes.
        """
        if guides and self.num_rows < 2:
            raise ValueError(
                "guidance_scale was given, and the teacher has no class labels, of which the last must be 'no class': "
                "leave guidance_scale out"
            )
        return self.num_rows - (guides or self.conditions.has_null)

    def encode_prompts(self, prompts: Any, negative: str, device: torch.device) -> None:
        """Encodes prompts, after which the conditions are their numbers; refuses them if it takes no text.

        Raises:
            ValueError: It takes text and there are no prompts, or the other way round.
        """
        check_prompts(self.takes_text, prompts)

    def make_blank_prompts(self) -> None:
        """Makes two prompts that say nothing, for a plan, if it takes text."""

    # ----- student and critic -----

    def set_sizes(self, settings: Any) -> None:
        """Sets the size of the images and the length of prompts, before these are encoded.

        Args:
            settings: A config of a run, or of the scheduler of its student; what is None is as in its pipeline.

        Raises:
            ValueError: It draws images of one size, or of others than this, or has prompts of one length.
        """
        if settings.resolution is not None:
            self.set_size(settings.resolution)
        if settings.max_sequence_length is not None:
            self.set_length(settings.max_sequence_length)

    def set_size(self, resolution: Sequence[int]) -> None:
        """Does it; a kind that draws images of several sizes overrides this."""
        _, height, width = self.image_shape
        raise ValueError(
            f"resolution={[*resolution]}: a {self.name} draws images of {height} x {width} alone: leave it out"
        )

    def set_length(self, max_sequence_length: int) -> None:
        """Sets the length of prompts; a kind whose pipeline takes it overrides this."""
        raise ValueError(
            f"max_sequence_length={max_sequence_length}: the pipeline of a {self.name} takes none: leave it out"
        )

    def check_students(self, config: Any) -> None:
        """Refuses, with ValueError, settings of a student that this kind cannot have."""
        if config.noise_scale_type == "per_pixel":
            raise ValueError(
                f"noise_scale_type='per_pixel' needs a UNet2DModel, and the teacher is a {self.name}: set it to "
                "'config'"
            )
        self.check_rank(config.lora_rank)
        several = {"num_inference_steps": config.depths, "guidance_scale": config.scales}
        for option, values in several.items():
            if len(values) > 1:
                self.check_labels(f"{option}={values}")

    def check_rank(self, rank: int | None) -> None:
        """Refuses a LoRA where no stock pipeline loads one, and quantised weights where all of them are trained."""
        if rank and self.adapter is None:
            raise ValueError(
                f"lora_rank={rank}: no stock pipeline loads a LoRA of a {self.name}: set lora_rank=0, which trains all "
                "weights"
            )
        if getattr(self.network, "is_quantized", False) and not (self.rank(rank) and _is_shareable(self.network)):
            raise ValueError(
                "the teacher has quantised weights, which are supported in 4 bits by bitsandbytes (load_in_4bit=True, "
                "bnb_4bit_quant_storage uint8), as the base of LoRA adapters: load it so, or without "
                "quantization_config"
            )

    def rank(self, rank: int | None) -> int:
        """The rank of the adapters of a run, 0 for copies."""
        usual = 0 if self.adapter is None else self.adapter.rank
        return usual if rank is None else rank

    def check_labels(self, asked: str = "several layers") -> None:
        """Refuses, with ValueError, to let a network tell layers or guidance scales apart by class labels."""
        raise ValueError(
            f"{asked}: a {self.name} has no free class embedding for the layer or guidance scale: train one step count "
            "and one scale"
        )

    def label(self, network: Any, number: int) -> Any:
        """Returns a copy of a network with labels class * number + i; for each i it starts as the network."""
        raise NotImplementedError

    def prepare(self, network: Any) -> None:
        """Prepares a network for training; called once for each of the three."""

    def student_pipeline(
        self, network: Any, scheduler: HSIVIScheduler, noise_scale: HSIVINoiseScale | None = None
    ) -> Any:
        """Returns what draws images with a student: a pipeline of diffusers, or a `StudentSampler`."""
        return StudentSampler(self, network, scheduler)

    @classmethod
    def call_arguments(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        """Returns what the pipeline of a student is called with, beside prompts and steps, for its card."""
        return {}

    @classmethod
    def euler_arguments(cls, scheduler: HSIVIScheduler) -> dict[str, Any] | None:
        """Returns the settings of FlowMatchEulerDiscreteScheduler and the sigmas that draw a student's images.

        None if its pipeline does not take them, or layers have noise.
        """
        return None

    def save_student(
        self, network: Any, scheduler: HSIVIScheduler, noise_scale: HSIVINoiseScale | None, folder: Path
    ) -> None:
        """Saves a student: its pipeline, or its adapter with the scheduler."""
        if has_adapter(network):
            self.save(network, folder)
            scheduler.save_pretrained(folder / "scheduler")
        else:
            self.student_pipeline(network, scheduler, noise_scale).save_pretrained(folder)

    def save(self, network: Any, folder: Path) -> None:
        """Saves a network, of one with an adapter the adapter alone."""
        if self.adapter is not None and has_adapter(network):
            save_adapter(network, folder, self.adapter.prefix, self.weights_sha256)
        elif hasattr(network, "save_pretrained"):
            network.save_pretrained(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(network.state_dict(), folder / WEIGHTS)

    def load(self, like: Any, folder: Path) -> dict[str, Tensor]:
        """Returns the weights of a network that `save` wrote."""
        if (folder / WEIGHTS).is_file():
            return load_tensors(folder / WEIGHTS)
        state: dict[str, Tensor] = type(like).from_pretrained(folder).state_dict()
        return state

    def load_student(self, folder: Path) -> Any:
        """Loads what `save_student` wrote, onto the teacher's weights if it is an adapter."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.load(network, folder))
        return StudentSampler(self, network, HSIVIScheduler.from_pretrained(folder, subfolder="scheduler"))

    # ----- images -----

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that `decode` returns."""
        return self.shape

    def decode(self, x: Tensor) -> Tensor:
        """Returns images in [0, 1], shape (B, C, H, W), of what a network has denoised."""
        return (x / 2 + 0.5).clamp(0, 1)

    def decoder_weights(self) -> Iterable[Tensor]:
        """The weights of what decodes, for a plan."""
        return ()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Moves the network, in the precision of its calls, and what decodes."""
        # Not by `to` of diffusers, which warns of modules to keep in single precision where there are none.
        nn.Module.to(self.network, device, dtype)
        return self

    # ----- identity -----

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weights as they were loaded, which the file of an adapter names."""
        if not hasattr(self, "_weights_sha256"):
            hash = hashlib.sha256()
            hash_weights(hash, self.network, self.loaded_half)
            self._weights_sha256 = hash.hexdigest()
        return self._weights_sha256

    def identity(self) -> dict[str, str]:
        """Hash of weights and configs; where they were loaded from does not enter."""
        hash = hashlib.sha256()
        for part in (self.network, self.schedule):
            config = getattr(part, "config", {})
            if not isinstance(config, Mapping):  # of a network that is not from diffusers
                continue
            names = {name for name in config if not name.startswith("_")} - OF_RUNS
            names -= NEW & {*config.get("_use_default_values", ())}
            values = {name: "quadratic" if config[name] == STOCK else config[name] for name in names}  # as before 0.3
            hash.update(json.dumps(values, sort_keys=True, default=str).encode())
        hash_weights(hash, self.network, self.loaded_half)
        return {"teacher_sha256": hash.hexdigest()}


class PipelineTeacher(Teacher):
    """A teacher of a pipeline of diffusers; each kind is a subclass, listed in `loading`.

    Attributes:
        pipelines: Names of the classes of pipelines of this kind.
        network_class: Of the network.
        is_flow: Its networks predict the velocity of a rectified flow, so a scheduler with betas is not theirs.
        knows_size: It sets the shift of noise levels that depend on the size of the images.
        scales_input: Its pipelines give the network what `scale_model_input` of their scheduler returns.
    """

    pipelines: ClassVar[Collection[str]] = ()
    network_class: ClassVar[type[nn.Module]]
    is_flow: ClassVar[bool] = False
    knows_size: ClassVar[bool] = False
    scales_input: ClassVar[bool] = False

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, schedule: HSIVIScheduler) -> PipelineTeacher:
        """Makes the teacher of a loaded pipeline."""
        raise NotImplementedError

    @classmethod
    def of_configs(cls, configs: Configs, schedule: HSIVIScheduler) -> PipelineTeacher:
        """Makes the teacher of random weights, on the default device, for a plan."""
        raise NotImplementedError

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        """Refuses, with ValueError, a network by its config, before its weights are loaded."""

    @classmethod
    def outputs(cls, config: Mapping[str, Any]) -> int:
        """Channels that a network returns, in the layout of those it takes (`in_channels`)."""
        return int(config.get("out_channels") or config["in_channels"])

    # ----- drawing with a pipeline of this kind, for the commands -----

    @classmethod
    def count_classes(cls, pipeline: DiffusionPipeline) -> int:
        """Classes that a distilled pipeline of this kind draws, 0 without."""
        return 0

    @classmethod
    def draw(
        cls,
        pipeline: DiffusionPipeline,
        conditions: Any,
        generators: list[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Any]:
        """Draws images with a distilled pipeline of this kind, one for each generator."""
        raise NotImplementedError

    def draw_teacher(
        self,
        conditions: Any,
        generators: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        solver: str | None = None,
    ) -> tuple[list[Any], int, str]:
        """Draws images of the teacher; returns them, network calls for each, and the name of the sampler.

        The sampler is the kind's own, or a key of `SOLVERS` on the grid that diffusers gives it.
        """
        raise NotImplementedError


class StudentSampler:
    """Draws with a student that no pipeline of diffusers holds: x_T ~ N(0, I), then a call for each layer."""

    def __init__(self, teacher: Teacher, network: Any, scheduler: HSIVIScheduler) -> None:
        self.teacher, self.network, self.scheduler = teacher, network.eval(), scheduler

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        class_labels: Tensor | None = None,
    ) -> Any:
        """Returns images in [0, 1] as `.images`, shape (batch_size, C, H, W)."""
        self.scheduler.set_timesteps(num_inference_steps)
        device = next(self.network.parameters()).device
        x = self.scheduler.low_pass(torch.randn(batch_size, *self.teacher.shape, generator=generator)).to(device)
        for time in self.scheduler.timesteps:
            output = self.teacher.call(self.network, x, time, class_labels)
            x = self.scheduler.step(output, time, x, generator=generator, return_dict=False)[0]
        return Images(self.teacher.decode(x))

    def save_pretrained(self, folder: Path) -> None:
        """Saves network and scheduler, see `Teacher.load_student`."""
        self.teacher.save(self.network, Path(folder))
        self.scheduler.save_pretrained(Path(folder) / "scheduler")


class Images(NamedTuple):
    """Output of a `StudentSampler`."""

    images: Tensor


def network_of(pipeline: Any) -> Any:
    """Returns the network of a pipeline, teacher or student."""
    if isinstance(pipeline, StudentSampler):
        return pipeline.network
    return getattr(pipeline, "transformer", None) or pipeline.unet


def check_prompts(takes_text: bool, prompts: Any) -> None:
    """Refuses, with ValueError, prompts for a teacher that takes no text, and a teacher that does without any."""
    if prompts is not None and not takes_text:
        raise ValueError("prompts was given, and the teacher takes no text: leave it out")
    if takes_text and prompts is None:
        raise ValueError(
            "prompts is missing, and the teacher takes text: give a text file with one prompt in a line, 'default' for "
            "those of the package, or from Python a list"
        )


def _is_shareable(network: Any) -> bool:
    """Whether networks may share quantised weights. With those of 8 bits all but the first would answer wrongly."""
    codes = [weight.dtype for weight in network.parameters() if type(weight).__name__ == "Params4bit"]
    return getattr(network, "is_loaded_in_4bit", False) and all(dtype == torch.uint8 for dtype in codes)
