"""How far images are from real ones or other reference images, by torchmetrics, POT and prdc."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..runs.bars import bar
from .features import PixelComponents, check_packages

BATCH = 500  # images in the network at once
NEIGHBOURS = 5  # of precision, recall, density and coverage
FEWEST = NEIGHBOURS + 2  # images that have as many neighbours
MOST = 5000  # images of a side where the cost grows with their square
MOST_COPIES = 2000  # images whose nearest real one is looked for
PRDC = ("precision", "recall", "density", "coverage")
PACKAGES = ("torchmetrics", "prdc", "ot", "sklearn")
GROUPS = 10  # of the jackknife
KID = {"kid", "kid_error", "kid_folds"}
NAMES = ("fd", "kid", *PRDC, "pixel_fd", "swd", "class_tv", "nearest")
SIDE = 64  # pixels of a side that pixel_fd and swd see at most


def total_variation(p: Sequence[float], q: Sequence[float]) -> float:
    """Total variation 1/2 sum |p - q| between the shares of classes of two sets, in [0, 1]."""
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


class Measures:
    """How far images are from real ones, which of these they miss, and whether they are copies of them.

    All is computed on images in [0, 1] and is a function of the two sets. Of a set that has more images than said
    below, a part is taken at random, by a fixed seed. The best possible values are those of real images that `real`
    does not hold, as many as there are sampled ones.

    - `fd`: Frechet distance |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the features' means and covariances.
    - `kid`: squared maximum mean discrepancy of the features under the kernel (x . y / s + 1)^3, where s is the mean of
      |x|^2 in the real ones; unbiased, so that it may be negative; of at most 5,000 of each set. s makes it independent
      of the scale of the features, which FD is not.
    - `kid_folds`, only where it is named: `kid` without each of ten random groups of the images, the same ones of
      every call with as many images.
    - `kid_error`, only where it is named: standard error of `kid` over draws of as many images, by the jackknife over
      these groups. That of the real images, which all samplers share, is not in it.
    - `precision`, `density`: how many images lie among the real ones; `recall`, `coverage`: how many of the real ones
      lie among, or close to, the images. By prdc, in the features, of 5 neighbours, of at most 5,000 of each set.
    - `pixel_fd`: Frechet distance of up to 64 principal components of the pixels of the real images, of at most 5,000
      of them. Here and in `swd` a larger image is averaged down to 64 x 64.
    - `swd`: sliced Wasserstein 2-distance of the pixels over 500 random projections of a fixed seed; of at most 5,000
      of each set.
    - `class_tv`: total variation between the shares of classes that the classifier sees in the two sets, in [0, 1].
    - `nearest`: median distance of the pixels from an image to the nearest real one, over that from a real image to
      the nearest other one, of at most 2,000 each, to all real ones. 1: no closer than real ones are; 0: copies.
      Blurred images are closer as well.

    Args:
        network: Module from images to features; for `class_tv` with `head` from features to logits.
        real: Real images, or other reference images, shape (N, C, H, W).
        names: Which of these to measure; by default all others that the network can.

    Attributes:
        real_shares: Share of each class in the real images, as the classifier sees them; empty without `class_tv`.
        shares: The same of the images measured last.

    Raises:
        ValueError: Fewer than 7 images, of another shape than the real ones, or not in [0, 1]; a package is missing.
    """

    def __init__(self, network: torch.nn.Module, real: torch.Tensor, names: Sequence[str] | None = None) -> None:
        check_packages(PACKAGES)
        self.network, self.real = network, _check(real, real)
        self.names = names or [name for name in NAMES if name != "class_tv" or hasattr(network, "head")]
        features = self._extract(self.real)
        self.frechet = _Frechet(features)
        self.rows = _choose(len(real), MOST)
        self.features, self.small = features[self.rows], _small(self.real)
        if "pixel_fd" in self.names:
            self.components = PixelComponents(self.small[self.rows])
            self.pixel_frechet = _Frechet(self.components(self.small))
        self.shares = self.real_shares = self._count(features)
        self.gamma = 1 / self.features.square().sum(1).mean().item()
        self.kernel = _mean_kernel(self.gamma, self.features) if KID.intersection(self.names) else 0.0
        self.spacing = self._space() if "nearest" in self.names else 1.0

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, Any]:
        """Returns the numbers above, by name, of images, shape (M, C, H, W)."""
        import ot
        from prdc import compute_prdc

        images = _check(images, self.real)
        features, small, rows = self._extract(images), _small(images), _choose(len(images), MOST)
        some = features[rows]
        found: dict[str, Any] = {}
        self.shares = self._count(features)
        if "fd" in self.names:
            found["fd"] = self.frechet(features)
        if KID.intersection(self.names):
            kid, folds = self._kid(some)
            found |= {"kid": kid, "kid_error": jackknife(folds), "kid_folds": folds.tolist()}
        if any(name in self.names for name in PRDC):
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the numbers of rows
                found |= compute_prdc(self.features.numpy(), some.numpy(), NEIGHBOURS)
        if "pixel_fd" in self.names:
            found["pixel_fd"] = self.pixel_frechet(self.components(small))
        if "swd" in self.names:
            pixels = (each.flatten(1).double() for each in (small[rows], self.small[self.rows]))
            found["swd"] = ot.sliced_wasserstein_distance(*pixels, n_projections=500, seed=0)
        if "class_tv" in self.names:
            found["class_tv"] = total_variation(self.shares, self.real_shares)
        if "nearest" in self.names:
            found["nearest"] = self._distance(images[_choose(len(images), MOST_COPIES)]) / self.spacing
        return {name: found[name] if name == "kid_folds" else float(found[name]) for name in self.names}

    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> torch.Tensor:
        device = next(self.network.parameters(), images).device
        batches = bar(images.split(BATCH), "features", unit="batch", leave=False, delay=5)
        return torch.cat([self.network(batch.to(device)).cpu() for batch in batches])

    @torch.no_grad()
    def _count(self, features: torch.Tensor) -> list[float]:
        if "class_tv" not in self.names:
            return []
        head = self.network.get_submodule("head")
        logits = head(features.to(next(head.parameters(), features).device))
        shares: list[float] = (logits.argmax(1).bincount(minlength=logits.shape[1]) / len(logits)).tolist()
        return shares

    def _kid(self, features: torch.Tensor) -> tuple[float, torch.Tensor]:
        """KID, and KID without each group: the sums of the kernel over all pairs of groups make both."""
        from torchmetrics.image.kid import poly_kernel

        rows, real, gamma = features.double()[_shuffle(len(features))], self.features.double(), self.gamma
        groups = rows.tensor_split(min(GROUPS, len(rows)))
        sizes = [len(group) for group in groups]
        columns = [poly_kernel(group, rows, gamma=gamma).sum(0).split(sizes) for group in groups]
        within = torch.stack([torch.stack([each.sum() for each in of_group]) for of_group in columns])
        within -= torch.diag(torch.stack([_diagonal(gamma, group).sum() for group in groups]))
        across = torch.stack([poly_kernel(group, real, gamma=gamma).sum() for group in groups])

        def kid(within: torch.Tensor, across: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
            return self.kernel + within / (count * (count - 1)) - 2 * across / (count * len(real))

        count = torch.tensor(sizes)
        left = within.sum() - within.sum(0) - within.sum(1) + within.diagonal()
        whole = kid(within.sum(), across.sum(), count.sum())
        return whole.item(), kid(left, across.sum() - across, count.sum() - count)

    def _space(self) -> float:
        """Median distance from a real image to the nearest other one."""
        if not (spacing := self._distance(self.real[_choose(len(self.real), MOST_COPIES)], skip=1)) > 0:
            raise ValueError("most of the real images are there twice: leave the copies out")
        return spacing

    def _distance(self, images: torch.Tensor, skip: int = 0) -> float:
        """Median distance to the nearest real image, or with `skip` to the next one after as many."""
        from sklearn.neighbors import NearestNeighbors

        real, rows = self.real.flatten(1), images.flatten(1)
        nearest = NearestNeighbors(n_neighbors=skip + 1, algorithm="brute").fit(real)
        places = torch.from_numpy(nearest.kneighbors(rows, return_distance=False))[:, skip]
        return (rows - real[places]).norm(dim=1).median().item()


def split_halves(network: torch.nn.Module, real: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """The floor: measures of one random half of the real images against the other; empty where there are too few."""
    if len(real) < 2 * FEWEST:
        return {}
    one, other = real[_shuffle(len(real))].tensor_split(2)
    return Measures(network, one, names)(other)


def jackknife(folds: torch.Tensor) -> float:
    """The standard error of a number, by its values without each of several groups of equal sizes, shape (G,)."""
    return math.sqrt(len(folds) - 1) * folds.std(correction=0).item()


class _Frechet:
    """Frechet distance of features, shape (M, D), to those of real images."""

    def __init__(self, real: torch.Tensor) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.metric = FrechetInceptionDistance(
            feature=_Features(real.shape[1]), normalize=True, reset_real_features=False
        )
        self.metric.update(real, real=True)

    def __call__(self, features: torch.Tensor) -> float:
        self.metric.reset()
        self.metric.update(features, real=False)
        return float(self.metric.compute())


class _Features(torch.nn.Identity):
    """Lets torchmetrics take features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _check(images: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"images have the shape {tuple(images.shape)}: give (M, C, H, W), with the C, H and W of the real "
            f"images, whose shape is {tuple(real.shape)}"
        )
    if len(images) < FEWEST:
        raise ValueError(f"{len(images)} images are too few to be measured: give {FEWEST} or more")
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images are {images.dtype} from {images.min():.4g} to {images.max():.4g}: give floats in [0, 1]"
        )
    return images.float()


def _small(images: torch.Tensor) -> torch.Tensor:
    """The images, averaged down to at most 64 x 64 pixels."""
    height, width = images.shape[-2:]
    return images if max(height, width) <= SIDE else adaptive_avg_pool2d(images, (min(height, SIDE), min(width, SIDE)))


def _choose(size: int, most: int) -> torch.Tensor:
    """All rows, or at most `most` of them by a fixed seed."""
    return torch.arange(size) if size <= most else _shuffle(size)[:most]


def _shuffle(size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))


def _mean_kernel(gamma: float, features: torch.Tensor) -> float:
    """Mean of (gamma x . y + 1)^3 over all pairs of different rows."""
    from torchmetrics.image.kid import poly_kernel

    rows = features.double()
    total = sum(poly_kernel(batch, rows, gamma=gamma).sum().item() for batch in rows.split(1000))
    return (total - _diagonal(gamma, rows).sum().item()) / (len(rows) * (len(rows) - 1))


def _diagonal(gamma: float, rows: torch.Tensor) -> torch.Tensor:
    """The same kernel of each row with itself."""
    return (gamma * rows.square().sum(1) + 1).pow(3)
