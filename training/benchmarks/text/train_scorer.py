"""Trains the network that finds the caption of an image: an ImageClassifier whose classes are all captions.

    python -m training.benchmarks.text.train_scorer --config training/configs/emoji_scorer.yaml

It sees every image, those of held-out captions too, for it has to know what they look like: each shrunk to a factor,
moved, blurred and with noise, all at random, so that it does not go by single pixels. Printed is what it finds of
images that are changed again: of all captions, and of those held out among these and the same subjects in other tones.
The result is a function of the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.runs.folders import claim_output_dir

from ..images.captions import choose, load_captioned, rivals
from ..images.train_classifier import Training, class_loss, fit

SHRINK, SHIFT, NOISE = 0.15, 0.1, 0.1  # the most, of the side and of the range of values


# Unless the options or the config name others.
USUAL = {"resolution": 64, "num_features": 128, "num_halvings": 2, "max_train_steps": 5000, "train_batch_size": 64}


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
    (training,) = parse_options([Training], __doc__ or "", args=args, before=USUAL)
    output_dir = claim_output_dir(training.output_dir, training.overwrite_output_dir)
    torch.manual_seed(training.seed)
    whole, captions = load_captioned(training.resolution)
    images = whole.float() / 255

    def draw(size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (size,))
        return change(images[rows]), rows

    scorer = ImageClassifier(3, len(captions), training.num_features, training.num_halvings)
    fit(training, scorer, draw, class_loss)
    scorer.save_pretrained(output_dir)
    every, held_out = list(range(len(captions))), choose(captions)[0]
    others = rivals(captions, held_out)
    print(f"found among all {len(every)}: {found(scorer, images, every, []):.3f}, ", end="")
    print(f"of those held out among {len(held_out) + len(others)}: {found(scorer, images, held_out, others):.3f}")


if __name__ == "__main__":
    run_command(main)
