"""Trains the networks in whose features images are compared: a small ImageClassifier, and for small images an MLP.

    python -m training.benchmarks.images.train_classifier --output_dir assets/digits_classifier
    python -m training.benchmarks.images.train_classifier --config training/configs/fashion_classifier.yaml

A fifth of the images is held out, and the accuracy on it printed. Variants of one emoji are never on both sides. The
classifier is a function of the seed; the MLP, of scikit-learn, of the processor too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn.functional import cross_entropy

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.folders import claim_output_dir
from hsivi_diffusers.runs.options import option

from .sets import load_families, load_images
from .spaces import HIDDEN, LARGE, MLP


@dataclass
class Data:
    _group = "data"
    train_data: str = option(
        "digits",
        "`digits`, `fashion-mnist`, `emoji`, a folder with one subfolder per class, or a labelled dataset on the Hub",
    )
    channels: int = option(1, "1 (grey) or 3 (RGB)")


@dataclass
class Training:
    _group = "training"
    output_dir: str | None = option(None, "folder of the classifier")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    resolution: int = option(8, "height and width of the images")
    num_features: int = option(64, "width of the features")
    num_halvings: int = option(0, "convolutions in front that halve height and width; 2 for images of 32x32")
    seed: int = option(0, "seed of split, weights and batches")
    max_train_steps: int = option(1000, "number of updates")
    train_batch_size: int = option(128, "images in an update")
    learning_rate: float = option(2e-3, "Adam's, cosine to 0")


def split(families: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a random fifth of the families, held out, and those of the others."""
    count = int(families.max()) + 1
    places = torch.randperm(count).argsort()[families]
    rows = places.argsort(stable=True)
    size = int((places < count // 5).sum())
    return rows[:size], rows[size:]


def class_loss(model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the classes (B,) of images."""
    return cross_entropy(model.logits(images), labels)


def fit(
    training: Training,
    model: Any,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    loss_of: Callable[[Any, Tensor, Tensor], Tensor],
) -> Any:
    """Trains a model on batches of images and labels, by Adam with a rate that falls to 0 as a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.max_train_steps)
    progress = bar(range(training.max_train_steps), "classifier")
    for _ in progress:
        loss = loss_of(model, *draw(training.train_batch_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model


def fit_mlp(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The weights of `DenseFeatures`: the hidden layers of an MLP of the pixels, by early stopping."""
    model = MLPClassifier(HIDDEN, random_state=0, early_stopping=True).fit(images.flatten(1).numpy(), labels.numpy())
    weights = {}
    for place, weight, bias in zip((1, 3), model.coefs_[:-1], model.intercepts_[:-1], strict=True):
        weights[f"{place}.weight"], weights[f"{place}.bias"] = torch.tensor(weight.T), torch.tensor(bias)
    return {name: value.float().contiguous() for name, value in weights.items()}


def main(args: list[str] | None = None) -> None:
    data, training = parse_options([Data, Training], __doc__ or "", args=args)
    output_dir = claim_output_dir(training.output_dir, training.overwrite_output_dir)
    torch.manual_seed(training.seed)
    images, labels = load_images(data.train_data, training.resolution, data.channels)
    if labels is None:
        raise ValueError(
            f"--train_data {data.train_data} has no labels: give a folder with one subfolder per class, `digits`, "
            "`fashion-mnist` or `emoji`"
        )
    images = images.float() / 255
    families = load_families(data.train_data)
    held_out, train = split(torch.arange(len(images)) if families is None else families)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        rows = train[torch.randint(len(train), (size,))]
        return images[rows], labels[rows]

    model = ImageClassifier(data.channels, int(labels.max()) + 1, training.num_features, training.num_halvings)
    fit(training, model, draw, class_loss)
    with torch.no_grad():
        guesses = torch.cat([model.logits(images[rows]).argmax(1) for rows in held_out.split(500)])
        accuracy = (guesses == labels[held_out]).float().mean().item()
    model.save_pretrained(output_dir)
    if training.resolution < LARGE:
        save_file(fit_mlp(images, labels), output_dir / MLP)
    print(f"accuracy on {len(held_out)} held-out images of {data.train_data}: {accuracy:.3f}")


if __name__ == "__main__":
    run_command(main)
