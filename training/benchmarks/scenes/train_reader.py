"""Trains the network that reads scenes, a SceneReader.

    python -m training.benchmarks.scenes.train_reader --config training/configs/scenes_reader.yaml

It sees new scenes all the time, of all pairs of objects, for it has to know what those held out look like; half of
them blurred and all with noise, so that it does not go by single pixels. Printed is the share of new scenes, as they
are and changed, of which it reads all right. The result is a function of the seed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.runs.folders import claim_output_dir

from ..images.scene_reader import SceneReader
from ..images.scenes import draw_scenes, make_scenes, render
from ..images.train_classifier import Training, fit

NOISE = 0.1  # the most, of the range of values
NEW = 1000  # scenes that it is tested on, held out and not

# Unless the options or the config name others.
USUAL = {"num_features": 128, "max_train_steps": 6000, "train_batch_size": 64}


def change(images: Tensor) -> Tensor:
    """Images in [0, 1], (B, 3, H, W), half of them blurred, and with noise."""
    one = torch.rand(len(images), 1, 1, 1)
    images = torch.where(one < 0.5, avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False), images)
    return (images + NOISE * torch.rand_like(one) * torch.randn_like(images)).clamp(0, 1)


@torch.no_grad()
def test(reader: SceneReader, seed: int) -> str:
    """The share of new scenes of which all is read right."""
    found = []
    for held_out in (False, True):
        images, scenes = make_scenes(NEW, seed, held_out)
        labels = torch.tensor([scene.labels for scene in scenes])
        for shown in (images / 255, change(images / 255)):
            found.append(reader.agrees(shown, labels).float().mean().item())
    return "read of new scenes: {:.3f}, changed {:.3f}; of pairs held out: {:.3f}, changed {:.3f}".format(*found)


def main(args: list[str] | None = None) -> None:
    (training,) = parse_options([Training], __doc__ or "", args=args, before=USUAL)
    output_dir = claim_output_dir(training.output_dir, training.overwrite_output_dir)
    torch.manual_seed(training.seed)
    random = np.random.default_rng(training.seed)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        scenes = draw_scenes(size, None, random)
        images = np.stack([np.asarray(render(scene, random)) for scene in scenes])
        labels = torch.tensor([scene.labels for scene in scenes])
        return change(torch.from_numpy(images).permute(0, 3, 1, 2) / 255), labels

    def loss(reader: SceneReader, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([cross_entropy(*each) for each in zip(reader.logits(images), labels.T, strict=True)]).sum()

    reader = fit(training, SceneReader(training.num_features), draw, loss)
    reader.save_pretrained(output_dir)
    print(test(reader, training.seed + 1))


if __name__ == "__main__":
    run_command(main)
