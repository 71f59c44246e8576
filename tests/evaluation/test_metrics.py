import math
import sys

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from torchmetrics.image import kid

from hsivi_diffusers.evaluation import metrics
from hsivi_diffusers.evaluation.metrics import Measures, split_halves

NAMES = {"fd", "kid", "precision", "recall", "density", "coverage", "pixel_fd", "swd", "class_tv", "nearest"}


class Corners(torch.nn.Module):
    """Means of the quarters of a image; its class is the brightest quarter."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Identity()

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


@pytest.fixture(scope="module")
def real():
    """120 images, the brightest quarter of which is 0, 1, 2, 3, 0, ..."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(120, 3, 6, 6, generator=generator)
    for i in range(4):
        images[i::4, :, 3 * (i // 2) :, 3 * (i % 2) :][:, :, :3, :3] += 0.6
    return images


@pytest.fixture(scope="module")
def measures(real):
    return Measures(Corners(), real)


def test_real_images_against_themselves(measures, real):
    found = measures(real)
    assert found.keys() == NAMES
    assert all(type(value) is float for value in found.values())
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert found["kid"] < 1e-6
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] == pytest.approx(1)
    assert (found["swd"], found["class_tv"], found["nearest"]) == (0, 0, 0)
    assert measures.shares == measures.real_shares == [0.25] * 4


def test_only_what_was_asked_for_is_measured(measures, real, monkeypatch):
    images = real[:50].flip(3) ** 2
    monkeypatch.setattr(ot, "sliced_wasserstein_distance", lambda *given: pytest.fail("not asked for"))
    found = Measures(Corners(), real, ["recall", "fd"])(images)
    monkeypatch.undo()
    wanted = measures(images)
    assert found == {"recall": wanted["recall"], "fd": pytest.approx(wanted["fd"])}
    headless = Corners()
    del headless.head
    measures = Measures(headless, real)
    assert measures(images).keys() == NAMES - {"class_tv"}
    assert measures.shares == measures.real_shares == []


def test_the_error_of_kid_is_its_spread_over_draws_of_images(real):
    measures, generator = Measures(Corners(), real, ["kid", "kid_error"]), torch.Generator().manual_seed(1)
    for brighter in (0.0, 0.2):  # without a bias both are of the order 1 / images, with one 1 / sqrt(images)
        draws = [real[torch.randint(120, (80,), generator=generator)] + brighter for _ in range(60)]
        found = [measures(each.clamp(0, 1)) for each in draws]
        kids, errors = ([each[name] for each in found] for name in ("kid", "kid_error"))
        assert np.std(kids) < 1.2 * np.mean(errors) < 2 * np.std(kids)
    names = ["kid", "kid_error", "kid_folds"]
    seven = Measures(Corners(), real, names)(real[:7])  # fewer than there are groups: one is left out at a time
    assert len(seven["kid_folds"]) == 7
    assert seven["kid_error"] == pytest.approx(math.sqrt(6) * np.std(seven["kid_folds"]))


def test_kid_without_a_group_is_that_of_the_other_images(real):
    """Groups are random: images in the order of many classes would leave out whole classes."""
    measures, images = Measures(Corners(), real, ["kid", "kid_folds"]), real[:80] ** 2
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    left = [torch.cat([order[: 8 * i], order[8 * i + 8 :]]) for i in range(10)]
    assert measures(images)["kid_folds"] == pytest.approx([measures(images[rows])["kid"] for rows in left])


@torch.no_grad()
def test_fd_is_that_of_two_gaussians_in_the_features(measures, real):
    images = real[:50].flip(3) ** 2
    features = [Corners()(each).double().numpy() for each in (real, images)]
    (mean, covariance), (other_mean, other_covariance) = ((f.mean(0), np.cov(f, rowvar=False)) for f in features)
    root = scipy.linalg.sqrtm(covariance @ other_covariance).real
    wanted = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)
    assert wanted > 1e-3
    assert measures(images)["fd"] == pytest.approx(wanted, rel=1e-3)


def test_swd_of_a_shifted_set_is_the_shift_along_500_directions():
    """The distance of X + c 1 along u is c |1 . u|; the mean of its square over all directions is c^2."""
    real = 0.7 * torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    doubles, backend = real.double(), ot.backend.TorchBackend()
    directions = ot.sliced.get_random_projections(64, 500, seed=0, backend=backend, type_as=doubles)
    wanted = 0.25 * directions.sum(0).square().mean().sqrt().item()
    assert Measures(Corners(), real, ["swd"])(real + 0.25)["swd"] == pytest.approx(wanted, rel=1e-5)
    assert wanted == pytest.approx(0.25, rel=0.1)


def test_the_floor_is_one_half_against_the_other(real):
    assert abs(split_halves(Corners(), real, ["fd"])["fd"]) < 0.05 < Measures(Corners(), real, ["fd"])(1 - real)["fd"]
    floor = split_halves(Corners(), real[:14], ["swd", "recall"])
    assert [*floor] == ["swd", "recall"]
    assert floor["swd"] > 0  # real images against themselves would have 0
    assert split_halves(Corners(), real[:13], ["kid"]) == {}


def test_the_fd_of_pixels_is_that_of_all_components_of_small_images():
    real = torch.rand(200, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    real[..., 1, 3] = 0.5  # seven components are all that there is
    moved = real.clone()
    moved[..., :3] *= 0.9
    wanted = Measures(torch.nn.Flatten(), real, ["fd"])(moved)["fd"]
    assert Measures(Corners(), real, ["pixel_fd"])(moved)["pixel_fd"] == pytest.approx(wanted, rel=1e-3)


def test_pixels_of_large_images_are_averaged_down():
    names = ["pixel_fd", "swd"]
    small = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    small = small.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 64 x 64
    large = small.repeat_interleave(3, 2).repeat_interleave(2, 3)
    one, other = (Measures(Corners(), each, names)(each.flip(2)) for each in (small, large))
    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("name", ["ot", "prdc", "sklearn", "torchmetrics"])
def test_a_missing_package_is_told_with_its_remedy(real, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"^{name} missing: pip install 'hsivi-diffusers\[evaluate\]'$"):
        Measures(Corners(), real)


def test_kid_takes_a_thousand_rows_of_its_kernel_at_a_time(monkeypatch):
    """The whole of two sets of 5,000 is 200 MB, several times over."""
    sizes, kernel = [], kid.poly_kernel

    def counted(rows, columns, gamma):
        sizes.append(len(rows))
        return kernel(rows, columns, gamma=gamma)

    monkeypatch.setattr(kid, "poly_kernel", counted)
    images = torch.rand(2500, 3, 2, 2)
    Measures(Corners(), images[:2400], ["kid"])(images)
    assert max(sizes) == 1000
    assert sum(sizes) == 2400 + 2500 + 2500


def test_kid_is_unbiased_for_sets_of_different_size(measures):
    """The formula, pair by pair."""
    images = torch.rand(9, 3, 6, 6)
    real, drawn = (Corners()(each).double().numpy() for each in (measures.real, images))

    scale = (real**2).sum(1).mean()

    def mean(pairs):
        return np.mean([(a @ b / scale + 1) ** 3 for a, b in pairs])

    same = [mean((a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j) for rows in (real, drawn)]
    wanted = sum(same) - 2 * mean((a, b) for a in real for b in drawn)
    assert measures(images)["kid"] == pytest.approx(wanted, rel=1e-4)


def test_precision_and_the_like_are_those_of_prdc(measures, real, capsys):
    images = real[:60].flip(3) ** 2
    wanted = compute_prdc(Corners()(real).numpy(), Corners()(images).numpy(), 5)
    capsys.readouterr()
    found = measures(images)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert capsys.readouterr().out == ""


def test_a_missing_class_is_seen(measures, real):
    found = measures(real[torch.arange(120) % 4 != 3])
    assert measures.shares == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert measures.real_shares == [0.25] * 4
    assert found["class_tv"] == pytest.approx(0.25)
    assert found["recall"] == found["coverage"] == 0.75
    assert found["precision"] == 1
    assert found["fd"] > 0.01
    assert found["kid"] > 0.001


def test_noise_raises_the_distances(measures, real):
    found = [measures((real + level * torch.randn(real.shape)).clamp(0, 1)) for level in (0.02, 0.1, 0.5)]
    for name in ("fd", "kid", "swd", "nearest"):
        values = [each[name] for each in found]
        assert values == sorted(values)
        assert values[2] > 2 * abs(values[0])
    for name in ("density", "coverage"):
        assert found[2][name] < 0.5 * found[0][name]


def test_the_order_of_images_and_calls_means_nothing_and_no_random_state_changes(measures, real):
    state = torch.get_rng_state()
    images = real.flip(3) ** 2
    found = measures(images)
    assert measures(images.roll(50, 0)) == pytest.approx(found, rel=1e-5)
    measures(1 - real)
    assert measures(images) == found
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_of_other_sizes_are_measured_too(measures, real):
    for count in (60, 7):
        found = measures(real[:count])
        assert all(math.isfinite(value) for value in found.values())
        assert (found["precision"], found["nearest"]) == (1, 0)


def test_nearest_is_relative_to_the_distances_between_real_images():
    """Real images on a line, 0.1 apart, the last of them twice as far: the median of their distances is 0.1."""
    levels = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])
    real = levels.reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    measures = Measures(Corners(), real)
    assert measures(real + 0.02)["nearest"] == pytest.approx(0.2, rel=1e-3)
    assert measures((real + 0.02)[:7].roll(3, 0))["nearest"] == pytest.approx(0.2, rel=1e-3)
    assert measures(torch.ones(7, 1, 2, 2))["nearest"] == pytest.approx(2, rel=1e-3)


def test_large_sets_are_measured_in_part(real, monkeypatch):
    for name in ("MOST", "MOST_COPIES"):
        monkeypatch.setattr(metrics, name, 50)
    measures = Measures(Corners(), real)
    assert measures.real_shares == [0.25] * 4
    found = measures(real)
    assert measures(real) == found
    assert (found["precision"], found["recall"], found["class_tv"], found["nearest"]) == (1, 1, 0, 0)
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert 0 < measures(real[60:])["swd"] < 0.2
    other = measures(torch.rand(80, 3, 6, 6))
    assert other["kid"] > 0.01
    assert other["nearest"] > 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        *(
            (torch.rand(*shape), r"have the shape .* give \(M, C, H, W\).* \(120, 3, 6, 6\)")
            for shape in ((10, 1, 6, 6), (10, 3, 6, 5), (3, 6, 6))
        ),
        (torch.rand(0, 3, 6, 6), "0 images are too few to be measured: give 7 or more"),
        (torch.rand(6, 3, 6, 6), "6 images are too few to be measured: give 7 or more"),
        (2 * torch.rand(9, 3, 6, 6) - 1, r"images are torch\.float32 from -.* to .*: give floats in \[0, 1\]"),
        (255 * torch.rand(9, 3, 6, 6), r"images are torch\.float32 from .* to .*: give floats in \[0, 1\]"),
        (torch.rand(9, 3, 6, 6) * torch.nan, r"images are torch\.float32 from nan to nan: give floats in \[0, 1\]"),
        (torch.zeros(9, 3, 6, 6, dtype=torch.uint8), r"images are torch\.uint8 from 0 to 0: give floats"),
    ],
)
def test_images_that_cannot_be_measured_are_refused(measures, images, message):
    with pytest.raises(ValueError, match=message):
        measures(images)


def test_a_reference_that_cannot_be_compared_to_is_refused(real):
    with pytest.raises(ValueError, match="6 images are too few"):
        Measures(Corners(), real[:6])
    with pytest.raises(ValueError, match="most of the real images are there twice: leave the copies out"):
        Measures(Corners(), torch.cat([real, real]))
