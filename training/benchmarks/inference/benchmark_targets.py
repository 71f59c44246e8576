"""The targets of the benchmarks by name, and what is known of those that cannot be sampled exactly.

A reference is a long run of NUTS, kept in assets/references; make_references.py makes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from hsivi_diffusers.vi import Target

from .targets.plane import Banana, Checkerboard, circles, cross, ring, swiss_roll
from .targets.posteriors import ConditionedDiffusion, LogisticRegression, RareEvents

REFERENCES = Path(__file__).parents[3] / "assets" / "references"


def breast_cancer() -> LogisticRegression:
    """Malignant (0) or benign (1) by 30 standardised features and an intercept, the last: d = 31."""
    features, labels = (torch.from_numpy(part) for part in load_breast_cancer(return_X_y=True))
    features = (features - features.mean(0)) / features.std(0, correction=0)
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    return LogisticRegression(features.float(), labels.float())


TARGETS: dict[str, Callable[[], Target]] = {
    "checkerboard": Checkerboard,
    "swiss_roll": swiss_roll,
    "circles": circles,
    "ring": ring,
    "banana": Banana,
    "cross": cross,
    "logistic_regression": breast_cancer,
    "conditioned_diffusion": ConditionedDiffusion,
    "rare_events": RareEvents,
}


def make_target(name: str) -> Target:
    """Returns a target by its name."""
    if name not in TARGETS:
        raise ValueError(f"no target is called {name!r}: choose one of {', '.join(TARGETS)}")
    return TARGETS[name]()


class Reference(NamedTuple):
    """What a long run of NUTS says of a posterior on R^d.

    Means, shape (d,), and covariances, shape (d, d), of all draws and of the first and the second half of the chains;
    some of the draws, evenly spaced, shape (n, d); how it was made and how far it can be trusted.
    """

    mean: Tensor
    covariance: Tensor
    mean_1: Tensor
    covariance_1: Tensor
    mean_2: Tensor
    covariance_2: Tensor
    draws: Tensor
    metadata: dict[str, str]


def load_reference(name: str, folder: str | Path = REFERENCES) -> Reference:
    """Returns the reference of a target."""
    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing: make it with python -m training.benchmarks.inference.make_references")
    with safe_open(path, framework="pt") as file:
        tensors = {field: file.get_tensor(field) for field in Reference._fields if field != "metadata"}
        return Reference(**tensors, metadata=file.metadata())


def save_reference(name: str, reference: Reference, folder: str | Path) -> Path:
    """Writes a reference in single precision, whole or not at all, and returns the path of its file."""
    path = Path(folder) / f"{name}.safetensors"
    partial = path.with_name(f"{path.name}.partial")
    fields = reference._asdict()
    metadata = fields.pop("metadata")
    save_file({field: value.float().contiguous() for field, value in fields.items()}, partial, metadata)
    os.replace(partial, path)
    return path
