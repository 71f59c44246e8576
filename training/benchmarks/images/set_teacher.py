"""The teacher of a set as tuning and benchmark draw from it: guided or not, all its classes or captions in turn."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hsivi_diffusers.teachers.denoisers import give_prompts, num_classes, sample_shape
from hsivi_diffusers.teachers.guidance import GuidedNetwork, calls_of_step, guided
from hsivi_diffusers.teachers.prompts import takes_text
from hsivi_diffusers.teachers.solvers import Sampler, Solver, make_solver, sample
from hsivi_diffusers.teachers.teacher import image_shape, load_parts, load_prompts, network_of

from .captions import CAPTIONS, choose, load_captioned, rivals
from .sets import load_images


class SetTeacher:
    """A teacher, the images of its set, and what is drawn from it or from its students.

    Args:
        folder: Of its pipeline.
        real_data: Real images, see train_teacher.py; of a text-to-image teacher `captions`.
        guidance_scale: Scale of guidance; without one a class-conditional teacher has no label for "no class".

    Attributes:
        network: The teacher, guided.
        schedule: Its noise schedule.
        classes: Number of its classes or prompts, None without.
        held_out: Place of each held-out caption among those of `load_captioned`; these are drawn first.
        rivals: Places of the captions that these are told apart from.
        step_calls: Network calls of a step.

    Raises:
        ValueError: It takes text, and the images have no captions, or the other way round.
    """

    def __init__(self, folder: str, real_data: str, guidance_scale: float | None = None) -> None:
        unet, self.schedule, self.host, _ = load_parts(folder)
        unet.eval().to(memory_format=torch.channels_last)  # a fifth faster on a CPU, the same images
        self.real_data, self.held_out, self.rivals = real_data, list[int](), list[int]()
        self.shape = image_shape(self.host, sample_shape(unet))
        self._captioned, texts = None, None
        if (self.host is not None and takes_text(self.host)) != (real_data == CAPTIONS):
            raise ValueError(f"--real_data {real_data}, and the teacher {folder}: `{CAPTIONS}` goes with text to image")
        if real_data == CAPTIONS:
            images, captions = load_captioned(self.shape[1])
            self.held_out, texts, rows = choose(captions)
            self._captioned, self.rivals = images[rows], rivals(captions, self.held_out)
        self.prompts = load_prompts(self.host, texts, "", unet.device)
        if self.prompts is not None:
            give_prompts(unet, self.prompts)
        self.classes = num_classes(unet, guidance_scale is not None) or None
        self.network = guided(unet, [1.0 if guidance_scale is None else guidance_scale])
        self.step_calls = calls_of_step(self.network)

    def load_real(self) -> tuple[Tensor, Tensor]:
        """Loads the real images in [0, 1], of the shape of the teacher's, (N, C, H, W), and their classes, (N,).

        Raises:
            ValueError: They have no classes, or not all of the teacher's.
        """
        channels, height, _ = self.shape
        labels: Tensor | None
        if self._captioned is not None:  # read once, with their captions
            images, labels = self._captioned, torch.arange(len(self._captioned)) % (self.classes or 1)
        else:
            images, labels = load_images(self.real_data, height, channels)
        if labels is None:
            raise ValueError(f"--real_data {self.real_data} has no labels: give a set with classes")
        if lacking := {*range(self.classes or 0)} - {*labels.tolist()}:
            raise ValueError(
                f"--real_data {self.real_data} has no images of the classes {sorted(lacking)} of the teacher: if the "
                "last one is 'no class', give --guidance_scale 1"
            )
        return images.float() / 255, labels

    def tell(self, student: DiffusionPipeline) -> DiffusionPipeline:
        """Returns a student that knows the captions, if the teacher has any."""
        if self.prompts is not None:
            give_prompts(network_of(student), self.prompts)
        return student

    def solver(
        self, name: str, calls: int, guidance_end: float | None = None, unguided: bool = False, **settings: Any
    ) -> Solver:
        """A solver that makes so many network calls, see `make_solver`; if `unguided`, of the teacher without guidance.

        With `guidance_end` its guidance is weaker the more noise there is, see `GuidedNetwork`.

        Raises:
            ValueError: They are not those of whole steps.
        """
        network = self.network.unet if unguided and isinstance(self.network, GuidedNetwork) else self.network
        steps, rest = divmod(calls, calls_of_step(network))
        if rest:
            raise ValueError(f"{calls} network calls: a guided step has two, give an even number")
        if guidance_end is not None:
            if not isinstance(network, GuidedNetwork):
                raise ValueError(f"guidance_end={guidance_end} of a teacher without guidance: leave it out")
            network = GuidedNetwork(network.unet, network.scales.tolist(), guidance_end)
        return make_solver(name, steps, network, self.schedule.config, host=self.host, **settings)

    def draw(self, sampler: Sampler, size: int, batch_size: int, seed: int) -> Tensor:
        """Images of any sampler, shape (size, C, H, W); with classes image i is of class i mod their number."""
        return torch.cat([*sample(sampler, size, batch_size, seed, self.classes)])

    def asked(self, size: int) -> Tensor | None:
        """The classes of so many images of `draw`, shape (size,), None without."""
        return None if self.classes is None else torch.arange(size) % self.classes
