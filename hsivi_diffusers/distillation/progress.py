"""What a run shows of itself: a progress bar, numbers for the trackers, and pictures of the averaged layers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from torch import Tensor
from tqdm import tqdm

from ..evaluation.features import load_network
from ..evaluation.images import load_images
from ..evaluation.metrics import Measures
from ..pipeline_hsivi import network_calls
from ..vi import Step, Update
from .config import Options
from .student import LayerNoiseScale
from .trainer import Players

EVERY = 20  # steps between two lines of the trackers
GRID = (4, 8)  # rows and columns of the pictures shown


class Monitor:
    """Passes the steps of a run on and shows them; the main process alone does.

    Args:
        players: What is trained.
        options: Of the run.
        output_dir: Grids go to OUTPUT_DIR/validation.

    Raises:
        ValueError: The real pictures or the feature extractor of the validation cannot be loaded.
    """

    def __init__(self, players: Players, options: Options, output_dir: Path) -> None:
        self.players, self.options, self.folder = players, options, output_dir / "validation"
        self.accelerator = players.accelerator
        self.distances: Measures | None = None
        if options.validation.validation_data and self.accelerator.is_main_process:
            self.distances = self._load_distances(options.validation.validation_data)

    def _load_distances(self, source: str) -> Measures:
        config = self.players.student.unet.config
        real, _ = load_images(source, config.sample_size, config.in_channels)
        network, _ = load_network(self.options.validation.feature_extractor, config.in_channels)
        return Measures(network, real.float() / 255, ["fd"])

    def watch(self, steps: Iterator[Step], start: int) -> Iterator[Step]:
        """Yields the steps, with a bar of running losses and of the time left."""
        total, every = self.options.training.max_train_steps, self.options.validation.validation_steps
        running: dict[str, float] = {}
        self._restart_clock(start)
        with tqdm(total=total, initial=start, desc="distil", disable=not self.accelerator.is_main_process) as bar:
            for step in steps:
                done = step.step + 1
                losses = {"layers": step.layers.loss.mean().item(), "critic": step.critic.loss.mean().item()}
                running = {name: 0.95 * running.get(name, loss) + 0.05 * loss for name, loss in losses.items()}
                bar.update()
                if done % EVERY == 0 or done == total:
                    numbers = {**self._numbers(step), "images_per_second": self._images_per_second(done)}
                    self.accelerator.log(numbers, step=done)
                    shown = {**running, "img/s": numbers["images_per_second"]}
                    bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
                if every and done % every == 0:
                    self.validate(done)
                    self._restart_clock(done)
                yield step

    def _restart_clock(self, step: int) -> None:
        self.clock_step, self.clock = step, time.perf_counter()

    def _images_per_second(self, step: int) -> float:
        """Rows of layer updates in all processes a second, since the last question."""
        speed = (step - self.clock_step) * self.players.rows / (time.perf_counter() - self.clock)
        self._restart_clock(step)
        return speed

    def _numbers(self, step: Step) -> dict[str, float]:
        """Losses, gradient norms, learning rates, the critic's error layer by layer, and the noise scale."""
        numbers: dict[str, float] = {}
        for name, update in (("layers", step.layers), ("critic", step.critic)):
            numbers[f"loss/{name}"] = update.loss.mean().item()
            if update.grad_norm is not None:
                numbers[f"grad_norm/{name}"] = float(update.grad_norm)
        for name, scheduler in zip(("layers", "critic"), self.players.lr_schedulers, strict=True):
            numbers[f"learning_rate/{name}"] = scheduler.get_last_lr()[0]
        return {**numbers, **_by_layer(step.critic), **self._noise_scale()}

    def _noise_scale(self) -> dict[str, float]:
        noise_scale = self.players.student.noise_scale
        if noise_scale is None:
            return {}
        scale: Tensor = noise_scale.log_scale.detach().exp()
        if isinstance(noise_scale, LayerNoiseScale) and scale.ndim:
            return {f"noise_scale/layer_{t}": value for t, value in enumerate(scale.tolist())}
        return {f"noise_scale/{name}": float(getattr(scale, name)()) for name in ("min", "mean", "max")}

    def validate(self, step: int) -> None:
        """Draws a grid of the averaged layers, always from the same noise, and measures their distance if asked to.

        Of several step counts the largest is drawn with.
        """
        if self.accelerator.is_main_process:
            size = self.options.validation.validation_samples if self.distances else GRID[0] * GRID[1]
            pictures = self._draw(max(size, GRID[0] * GRID[1]))
            shown = pictures[: GRID[0] * GRID[1]].permute(0, 2, 3, 1).numpy()
            self.folder.mkdir(parents=True, exist_ok=True)
            grid = make_image_grid(DiffusionPipeline.numpy_to_pil(shown), *GRID)
            grid.save(self.folder / f"step-{step}.png")
            self._log_images(shown, step)
            if self.distances is not None:
                fd = self.distances(pictures[:size])["fd"]
                self.accelerator.log({"validation/fd": fd}, step=step)
                calls = network_calls(self.players.student.scheduler.depths[-1:])
                tqdm.write(f"step {step}: FD {fd:.2f} of {size} pictures, {calls} each")
        self.accelerator.wait_for_everyone()

    def _draw(self, size: int) -> Tensor:
        """Pictures of the averaged layers in [0, 1], shape (size, C, H, W), on the CPU."""
        pipeline = self.players.make_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        classes, batch = pipeline.unet.config.num_class_embeds, self.options.training.train_batch_size
        generator, pictures = torch.Generator().manual_seed(0), []
        for first in range(0, size, batch):
            number = min(batch, size - first)
            labels = [(first + i) % classes for i in range(number)] if classes else None
            images, *_ = pipeline(number, generator, class_labels=labels, output_type="pt", return_dict=False)
            pictures.append(images.cpu())
        return torch.cat(pictures)

    def _log_images(self, pictures: np.ndarray, step: int) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": pictures}, step=step, dataformats="NHWC")
            elif tracker.name in ("wandb", "comet_ml"):
                tracker.log_images({"validation": list(pictures)}, step=step)


def _by_layer(critic: Update) -> dict[str, float]:
    """Mean loss of the critic in each layer that had a row."""
    return {f"critic_loss/layer_{t}": critic.loss[critic.t == t].mean().item() for t in critic.t.unique().tolist()}
