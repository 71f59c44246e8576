"""Distances between two sets of pictures, by torchmetrics and POT."""

from __future__ import annotations

import ot
import torch
from torchmetrics.image.fid import FrechetInceptionDistance


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
            self.frechet.update(real, real=True)

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> dict[str, float]:
        """Returns {"fd", "swd"} of pictures, shape (M, C, H, W)."""
        self.frechet.reset()
        self.frechet.update(pictures, real=False)
        swd = ot.sliced_wasserstein_distance(
            pictures.flatten(1).double(), self.real.flatten(1).double(), n_projections=500, seed=0
        )
        return {"fd": float(self.frechet.compute()), "swd": float(swd)}
