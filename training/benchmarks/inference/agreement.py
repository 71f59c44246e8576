r"""How well draws agree with a target, measured against exact draws, known modes, known moments or the score.

    JS     KL(P || M) / 2 + KL(Q || M) / 2,  M = (P + Q) / 2               histograms on the plane, nats
    SWD    (E_theta W_2^2(theta . x, theta . y))^(1/2)                     theta uniform on the sphere
    MMD^2  E k(x, x') + E k(y, y') - 2 E k(x, y)                           Gaussian kernel, unbiased
    KSD^2  E k_p(x, x')                                                    needs the score alone

The floor of each is the same function between two independent exact sets of the same sizes. Each takes draws of shape
(N, d) and a reference of shape (M, d), and raises a ValueError if any is not finite.
"""

from __future__ import annotations

import numpy as np
import ot
import torch
from scipy.spatial.distance import jensenshannon, pdist
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from hsivi_diffusers.vi import ScoreTarget, Target


def js_divergence(draws: Tensor, reference: Tensor) -> float:
    """Jensen-Shannon divergence of two histograms of 50 x 50 cells on the plane, between 0 and ln 2 nats.

    The cells reach 5 % of the range beyond the reference draws; draws outside share one more. The floor between exact
    sets of N draws is near (occupied cells) / (8 N).
    """
    p, q = _double(draws), _double(reference)
    low, high = q.aminmax(dim=0)
    room = 0.05 * (high - low)
    edges = torch.stack([low - room, high + room], dim=1).tolist()
    return float(jensenshannon(_histogram(p, edges), _histogram(q, edges))) ** 2


def sliced_wasserstein(draws: Tensor, reference: Tensor) -> float:
    """Sliced Wasserstein 2-distance over 100 random projections; |shift| / sqrt(d) between shifted copies.

    Of at most 5,000 rows of each. Between modes far apart its floor falls as N^(-1/4) only.
    """
    x, y = (_rows(_double(x), 5000) for x in (draws, reference))
    return float(ot.sliced_wasserstein_distance(x, y, n_projections=100, seed=0))


def mmd(draws: Tensor, reference: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased and so below 0 at times, with k = exp(-|x - y|^2 / (2 h^2)).

    Of at most 2,000 rows of each. h is the median distance between reference draws, so the same for all samplers.
    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012, lemma 6.
    """
    x, y = (_rows(_double(z), 2000).numpy() for z in (draws, reference))
    gamma = 0.5 / float(np.median(pdist(y))) ** 2
    xx, yy, xy = (rbf_kernel(a, b, gamma=gamma) for a, b in ((x, x), (y, y), (x, y)))
    off_diagonal = sum((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in (xx, yy))
    return float(off_diagonal - 2 * xy.mean())


def ksd(draws: Tensor, target: Target) -> float:
    r"""Kernel Stein discrepancy with the inverse multiquadric k(x, y) = (1 + |x - y|^2)^(-1/2), a V-statistic.

        KSD^2 = 1/N^2 sum_ij k_p(x_i, x_j)
        k_p(x, y) = k S(x).S(y) + S(x).grad_y k + S(y).grad_x k + div_x grad_y k
                  = u^(-1/2) S(x).S(y) + u^(-3/2) (d + (S(x) - S(y)).r) - 3 u^(-5/2) |r|^2,   r = x - y, u = 1 + |r|^2

    S is the score of the target, and at most 1,000 draws are used. For exact draws it falls as N^(-1/2). It is blind to
    missing modes: draws from one of several that lie far apart pass.

    Source: Gorham & Mackey, Measuring Sample Quality with Kernels, ICML 2017 (arXiv 1703.01717).
    """
    rows = _rows(draws, 1000)
    x, s = _double(rows), _double(target.score(rows))
    square = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    along = (s * x).sum(1)
    gap = along[:, None] + along[None, :] - s @ x.T - x @ s.T
    u = 1 + square
    kernel = u**-0.5 * (s @ s.T) + u**-1.5 * (x.shape[1] + gap) - 3 * u**-2.5 * square
    return float(kernel.mean().clamp_min(0).sqrt())


def mode_errors(draws: Tensor, modes: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Compares the share of draws nearest to each of K modes, shape (K, d), with its weight; equal ones by default.

    Returns:
        {"modes_found": how many have a fifth of their due mass, "mode_tv": total variation of the masses,
        "mode_max_error": greatest relative error of a mass}.
    """
    true = torch.ones(len(modes)).double() if weights is None else _double(weights)
    true = true / true.sum()
    nearest = torch.cdist(_double(draws), _double(modes)).argmin(1)
    mass = torch.bincount(nearest, minlength=len(modes)).double() / len(draws)
    return {
        "modes_found": float((mass >= 0.2 * true).sum()),
        "mode_tv": float(0.5 * (mass - true).abs().sum()),
        "mode_max_error": float((mass / true - 1).abs().max()),
    }


def moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> dict[str, float]:
    """Compares mean and covariance with those of the target, of shapes (d,) and (d, d).

    Returns:
        {"mean_error": greatest error of a coordinate's mean in units of the target's standard deviation,
        "mean_error_rms": its root mean square over coordinates, "sd_ratio_min", "sd_ratio_max": least and greatest
        ratio of the standard deviations, "covariance_error": |C - C_ref|_F / |C_ref|_F}.
    """
    x, center, reference = _double(draws), _double(mean), _double(covariance)
    sd = reference.diagonal().sqrt()
    estimate = torch.cov(x.T).reshape(reference.shape)
    error = (x.mean(0) - center) / sd
    ratio = estimate.diagonal().sqrt() / sd
    return {
        "mean_error": float(error.abs().max()),
        "mean_error_rms": float(error.square().mean().sqrt()),
        "sd_ratio_min": float(ratio.min()),
        "sd_ratio_max": float(ratio.max()),
        "covariance_error": float((estimate - reference).norm() / reference.norm()),
    }


def compare(draws: Tensor, reference: Tensor, target: Target) -> dict[str, float]:
    """All that applies to a target with exact draws, such as one on the plane.

    Returns:
        {"swd", "mmd", "ksd"}, "js" on the plane, and those of `mode_errors` if the target has distinct modes.
    """
    result = {"js": js_divergence(draws, reference)} if draws.shape[1] == 2 else {}
    result |= {"swd": sliced_wasserstein(draws, reference), "mmd": mmd(draws, reference), "ksd": ksd(draws, target)}
    modes = getattr(target, "modes", None)
    if modes is None or len(modes.unique(dim=0)) < len(modes):
        return result
    return result | mode_errors(draws, modes, getattr(target, "weights", None))


def compare_moments(
    draws: Tensor, mean: Tensor, covariance: Tensor, reference: Tensor, target: Target
) -> dict[str, float]:
    """What `moments` and `compare` give of a posterior; `compare` of x in units of the reference's deviations."""
    sd = covariance.diagonal().sqrt().to(draws)
    scaled = ScoreTarget(lambda z: target.score(z * sd) * sd, len(sd))
    return moments(draws, mean, covariance) | compare(draws / sd, reference.to(draws) / sd, scaled)


def _double(x: Tensor) -> Tensor:
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {x.numel()} numbers are not finite: a sampler that diverged cannot be measured")
    return x.detach().cpu().double()


def _rows(x: Tensor, limit: int) -> Tensor:
    return x if len(x) <= limit else x[torch.linspace(0, len(x) - 1, limit).round().long()]


def _histogram(x: Tensor, edges: list[list[float]]) -> np.ndarray:
    counts = np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=50, range=edges)[0].ravel()
    return np.append(counts, len(x) - counts.sum())
