"""Trains the network that finds the caption of an image: an ImageClassifier whose classes are all captions.

    python -m training.benchmarks.text.train_scorer --config training/configs/emoji_scorer.yaml

It sees every image, those of held-out captions too, for it has to know what they look like: each shrunk to a factor,
moved, blurred and with noise, all at random, so that it does not go by single pixels. Printed is what it finds of
images that are changed again: of all captions, and of those held out among these and the same subjects in other tones.
The result is a function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.runs.folders import claim_output_dir
from hsivi_diffusers.runs.options import option

from ..images.captions import choose, load_captioned, rivals
from ..images.train_classifier import fit

SHRINK, SHIFT, NOISE = 0.15, 0.1, 0.1  # the most, of the side and of the range of values


@dataclass
class Training:
    _group = "training"
    output_dir: str | None = option(None, "folder of the classifier")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    resolution: int = option(64, "height and width in pixels")
    num_features: int = option(128, "width of the features")
    num_halvings: int = option(2, "convolutions in front that halve height and width")
    seed: int = option(0, "seed of weights, batches and changes")
    max_train_steps: int = option(5000, "number of updates")
    train_batch_size: int = option(64, "images in an update")
    learning_rate: float = option(2e-3, "Adam's, cosine to 0")


def change(images: Tensor) -> Tensor:
    """Images in [0, 1], (B, 3, H, W), on white, shrunk, moved, half of them blurred, and with noise."""
    size = len(images)
    scale = 1 + SHRINK * torch.rand(size)
    shift = SHIFT * (2 * torch.rand(size, 2) - 1)
    turn = torch.cat([torch.diag_embed(scale[:, None].expand(-1, 2)), shift[:, :, None]], dim=2)
    moved = 1 - grid_sample(1 - images, affine_grid(turn, list(images.shape), align_corners=False), align_corners=False)
    blurred = avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    moved = torch.where(torch.rand(size, 1, 1, 1) < 0.5, blurred, moved)
    return (moved + NOISE * torch.rand(size, 1, 1, 1) * torch.randn_like(moved)).clamp(0, 1)


@torch.no_grad()
def found(scorer: ImageClassifier, images: Tensor, rows: list[int], rivals: list[int]) -> float:
    """The share of changed images of these captions whose own is put first among those and their rivals."""
    logits = torch.cat([scorer.logits(change(batch))[:, rows + rivals] for batch in images[rows].split(500)])
    return (logits.argmax(1) == torch.arange(len(rows))).float().mean().item()


def main(args: list[str] | None = None) -> None:
    (training,) = parse_options([Training], __doc__ or "", args=args)
    output_dir = claim_output_dir(training.output_dir, training.overwrite_output_dir)
    torch.manual_seed(training.seed)
    whole, captions = load_captioned(training.resolution)
    images = whole.float() / 255
    scorer = ImageClassifier(3, len(captions), training.num_features, training.num_halvings)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (training.train_batch_size,))
        return change(images[rows]), rows

    fit(scorer, draw, training.max_train_steps, training.learning_rate)
    scorer.save_pretrained(output_dir)
    every, held_out = list(range(len(captions))), choose(captions)[0]
    others = rivals(captions, held_out)
    print(f"found among all {len(every)}: {found(scorer, images, every, []):.3f}, ", end="")
    print(f"of those held out among {len(held_out) + len(others)}: {found(scorer, images, held_out, others):.3f}")


if __name__ == "__main__":
    run_command(main)
