"""Sampling in T steps, with one network call each."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "token")


class HSIVIPipeline(DiffusionPipeline):
    """Draws images with a distilled UNet: x_T ~ N(0, I), then T layers with one network call each.

    Args:
        unet: The student.
        scheduler: A `HSIVIScheduler`.
        unet_noise_scale: The `HSIVINoiseScale`, if the scheduler's `noise_scale_type` is "per_pixel".

    Raises:
        ValueError: The scheduler or UNet is of another kind, the noise scale is missing, or weights are not finite.
    """

    __module__ = "hsivi_diffusers"

    _source = Path(__file__).read_text(encoding="utf-8")

    model_cpu_offload_seq = "unet->unet_noise_scale"
    _optional_components = ["unet_noise_scale"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, unet_noise_scale: ModelMixin | None = None):
        super().__init__()
        if not hasattr(scheduler, "transition"):
            raise ValueError(_wrong_scheduler(scheduler))
        if "cross_attention_dim" in unet.config or not hasattr(unet, "conv_in"):
            raise ValueError(
                f"HSIVIPipeline got a {type(unet).__name__}: it draws with a UNet2DModel. Use the stock pipeline of "
                "this unet, and assign the HSIVIScheduler to its `scheduler`"
            )
        self.register_modules(unet=unet, scheduler=scheduler, unet_noise_scale=unet_noise_scale)
        self._check_noise_scale()
        check_finite_weights(unet, "unet")
        if unet_noise_scale is not None:
            check_finite_weights(unet_noise_scale, "unet_noise_scale")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a folder, the folder of a run, or a repo; see `DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: The pipeline is of another kind (seen before weights are downloaded), not distilled, or damaged.
        """
        index = os.path.join("pipeline", "model_index.json")
        folder = Path(pretrained_model_name_or_path)
        if (folder / index).is_file() and not (folder / "model_index.json").is_file():
            pretrained_model_name_or_path = str(folder / "pipeline")
        if "unet" not in kwargs:
            with suppress(OSError):  # loading reports it
                options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
                _check_kind(pretrained_model_name_or_path, cls.load_config(pretrained_model_name_or_path, **options))
        with naming_damage():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Makes the pipeline from the components of another one; kwargs replace components."""
        scheduler = kwargs.get("scheduler", pipeline.scheduler)
        if not hasattr(scheduler, "config"):
            raise ValueError(_wrong_scheduler(scheduler))
        per_pixel = scheduler.config.get("noise_scale_type") == "per_pixel"
        kwargs.setdefault("unet_noise_scale", pipeline.components.get("unet_noise_scale") if per_pixel else None)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call; before the first, of the longest trained grid."""
        return len(self.scheduler.timesteps)

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves weights as safetensors, and the code of our classes so that the folder loads without the package."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickles: leave it out, weights are safetensors")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, True, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: torch.Tensor | None = None,
        class_labels: torch.Tensor | list[int] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the signature of diffusers)
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws a batch of images.

        Args:
            batch_size: Number of images.
            generator: Source of all noise; a list gives each image its own.
            num_inference_steps: T, one of the trained numbers of steps; None means the largest.
            latents: x_T, shape (batch_size, C, H, W); drawn by default. A student with a `noise_cutoff` is given its
                low frequencies.
            class_labels: Shape (batch_size,), required for a class-conditional UNet.
            guidance_scale: A scale of classifier-free guidance that was distilled into the UNet; it costs no extra
                network call. None means the lowest; without guidance, 1 is accepted too.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" (x_0 unchanged).
            return_dict: Whether to return `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": x_t}) after each step. If it
                returns a dictionary with "latents", these replace x_t.
            callback_on_step_end_tensor_inputs: Names of the tensors passed to it; only "latents" exists.

        Returns:
            The images.

        Raises:
            ValueError: The number of steps, a shape, a label or an option does not fit.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        weight = self.unet.conv_in.weight
        hooked = _is_hooked(self.unet)  # `self.device` takes as long as a call of a small network
        device, dtype = (self._execution_device, self.unet.dtype) if hooked else (weight.device, weight.dtype)
        latents = self.scheduler.low_pass(_prepare_latents(self.unet, batch_size, latents, generator, device, dtype))
        guidance = self.scheduler.guidance_index(guidance_scale)
        conditions = self._prepare_class_labels(batch_size, class_labels, device, guidance)
        per_pixel = self.scheduler.config.noise_scale_type == "per_pixel"
        noise_scale = self.unet_noise_scale() if per_pixel and self.unet_noise_scale is not None else None
        self.scheduler.set_timesteps(num_inference_steps, device=device)

        # `step` gets a number and the network a tensor, so that no step waits for a GPU.
        steps = list(zip(self.scheduler.timesteps.tolist(), self.scheduler.timesteps, strict=True))
        for i, (timestep, tensor) in enumerate(self.progress_bar(steps)):
            model_output = self.unet(self.scheduler.scale_model_input(latents, tensor), tensor, **conditions).sample
            latents, _ = self.scheduler.step(
                model_output, timestep, latents, generator=generator, noise_scale=noise_scale, return_dict=False
            )
            if callback_on_step_end is not None:
                wanted = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = (callback_on_step_end(self, i, timestep, wanted) or {}).get("latents", latents)

        images = _convert(latents, output_type)
        if hooked:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_noise_scale(self) -> None:
        """Raises ValueError if a per-pixel noise scale is missing, unexpected, or of another shape."""
        kind, scale = self.scheduler.config.noise_scale_type, self.unet_noise_scale
        if (kind == "per_pixel") != (scale is not None):
            remedy = "pass the HSIVINoiseScale that was trained with this unet" if scale is None else "leave it out"
            given = "None" if scale is None else "given"
            raise ValueError(f"noise_scale_type is {kind!r} and unet_noise_scale is {given}: {remedy}")
        shape = _sample_shape(self.unet)
        if scale is not None and shape not in (None, tuple(scale.config.sample_shape)):
            raise ValueError(
                f"unet_noise_scale has sample_shape {tuple(scale.config.sample_shape)}, the unet {shape}: pass the one "
                "that was trained with this unet"
            )

    def _check_inputs(
        self, batch_size: int, generator: Any, output_type: str, callback_on_step_end_tensor_inputs: list[str]
    ) -> None:
        if not hasattr(self.scheduler, "transition"):  # assigned after the pipeline was made
            raise ValueError(_wrong_scheduler(self.scheduler))
        self._check_noise_scale()
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: ask for a whole number of images, at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size={batch_size}: give one, or one for each")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown: choose 'pil', 'np', 'pt' or 'latent'")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: choose from {self._callback_tensor_inputs}"
            )

    @property
    def num_classes(self) -> int | None:
        """Number of classes that can be drawn, without the label "no class" of guidance; None without classes."""
        embeddings, scales = self.unet.config.num_class_embeds, self.scheduler.guidance_scales
        return embeddings // len(scales) - 1 if scales and embeddings else embeddings

    def _prepare_class_labels(
        self, batch_size: int, class_labels: Any, device: torch.device, guidance: int
    ) -> dict[str, torch.Tensor]:
        conditional = getattr(self.unet, "class_embedding", None) is not None
        if conditional != (class_labels is not None):
            have = "needs class_labels" if conditional else "takes no class_labels: it is unconditional"
            raise ValueError(f"this unet {have}")
        if class_labels is None:
            return {}
        labels = torch.as_tensor(class_labels)
        if labels.shape != (batch_size,) or labels.is_floating_point():
            raise ValueError(
                f"class_labels has shape {tuple(labels.shape)} and {labels.dtype}: expected ({batch_size},) integers"
            )
        classes = self.num_classes
        if classes is not None and not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(f"class_labels={labels.tolist()}: the classes of this unet are 0 to {classes - 1}")
        labels = labels * max(len(self.scheduler.guidance_scales), 1) + guidance
        return {"class_labels": labels.to(device=device, dtype=torch.long)}


def _sample_shape(unet: UNet2DModel) -> tuple[int, int, int] | None:
    """Returns (C, H, W), or None if the UNet has no fixed size."""
    size = unet.config.sample_size
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def _prepare_latents(
    unet: UNet2DModel,
    batch_size: int,
    latents: torch.Tensor | None,
    generator: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns x_T, given or drawn."""
    shape = _sample_shape(unet) or (tuple(latents.shape[1:]) if latents is not None else None)
    if shape is None:
        raise ValueError("this unet has no sample_size: pass latents, which give the size of the images")
    shape = (batch_size, *shape)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {shape}")
    return latents.to(device=device, dtype=dtype)


def _is_hooked(unet: UNet2DModel) -> bool:
    """Whether hooks of accelerate or diffusers move the weights of the UNet between devices."""
    return any(hasattr(module, hook) for module in (unet, unet.conv_in) for hook in ("_hf_hook", "_diffusers_hook"))


def _convert(x: torch.Tensor, output_type: str) -> Any:
    """Converts samples in [-1, 1] to images of an output type."""
    if output_type == "latent":
        return x
    images = (x / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array


@contextmanager
def naming_damage() -> Iterator[None]:
    """Turns the error of diffusers about damaged weights into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        file = re.search(r"Unable to load weights from checkpoint file for '([^']+)'", str(error))
        if file is None:
            raise
        raise ValueError(
            f"{file[1]} is damaged or incomplete: download it again (force_download=True), or copy it again"
        ) from error


def check_finite_weights(module: torch.nn.Module, name: str) -> None:
    """Raises ValueError if weights are NaN or infinite; those on the meta device or with 8 bits are not checked."""
    for key, weight in module.state_dict().items():
        known = weight.is_floating_point() and weight.element_size() > 1 and weight.device.type != "meta"
        if known and weight.numel() and not bool(torch.stack(weight.aminmax()).isfinite().all()):
            raise ValueError(
                f"{name} has weights that are NaN or infinite, the first in {key}: its training diverged or its file "
                "is damaged; take an earlier checkpoint, or download it again"
            )


def network_calls(counts: list[int]) -> str:
    """Returns "1 network call", "5 network calls", or "1, 2 or 4 network calls"."""
    return f"{one_of(counts)} network call{'s' * (counts != [1])}"


def one_of(choices: list[Any]) -> str:
    """Returns "5", or "1, 2 or 4"."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def parts_of(index: dict[str, Any]) -> set[str]:
    """Returns the components that a model_index.json lists, without those that are null."""
    listed = {part: kind for part, kind in index.items() if isinstance(kind, list | tuple) and part[0] != "_"}
    return {part for part, kind in listed.items() if len(kind) == 2 and kind[0]}


def _check_kind(name: str | os.PathLike, index: dict[str, Any]) -> None:
    """Raises ValueError if a model_index.json has no unet, or components that this pipeline has not."""
    parts = parts_of(index)
    others = sorted(parts - {"unet", "scheduler", "unet_noise_scale"})
    if others or "unet" not in parts:
        kind = index.get("_class_name")
        raise ValueError(
            f"{str(name)!r} is a {kind} of {', '.join(sorted(parts))}: HSIVIPipeline draws with a UNet2DModel alone. "
            f"Load this one with {kind}.from_pretrained."
        )


def _wrong_scheduler(scheduler: Any) -> str:
    if not hasattr(scheduler, "config"):
        return f"HSIVIPipeline got scheduler={scheduler!r}: pass an HSIVIScheduler"
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("layer_timesteps") is not None:
        return (
            f"HSIVIPipeline got a {name} that carries the settings of a distilled sampler: pass "
            "scheduler=HSIVIScheduler.from_config(scheduler.config), or in from_pretrained "
            'scheduler=HSIVIScheduler.from_pretrained(repo, subfolder="scheduler")'
        )
    is_edm = {"sigma_data", "prediction_type"} <= {*config}
    if not is_edm and not {"beta_start", "trained_betas", "shift"} & {*config}:
        return (
            f"HSIVIPipeline got a {name}, which has no betas, and is neither of a rectified flow nor of EDM: use the "
            "pipeline it came with"
        )
    return (
        f"HSIVIPipeline got a {name}: this model was not distilled. Distil it with `hsivi distil`, or use the "
        "pipeline it came with. To sample it as it is, with DDIM and some noise, pass in Python "
        'scheduler=HSIVIScheduler.from_pretrained(repo, subfolder="scheduler"), and the number of steps to its call'
    )
