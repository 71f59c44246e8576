"""What teachers on latents have in common: a pipeline of diffusers with a VAE, into which the student is put."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..modeling_hsivi import HSIVINoiseScale
from ..runs.artifacts import read_prompts
from ..scheduling_hsivi import HSIVIScheduler
from .adapters import share
from .configs import Configs
from .prompts import PromptTable, digest_of, digest_of_folder, digest_of_module, encode_prompts
from .solvers import make_scheduler
from .teacher import PipelineTeacher, check_prompts, network_of

LENGTH = "max_sequence_length"
CLIP_TOKENS = 77
VAE_PIXELS = 2**21  # of images that are decoded at once


class Latents(PipelineTeacher):
    """A teacher whose network denoises latents of a VAE.

    Attributes:
        part: Name of the network in the pipeline.
        condition_name: Argument of the pipeline that takes the conditions.
        pipeline: Without text encoders, if there were any.
        load_encoders: Loads the text encoders of the pipeline, by name.
        folder: That the pipeline was loaded from, None of one that was given in memory.
    """

    clips = False
    draw_batch = 4
    part = "transformer"
    condition_name = "class_labels"

    def __init__(self, pipeline: Any, network: Any, schedule: HSIVIScheduler, rows: int = 0) -> None:
        size = self.default_size(network.config)
        super().__init__(network, schedule, (self.channels(network.config), size, size), rows)
        self.pipeline = pipeline
        self.load_encoders: Callable[[], dict[str, Any]] = dict
        self.folder: Path | None = None
        self.vae = pipeline.vae
        self._whole: Any = None  # the pipeline with its text encoders, once the teacher has drawn

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, schedule: HSIVIScheduler) -> Latents:
        return cls(pipeline, network_of(pipeline), schedule)

    @classmethod
    def of_configs(cls, configs: Configs, schedule: HSIVIScheduler) -> Latents:
        network: Any = cls.network_class
        return cls(ConfigsOnly(configs), network.from_config(dict(configs.network)), schedule)

    @classmethod
    def check(cls, name: str, part: str, config: Mapping[str, Any]) -> None:
        if not isinstance(config["sample_size"], int):
            raise ValueError(f"teacher {name}: sample_size={config['sample_size']} of the {part}: it must be a number")

    @staticmethod
    def default_size(config: Mapping[str, Any]) -> int:
        """Height and width of the latents that the pipeline draws by default, by the config of the network."""
        return int(config["sample_size"])

    @staticmethod
    def channels(config: Mapping[str, Any]) -> int:
        """C of the latents."""
        return int(config["in_channels"])

    @property
    def pipeline_class(self) -> Any:
        """The class of its pipeline, also where only the configs of that are known."""
        return getattr(self.pipeline, "kind", type(self.pipeline))

    @property
    def factor(self) -> int:
        """Height of an image by that of its latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def patch(self) -> int:
        """Height and width of latents are multiples of it."""
        config = self.network.config
        return int(config.get("patch_size") or 2 ** (len(config.get("block_out_channels", [0])) - 1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.vae.config.out_channels, self.factor * self.shape[1], self.factor * self.shape[2]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        _, height, width = self.image_shape
        batch = max(1, VAE_PIXELS // (height * width))
        latents = self.unscale(x).to(self.vae.device, self.vae.dtype).split(batch)
        return super().decode(torch.cat([self.vae.decode(each).sample.float() for each in latents]))

    def unscale(self, x: Tensor) -> Tensor:
        """Returns the latents that the VAE decodes."""
        return x / self.vae.config.scaling_factor

    def unscale_channels(self, x: Tensor) -> Tensor:
        """Returns latents with the mean and the standard deviation of each channel that the config of the VAE has."""
        config = self.vae.config
        mean, std = (x.new_tensor(each).reshape(-1, 1, 1) for each in (config.latents_mean, config.latents_std))
        return x * std + mean

    def decoder_weights(self) -> Iterable[Tensor]:
        return self.vae.parameters()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Latents:
        super().to(device, dtype)
        self.vae.requires_grad_(False).to(device)
        return self

    def student_pipeline(
        self, network: Any, scheduler: HSIVIScheduler, noise_scale: HSIVINoiseScale | None = None
    ) -> DiffusionPipeline:
        encoders = self.load_encoders()
        parts = {self.part: network, "scheduler": scheduler, **encoders}
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module) and name not in parts:
                parts[name] = copy.deepcopy(part)
        pipeline = self.like(**parts)
        return pipeline.to(network.device, network.dtype) if encoders else pipeline

    def like(self, **parts: Any) -> DiffusionPipeline:
        """Returns a pipeline like the teacher's, with other parts."""
        kind: Any = type(self.pipeline)
        settings = {
            name: self.pipeline.config[name] for name in signature(kind).parameters if name in self.pipeline.config
        }
        pipeline: DiffusionPipeline = kind(**{**settings, **self.pipeline.components, **parts})
        if "scheduler" in parts:
            pipeline.scheduler = parts["scheduler"]  # some pipelines replace the one they are made with
        return pipeline

    def with_adapter(self, state: Mapping[str, Tensor], scheduler: HSIVIScheduler) -> DiffusionPipeline:
        """Returns a pipeline of the teacher's tensors, with an adapter, of weights by their names in the network."""
        network = share(self.network.requires_grad_(False))
        pipeline = self.like(**{self.part: network}, scheduler=scheduler, **self._of_dtype(network))
        network.load_lora_adapter(dict(state), prefix=None)
        return pipeline

    def _of_dtype(self, network: Any) -> dict[str, Any]:
        """Encoders and VAE in the precision of a network, for a pipeline."""
        vae = self.vae if self.vae.dtype == network.dtype else copy.deepcopy(self.vae).to(network.dtype)
        encoders = {name: part and part.to(network.dtype) for name, part in self.load_encoders().items()}
        return {**encoders, "vae": vae}

    def load_student(self, folder: Path) -> DiffusionPipeline:
        pipeline: DiffusionPipeline = type(self.pipeline).from_pretrained(folder, torch_dtype=torch.float32)
        return pipeline

    @classmethod
    def draw(
        cls,
        pipeline: Any,
        conditions: Any,
        generators: list[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Any]:
        """Draws with a stock pipeline, which may pass no generator to the steps, and would guide once more."""
        scheduler = pipeline.scheduler
        pipeline.vae.enable_slicing()  # images are decoded one by one
        scheduler.step = partial(type(scheduler).step, scheduler, generator=generators)
        given: dict[str, Any] = {"num_inference_steps": num_inference_steps or max(scheduler.depths)}
        given |= cls.call_arguments(scheduler)
        given[cls.condition_name] = [*conditions]  # a copy, for Z-Image's writes into it
        images: list[Any] = pipeline(generator=generators, **given).images
        return images

    @classmethod
    def call_arguments(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        known = signature(getattr(diffusers, [*cls.pipelines][0]).__call__).parameters
        binning = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
        return {**cls.unguided(scheduler), **sizes_of(scheduler), **binning}

    @classmethod
    def unguided(cls, scheduler: HSIVIScheduler) -> dict[str, Any]:
        """Returns the argument that keeps a pipeline from guiding a student."""
        return {"guidance_scale": 1.0}

    def negative(self, texts: list[str]) -> list[str] | None:
        """Returns what the pipeline is given as negative prompts."""
        return texts

    def draw_teacher(
        self,
        conditions: Any,
        generators: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        solver: str | None = None,
    ) -> tuple[list[Any], int, str]:
        """Draws with the teacher's pipeline, as it does by itself, or, unless its scheduler is EDM's, by a solver."""
        if self._whole is None:
            self._whole = self.like(**self._of_dtype(self.network))
            self._whole.to(self.device).set_progress_bar_config(disable=True)
            self._whole.vae.enable_slicing()  # images are decoded one by one
        pipeline, swapped = self._whole, solver is not None and not self.schedule.is_edm
        pipeline.scheduler = self._solver(str(solver)) if swapped else self.pipeline.scheduler
        known = signature(pipeline.__call__).parameters
        negative = self.negative([negative_prompt] * len(generators))
        given: dict[str, Any] = {"negative_prompt": negative, "use_resolution_binning": False}
        given = {name: value for name, value in given.items() if name in known and value is not None}
        given |= {"num_inference_steps": num_inference_steps, **self.guided(guidance_scale), **sizes_of(self.schedule)}
        images = pipeline(**{self.condition_name: [*conditions]}, generator=generators, **given).images
        calls = num_inference_steps * (1 if guidance_scale == 1 or self.embeds_guidance else 2)
        return images, calls, str(solver) if swapped else type(pipeline.scheduler).__name__

    def _solver(self, name: str) -> Any:
        """Returns a solver that a pipeline is run with, on its own grid: some pipelines send one, or a shift."""
        solver, _ = make_scheduler(name, self.schedule)
        own = solver.set_timesteps

        def set_timesteps(num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **_: Any) -> None:
            own(len(sigmas) if sigmas is not None else num_inference_steps, device=device)

        solver.set_timesteps = set_timesteps
        return solver

    def guided(self, w: float) -> dict[str, Any]:
        """Returns the argument with which the teacher's pipeline guides at scale w."""
        return {"guidance_scale": w}


def sizes_of(schedule: HSIVIScheduler) -> dict[str, int]:
    """Arguments of a pipeline that say the size of its images and the length of prompts, where they are no defaults."""
    size = dict(zip(("height", "width"), schedule.config.resolution or (), strict=False))
    longest = schedule.config.max_sequence_length
    return size if longest is None else {**size, LENGTH: longest}


class TextLatents(Latents):
    """A teacher of text: its conditions are numbers of prompts, the last of them the negative prompt.

    Attributes:
        encoded: What `encode_prompt` of the pipeline returns: argument of the network, place of the prompt, and of the
            negative prompt.
        takes_negative: Its pipeline takes negative prompts.
        prompt_dtype: Of encoded prompts on the disk; that of the encoders by default.
        prompts_of_file: Prompts that are encoded, and written to a file, at a time.
    """

    takes_text = True
    takes_negative: ClassVar[bool] = True
    prompt_dtype: torch.dtype | None = None
    prompts_of_file: ClassVar[int] = 512
    condition_name = "prompt"
    encoded: Sequence[tuple[str, int, int]]

    def set_size(self, resolution: Sequence[int]) -> None:
        unit = self.factor * self.patch
        if len(resolution) != 2 or any(not isinstance(side, int) or side < 1 or side % unit for side in resolution):
            raise ValueError(
                f"resolution={[*resolution]}: give height and width, multiples of {unit} for a {self.name}, such as "
                f"{max(512 // unit, 1) * unit} {max(768 // unit, 1) * unit}"
            )
        height, width = (side // self.factor for side in resolution)
        self.shape = (self.shape[0], height, width)
        self.schedule = HSIVIScheduler.from_config(self.schedule.config, resolution=[*resolution])

    def check_students(self, config: Any) -> None:
        super().check_students(config)
        if config.negative_prompt and not self.takes_negative:
            raise ValueError(
                f"negative_prompt={config.negative_prompt!r}: a {[*self.pipelines][0]} takes no negative prompt: "
                "leave it out"
            )

    def set_length(self, max_sequence_length: int) -> None:
        if LENGTH not in self._called:
            super().set_length(max_sequence_length)
        if max_sequence_length > (most := self._called[LENGTH].default):
            raise ValueError(
                f"max_sequence_length={max_sequence_length}: the pipeline of a {self.name} has {most} by default, and "
                "more are not supported: give fewer, or leave it out"
            )
        self.schedule = HSIVIScheduler.from_config(self.schedule.config, max_sequence_length=max_sequence_length)

    @property
    def longest(self) -> int:
        """Tokens that prompts are cut to; where a pipeline has CLIP encoders beside another, in the other."""
        usual = self._called[LENGTH].default if LENGTH in self._called else CLIP_TOKENS
        return int(self.schedule.config.max_sequence_length or usual)

    @property
    def _called(self) -> Mapping[str, Any]:
        """Arguments of a call of its pipeline; their defaults may be others than those of `encode_prompt`."""
        return signature(self.pipeline_class.__call__).parameters

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        return dict(self.conditions.arguments(condition, like))

    def encode_prompts(self, prompts: Any, negative: str, device: torch.device) -> None:
        check_prompts(True, prompts)
        self.conditions = encode_prompts(self, read_prompts(prompts), negative, device)

    def encoders_digest(self) -> str:
        """Returns a hash of encoders and tokenizers, without loading an encoder that is not."""
        folder: Path | None = self.folder
        if folder is None:
            digests = {name: digest_of_module(part) for name, part in self.load_encoders().items() if part is not None}
        else:
            digests = {path.name: digest_of_folder(path) for path in folder.glob("text_encoder*") if path.is_dir()}
        return digest_of(type(self).__name__, self.pipeline, digests)

    def prompt_tensors(self, encoded: Sequence[Any], are_negative: bool) -> Mapping[str, Iterable[Tensor]]:
        """Returns arguments of the network, of N prompts each, of what `encode_prompt` of the pipeline returned."""
        return {name: encoded[places[are_negative]] for name, *places in self.encoded}

    def sizes(self) -> dict[str, Tensor]:
        """Returns further arguments of the network that say the size of the images, each of shape (1, ...)."""
        return {}

    def encoding(self) -> dict[str, Any]:
        """Returns arguments of `encode_prompt` whose defaults in it are not those of the pipeline's call."""
        return {}

    def make_blank_prompts(self) -> None:
        shapes = self.prompt_shapes()
        self.conditions = PromptTable(  # in masks a 1 is a token
            [{name: torch.ones(2, *shape, device="cpu") for name, shape in shapes.items()}], {}
        )

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each argument of the network for one prompt."""
        raise NotImplementedError


class ConfigsOnly:
    """A pipeline of which only configs are known, and its class: a VAE without weights, to be counted in a plan."""

    def __init__(self, configs: Configs) -> None:
        self.kind = getattr(diffusers, configs.kind)
        with torch.device("meta"):
            config = dict(configs.vae or {})
            self.vae: Any = getattr(diffusers, config["_class_name"]).from_config(config)
