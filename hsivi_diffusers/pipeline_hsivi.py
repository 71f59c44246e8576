"""Sampling with T network calls."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class HSIVIPipeline(DiffusionPipeline):
    """Draws pictures with a distilled UNet: x_T ~ N(0, I), then one network call for each of T layers.

    Args:
        unet: The student.
        scheduler: A `HSIVIScheduler`.
        unet_noise_scale: The `HSIVINoiseScale`, where the scheduler's `noise_scale_type` is "per_pixel".

    Raises:
        ValueError: The scheduler is of another kind, or its noise scale is missing.
    """

    __module__ = "hsivi_diffusers"

    model_cpu_offload_seq = "unet->unet_noise_scale"
    _optional_components = ["unet_noise_scale"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        unet_noise_scale: Optional[ModelMixin] = None,  # noqa: UP045 (diffusers < 0.36 reads no `|` here)
    ):
        super().__init__()
        if not hasattr(scheduler, "transition"):
            raise ValueError(
                f"HSIVIPipeline got a {type(scheduler).__name__}: pass HSIVIScheduler.from_config(scheduler.config), "
                "or use the pipeline this scheduler came with"
            )
        if scheduler.config.noise_scale_type == "per_pixel" and unet_noise_scale is None:
            raise ValueError(
                "the scheduler's noise_scale_type is 'per_pixel', but unet_noise_scale is None: pass the "
                "HSIVINoiseScale that was trained with this unet"
            )
        self.register_modules(unet=unet, scheduler=scheduler, unet_noise_scale=unet_noise_scale)

    @property
    def num_timesteps(self) -> int:
        """T, the steps of the last call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: torch.Tensor | None = None,
        class_labels: torch.Tensor | list[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the signature of diffusers)
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws a batch of pictures.

        Args:
            batch_size: Number of pictures.
            generator: Source of all noise; a list gives each picture its own.
            num_inference_steps: T; None takes the trained one.
            latents: x_T, shape (batch_size, C, H, W), in the place of a draw.
            class_labels: Shape (batch_size,), for a class-conditional UNet.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent" (x_0 as it is).
            return_dict: Return `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": x_t}) after each step; what it
                returns under "latents" replaces x_t.
            callback_on_step_end_tensor_inputs: Names it wants, of "latents".

        Returns:
            The pictures.

        Raises:
            ValueError: The step count, a shape, a label or an option does not fit.
        """
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        device, dtype = self._execution_device, self.unet.dtype
        latents = self._prepare_latents(batch_size, latents, generator, device, dtype)
        conditions = self._prepare_class_labels(batch_size, class_labels, device)
        noise_scale = None if self.unet_noise_scale is None else self.unet_noise_scale()
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)

        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_output = self.unet(latents, timestep, **conditions).sample
            latents = self.scheduler.step(
                model_output, timestep, latents, generator=generator, noise_scale=noise_scale
            ).prev_sample
            if callback_on_step_end is not None:
                wanted = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(self, i, int(timestep), wanted).pop("latents", latents)

        images = self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(
        self, batch_size: int, generator: Any, output_type: str, callback_on_step_end_tensor_inputs: list[str]
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: ask for at least 1 picture")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size={batch_size}: give one, or one for each")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown: choose 'pil', 'np', 'pt' or 'latent'")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: choose from {self._callback_tensor_inputs}"
            )

    def _prepare_latents(
        self, batch_size: int, latents: torch.Tensor | None, generator: Any, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {shape}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def _prepare_class_labels(
        self, batch_size: int, class_labels: Any, device: torch.device
    ) -> dict[str, torch.Tensor]:
        conditional = getattr(self.unet, "class_embedding", None) is not None
        if conditional != (class_labels is not None):
            have = "needs class_labels" if conditional else "takes no class_labels: it is unconditional"
            raise ValueError(f"this unet {have}")
        if class_labels is None:
            return {}
        labels = torch.as_tensor(class_labels, device=device)
        if labels.shape != (batch_size,) or labels.is_floating_point():
            raise ValueError(
                f"class_labels has shape {tuple(labels.shape)} and {labels.dtype}: expected ({batch_size},) integers"
            )
        return {"class_labels": labels}

    def _to_images(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
