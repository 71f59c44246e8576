"""Distances between two sets of pictures, by torchmetrics, POT and prdc."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import ot
import torch
from prdc import compute_prdc
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel

BATCH = 500  # pictures in the network at once
NEIGHBOURS = 5  # of precision, recall, density and coverage
FEWEST = NEIGHBOURS + 2  # pictures that have as many neighbours
MOST = 5000  # pictures of a side where the cost grows with their square
MOST_COPIES = 2000  # pictures whose nearest real one is looked for


class Distances:
    """Frechet distance in the features of a network, and sliced Wasserstein distance of the pixels, to real pictures.

    Both are computed as floats on pictures in [0, 1]; the sliced Wasserstein distance is the 2-distance over 500
    random projections of a fixed seed.

    Args:
        extractor: Module from pictures to features, with the attribute `num_features`.
        real: Real pictures, shape (N, C, H, W).
    """

    def __init__(self, extractor: torch.nn.Module, real: torch.Tensor) -> None:
        self.real = real
        self.frechet = FrechetInceptionDistance(feature=extractor, normalize=True, reset_real_features=False)
        with torch.no_grad():
            for batch in real.split(BATCH):
                self.frechet.update(batch, real=True)

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> dict[str, float]:
        """Returns {"fd", "swd"} of pictures, shape (M, C, H, W)."""
        self.frechet.reset()
        for batch in pictures.split(BATCH):
            self.frechet.update(batch, real=False)
        return {"fd": float(self.frechet.compute()), "swd": _sliced_wasserstein(pictures, self.real)}


def total_variation(p: Sequence[float], q: Sequence[float]) -> float:
    """Total variation 1/2 sum |p - q| between the shares of classes of two sets, in [0, 1]."""
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


class Measures:
    """How far pictures are from real ones, which of these they miss, and whether they are copies of them.

    All is computed on pictures in [0, 1] and is a function of the two sets. Of a set that has more pictures than said
    below, a part is taken at random, by a fixed seed. The best values to be had are those of real pictures that `real`
    does not hold, as many as there are drawn ones.

    - `fd`, `swd`: those of `Distances`; `swd` of at most 5,000 pictures of each set.
    - `kid`: squared maximum mean discrepancy of the features under the kernel (x . y / s + 1)^3, where s is the mean of
      |x|^2 in the real ones; unbiased, so that it may be negative; of at most 5,000 of each set. s makes it independent
      of the scale of the features, which FD is not.
    - `precision`, `density`: how many pictures lie among the real ones; `recall`, `coverage`: how many of the real ones
      lie among, or close to, the pictures. By prdc, in the features, of 5 neighbours, of at most 5,000 of each set.
    - `class_tv`: total variation between the shares of classes that the classifier sees in the two sets, in [0, 1].
    - `nearest`: median distance of the pixels from a picture to the nearest real one, over that from a real picture to
      the nearest other one, of at most 2,000 each, to all real ones. 1: no closer than real ones are; 0: copies.
      Blurred pictures are closer as well.

    Args:
        classifier: Module from pictures to features, with `num_features`, and `head` from features to logits.
        real: Real pictures, shape (N, C, H, W).

    Attributes:
        real_shares: Share of each class in the real pictures, as the classifier sees them.
        shares: The same of the pictures measured last.

    Raises:
        ValueError: Fewer than 7 pictures, of another shape than the real ones, or not in [0, 1].
    """

    def __init__(self, classifier: torch.nn.Module, real: torch.Tensor) -> None:
        self.classifier, self.head = classifier, classifier.get_submodule("head")
        self.real = _check(real, real)
        features = self._extract(self.real)
        self.frechet = FrechetInceptionDistance(
            feature=_Features(features.shape[1]), normalize=True, reset_real_features=False
        )
        self.frechet.update(features, real=True)
        self.rows = _choose(len(real), MOST)
        self.features = features[self.rows]
        self.shares = self.real_shares = self._count(features)
        self.gamma = 1 / self.features.square().sum(1).mean().item()
        self.kernel = _mean_kernel(self.gamma, self.features)
        self.squares = self.real.flatten(1).square().sum(1)
        rows = _choose(len(real), MOST_COPIES)
        self.spacing = self._distance(self.real[rows], rows)
        if not self.spacing > 0:
            raise ValueError("most of the real pictures are there twice: leave the copies out")

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> dict[str, float]:
        """Returns the numbers above, by name, of pictures, shape (M, C, H, W)."""
        pictures = _check(pictures, self.real)
        features = self._extract(pictures)
        self.shares = self._count(features)
        self.frechet.reset()
        self.frechet.update(features, real=False)
        rows = _choose(len(pictures), MOST)
        some = features[rows]
        return {
            "fd": float(self.frechet.compute()),
            "kid": self.kernel + _mean_kernel(self.gamma, some) - 2 * _mean_kernel(self.gamma, some, self.features),
            **_compute_prdc(self.features, some),
            "swd": _sliced_wasserstein(pictures[rows], self.real[self.rows]),
            "class_tv": total_variation(self.shares, self.real_shares),
            "nearest": self._distance(pictures[_choose(len(pictures), MOST_COPIES)]) / self.spacing,
        }

    @torch.no_grad()
    def _extract(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.classifier(batch) for batch in pictures.split(BATCH)])

    @torch.no_grad()
    def _count(self, features: torch.Tensor) -> list[float]:
        logits = self.head(features)
        shares: list[float] = (logits.argmax(1).bincount(minlength=logits.shape[1]) / len(logits)).tolist()
        return shares

    def _distance(self, pictures: torch.Tensor, rows: torch.Tensor | None = None) -> float:
        """Median distance to the nearest real picture, other than that of the same row if these are real ones."""
        real, found = self.real.flatten(1), []
        for first, batch in enumerate(pictures.flatten(1).split(200)):
            distances = self.squares - 2 * batch @ real.T
            if rows is not None:
                distances.scatter_(1, rows[200 * first :][: len(batch), None], torch.inf)
            found.append((batch - real[distances.argmin(1)]).norm(dim=1))
        return torch.cat(found).median().item()


class _Features(torch.nn.Identity):
    """Lets torchmetrics take features in place of pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _check(pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    if pictures.ndim != 4 or pictures.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"pictures have the shape {tuple(pictures.shape)}: give (M, C, H, W), with the C, H and W of the real "
            f"pictures, whose shape is {tuple(real.shape)}"
        )
    if len(pictures) < FEWEST:
        raise ValueError(f"{len(pictures)} pictures are too few to be measured: give {FEWEST} or more")
    if not pictures.is_floating_point() or not (pictures.min() >= 0 and pictures.max() <= 1):
        raise ValueError(
            f"pictures are {pictures.dtype} from {pictures.min():.4g} to {pictures.max():.4g}: give floats in [0, 1]"
        )
    return pictures.float()


def _choose(size: int, most: int) -> torch.Tensor:
    """All rows, or so many of them by a fixed seed."""
    return (
        torch.arange(size) if size <= most else torch.randperm(size, generator=torch.Generator().manual_seed(0))[:most]
    )


def _mean_kernel(gamma: float, features: torch.Tensor, others: torch.Tensor | None = None) -> float:
    """Mean of (gamma x . y + 1)^3 over all pairs, of which none is of a row with itself where there are no others."""
    rows, columns = features.double(), (features if others is None else others).double()
    total = sum(poly_kernel(batch, columns, gamma=gamma).sum().item() for batch in rows.split(1000))
    if others is not None:
        return total / (len(rows) * len(columns))
    itself = (gamma * rows.square().sum(1) + 1).pow(3).sum().item()
    return (total - itself) / (len(rows) * (len(rows) - 1))


def _compute_prdc(real: torch.Tensor, features: torch.Tensor) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the numbers of rows
        found = compute_prdc(real.numpy(), features.numpy(), NEIGHBOURS)
    return {name: float(value) for name, value in found.items()}


def _sliced_wasserstein(pictures: torch.Tensor, real: torch.Tensor) -> float:
    return float(
        ot.sliced_wasserstein_distance(
            pictures.flatten(1).double(), real.flatten(1).double(), n_projections=500, seed=0
        )
    )
