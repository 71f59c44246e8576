"""Opens `hsivi demo` with the number of images that show what the prompt asks for, as the reader of scenes sees them.

    python -m training.benchmarks.images.scene_demo --pipeline runs/scenes_t4

It has the options of `hsivi demo`. Of a prompt that is no caption of a scene nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hsivi_diffusers.commands.cli import Demo
from hsivi_diffusers.commands.demo import Judge, serve
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.images import stack_images

from .scene_reader import SceneReader
from .scenes import SIDE, Scene

READER = Path("assets/scenes_reader")


def make_judge(reader: SceneReader) -> Judge:
    """Returns what counts the images of which the reader reads all of the scene that was asked for."""

    @torch.no_grad()
    def judge(images: Sequence[Image.Image], prompts: Sequence[Any]) -> str:
        scenes = [Scene.from_caption(str(prompt)) for prompt in prompts]
        labels = [scene.labels for scene in scenes if scene is not None]
        if len(labels) < len(images):
            return ""
        right = int(reader.agrees(stack_images(images, SIDE, 3) / 255, torch.tensor(labels)).sum())
        return f"{right} of {len(images)} show the scene"

    return judge


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Demo], __doc__ or "", args=args)
    serve(options, make_judge(SceneReader.from_pretrained(READER).eval()))


if __name__ == "__main__":
    run_command(main)
