"""Trains the small classifier of the Frechet distance ("FD, digits classifier features").

    python training/train_classifier.py --output_dir assets/digits_classifier

A fifth of the digits is held out, and the accuracy on it printed. A function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import trange

from classifier import ImageClassifier
from folders import claim_output_dir
from images import load_images
from options import option, parse_options


@dataclass
class Training:
    _argument_group_name = "training"
    output_dir: str | None = option(None, "folder of the classifier")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    seed: int = option(0, "seed of split, weights and batches")
    max_train_steps: int = option(1000, "number of updates")
    train_batch_size: int = option(128, "pictures in an update")
    learning_rate: float = option(2e-3, "Adam's, cosine to 0")


def main(args: list[str] | None = None) -> None:
    (training,) = parse_options([Training], __doc__ or "", args=args)
    output_dir = claim_output_dir(training.output_dir, training.overwrite_output_dir)
    torch.manual_seed(training.seed)
    images, labels = load_images("digits", resolution=8, channels=1)
    assert labels is not None
    images = images.float() / 255
    order = torch.randperm(len(images))
    held_out, train = order[: len(images) // 5], order[len(images) // 5 :]

    model = ImageClassifier(channels=1, num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.max_train_steps)
    progress = trange(training.max_train_steps, desc="classifier")
    for _ in progress:
        rows = train[torch.randint(len(train), (training.train_batch_size,))]
        loss = cross_entropy(model.logits(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    with torch.no_grad():
        accuracy = (model.logits(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    model.save_pretrained(output_dir)
    print(f"accuracy on {len(held_out)} held-out digits: {accuracy:.3f}")


if __name__ == "__main__":
    main()
