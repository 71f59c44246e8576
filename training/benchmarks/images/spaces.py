"""The spaces that images are compared in: two networks that know nothing of each other, and the pixels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.features import EfficientNetFeatures, PixelComponents
from hsivi_diffusers.evaluation.metrics import Measures
from hsivi_diffusers.runs.measures import MEASURES

from .scene_reader import SceneReader

MLP = "mlp.safetensors"  # beside the weights of the classifier
HIDDEN = (256, 64)  # widths of the MLP; the last one are the features
LARGE = 32  # pixels from which ImageNet features are used
MOST = 5000  # real images in a KID
BATCH = 500  # images that are classified at once
OF_CLASSIFIER = ("precision", "recall", "density", "coverage", "class_tv", "nearest")
OF_CLASSES = ("accuracy", "class_fd", "class_recall")
OF_SCENES = ("right", "diversity")


class DenseFeatures(nn.Sequential):
    """The last hidden layer of an MLP of so many values of an image, which `train_classifier` trains.

    Its weights are kept: trained again, on a processor with other instructions, it is another network.
    """

    def __init__(self, size: int) -> None:
        first, last = HIDDEN
        super().__init__(nn.Flatten(), nn.Linear(size, first), nn.ReLU(), nn.Linear(first, last), nn.ReLU())


class Space(NamedTuple):
    """A name for tables, and a distance of images to real ones."""

    name: str
    measure: str
    measures: Measures

    def distance(self, images: Tensor) -> float:
        """FD, or KID x 1000, of images in [0, 1], shape (N, C, H, W)."""
        return MEASURES[self.measure].factor * self.measures(images)[self.measure]

    def beside(self, images: Tensor) -> Space:
        """Returns the same space with these images, instead of the real ones, as the reference."""
        some = images[:MOST] if self.measure == "kid" else images
        return Space(self.name, self.measure, Measures(self.measures.network, some, [self.measure]))


def make_spaces(classifier: Path, real: Tensor) -> list[Space]:
    """Returns the three spaces of a set: of its classifier, of an independent network, and of its pixels.

    Args:
        classifier: Folder of the ImageClassifier of the set, by `train_classifier`.
        real: Its images in [0, 1], shape (N, C, H, W); those below 32x32 have an MLP as the independent network,
            larger ones EfficientNet-Lite0, whose KID is taken.

    Raises:
        ValueError: The folder lacks the MLP.
    """
    own = _space("classifier", "fd", load_classifier(classifier), real)
    if real.shape[-1] < LARGE:
        if not (classifier / MLP).is_file():
            raise ValueError(
                f"{classifier} lacks {MLP}: train it again, by training.benchmarks.images.train_classifier"
            )
        dense = DenseFeatures(real[0].numel())
        dense.load_state_dict(load_file(classifier / MLP))
        independent = _space("MLP", "fd", dense, real)
    else:
        some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:MOST]
        independent = _space("EfficientNet", "kid", EfficientNetFeatures(), real[some])
    return [own, independent, _space("pixels", "fd", PixelComponents(real), real)]


def load_classifier(folder: Path) -> Any:
    """Loads the network of a set that has logits: an ImageClassifier, or a SceneReader."""
    kind: Any = SceneReader if ImageClassifier.load_config(folder)["_class_name"] == "SceneReader" else ImageClassifier
    return kind.from_pretrained(folder).eval()


class ClassMeasures:
    """How images suit the classes that they were asked for, in the features of a classifier.

    - `accuracy`: share of the images that the classifier takes for the class asked for.
    - `class_fd`, `class_recall`: FD and recall against the real images of that class; means over the classes.

    Args:
        classifier: The classifier of the set.
        real: Its images in [0, 1], shape (N, C, H, W).
        labels: Their classes, shape (N,).
    """

    def __init__(self, classifier: ImageClassifier, real: Tensor, labels: Tensor) -> None:
        self.classifier = classifier
        self.measures = {
            each: Measures(classifier, real[labels == each], ("fd", "recall")) for each in labels.unique().tolist()
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, asked: Tensor) -> dict[str, float]:
        """Returns the numbers above, by name, of images asked for by the classes (N,)."""
        seen = torch.cat([self.classifier.logits(batch).argmax(1) for batch in images.split(BATCH)])
        found = [self.measures[each](images[asked == each]) for each in asked.unique().tolist()]
        means = {f"class_{name}": mean(each[name] for each in found) for name in ("fd", "recall")}
        return {"accuracy": (seen == asked).float().mean().item(), **means}


class SceneMeasures:
    """How images suit the scenes that they were asked for.

    - `right`: share of the images of which the reader reads both objects, their relation and the ground as asked for.
    - `diversity`: mean distance of two images of a prompt in the features of EfficientNet-Lite0; mean over prompts.

    Args:
        reader: Reads scenes.
        labels: `Scene.labels` of each prompt, shape (P, 4).
    """

    def __init__(self, reader: SceneReader, labels: Tensor) -> None:
        self.reader, self.labels, self.network = reader, labels, EfficientNetFeatures().eval()

    @torch.no_grad()
    def right(self, images: Tensor, asked: Tensor) -> float:
        """Returns `right` of images asked for by the numbers of prompts (N,)."""
        batches = zip(images.split(BATCH), self.labels[asked].split(BATCH), strict=True)
        return float(torch.cat([self.reader.agrees(*batch) for batch in batches]).float().mean())

    @torch.no_grad()
    def __call__(self, images: Tensor, asked: Tensor) -> dict[str, float]:
        """Returns the numbers above, by name, of images asked for by the numbers of prompts (N,)."""
        features = torch.cat([self.network(batch) for batch in images.split(BATCH)])
        return {"right": self.right(images, asked), "diversity": diversity(features, asked)}


def diversity(features: Tensor, asked: Tensor) -> float:
    """Mean distance of two features of a prompt, by the numbers of prompts (N,); mean over those that have two."""
    of_prompt = [features[asked == each] for each in asked.unique().tolist()]
    return mean(torch.pdist(each).mean().item() for each in of_prompt if len(each) > 1)


class SetMeasures:
    """What a row of the benchmark of a set tells of its images.

    Args:
        classifier: Folder of the ImageClassifier of the set.
        real: Its images in [0, 1], shape (N, C, H, W).
        labels: Their classes, shape (N,).
        converged: Images of the teacher in many steps, like the real ones.
        scenes: The set, if it is of scenes.
    """

    def __init__(
        self,
        classifier: Path,
        real: Tensor,
        labels: Tensor,
        converged: Tensor,
        scenes: Any = None,
    ) -> None:
        self.spaces = make_spaces(classifier, real)
        self.teacher_spaces = [space.beside(converged) for space in self.spaces]
        names = [name for name in OF_CLASSIFIER if scenes is None or name != "class_tv"]
        self.measures = Measures(self.spaces[0].measures.network, real, names)

        @cache
        def make() -> Any:
            if scenes is not None:
                return scenes.measures(classifier)
            return ClassMeasures(load_classifier(classifier), real, labels)

        self.make_class_measures = make

    def __call__(self, images: Tensor, asked: Tensor | None = None) -> dict[str, Any]:
        """Returns distances to the real images and to the teacher's, by space, and the other measures, of images.

        With the classes or prompts that they were asked for, shape (N,), also those of `ClassMeasures` or
        `SceneMeasures`.
        """
        return {
            "distances": {space.name: space.distance(images) for space in self.spaces},
            "teacher_distances": {space.name: space.distance(images) for space in self.teacher_spaces},
            **self.measures(images),
            **({} if asked is None else self.make_class_measures()(images, asked)),
            "class_shares": self.measures.shares,
            "real_class_shares": self.measures.real_shares,
        }


def _space(name: str, measure: str, network: nn.Module, real: Tensor) -> Space:
    return Space(name, measure, Measures(network.eval(), real, [measure]))
