import math

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torchmetrics.image.kid import poly_mmd

from hsivi_diffusers.evaluation import metrics
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Distances, Measures

NAMES = {"fd", "kid", "precision", "recall", "density", "coverage", "swd", "class_tv", "nearest"}


class Corners(torch.nn.Module):
    """Means of the quarters of a picture; its class is the brightest quarter."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Identity()

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


@pytest.fixture(scope="module")
def real():
    """120 pictures, the brightest quarter of which is 0, 1, 2, 3, 0, ..."""
    generator = torch.Generator().manual_seed(0)
    pictures = 0.3 * torch.rand(120, 3, 6, 6, generator=generator)
    for i in range(4):
        pictures[i::4, :, 3 * (i // 2) :, 3 * (i % 2) :][:, :, :3, :3] += 0.6
    return pictures


@pytest.fixture(scope="module")
def measures(real):
    return Measures(Corners(), real)


def test_real_pictures_against_themselves(measures, real):
    found = measures(real)
    assert found.keys() == NAMES
    assert all(type(value) is float for value in found.values())
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert found["kid"] < 1e-6
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] == pytest.approx(1)
    assert (found["swd"], found["class_tv"], found["nearest"]) == (0, 0, 0)
    assert measures.shares == measures.real_shares == [0.25] * 4


def test_fd_and_swd_are_those_of_the_distances(measures, real):
    pictures = real[:50].flip(3) ** 2
    found, wanted = measures(pictures), Distances(Corners(), real)(pictures)
    assert found["fd"] == pytest.approx(wanted["fd"], rel=1e-5)
    assert found["swd"] == wanted["swd"]


def test_kid_is_that_of_torchmetrics_for_sets_of_one_size(measures, real):
    pictures = real.flip(3) ** 2
    features = [Corners()(images).double() for images in (real, pictures)]
    wanted = poly_mmd(*features, gamma=1 / features[0].square().sum(1).mean().item()).item()
    assert measures(pictures)["kid"] == pytest.approx(wanted, rel=1e-4)


def test_kid_is_unbiased_for_sets_of_different_size(measures):
    """The formula, pair by pair."""
    pictures = torch.rand(9, 3, 6, 6)
    real, drawn = (Corners()(images).double().numpy() for images in (measures.real, pictures))

    scale = (real**2).sum(1).mean()

    def mean(pairs):
        return np.mean([(a @ b / scale + 1) ** 3 for a, b in pairs])

    same = [mean((a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j) for rows in (real, drawn)]
    wanted = sum(same) - 2 * mean((a, b) for a in real for b in drawn)
    assert measures(pictures)["kid"] == pytest.approx(wanted, rel=1e-4)


def test_kid_does_not_depend_on_the_scale_of_the_features(measures, real):
    class Scaled(Corners):
        def forward(self, images):
            return 50 * super().forward(images)

    pictures = torch.rand(60, 3, 6, 6)
    assert Measures(Scaled(), real)(pictures)["kid"] == pytest.approx(measures(pictures)["kid"], rel=1e-4)


def test_precision_and_the_like_are_those_of_prdc(measures, real, capsys):
    pictures = real[:60].flip(3) ** 2
    wanted = compute_prdc(Corners()(real).numpy(), Corners()(pictures).numpy(), 5)
    capsys.readouterr()
    found = measures(pictures)
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


def test_the_order_of_the_pictures_means_nothing(measures, real):
    pictures = real.flip(3) ** 2
    assert measures(pictures[torch.randperm(120)]) == pytest.approx(measures(pictures), rel=1e-5)


def test_the_order_of_calls_means_nothing(measures, real):
    first = measures(real[:40])
    measures(1 - real)
    assert measures(real[:40]) == first


def test_sets_of_other_sizes_are_measured_too(measures, real):
    for count in (60, 7):
        found = measures(real[:count])
        assert all(math.isfinite(value) for value in found.values())
        assert found["precision"] == 1
        assert found["nearest"] == 0


def test_nearest_is_relative_to_the_distances_between_real_pictures():
    """Real pictures on a line, 0.1 apart, the last of them twice as far: the median of their distances is 0.1."""
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


def test_the_global_generator_is_left_alone(measures, real, monkeypatch):
    monkeypatch.setattr(metrics, "MOST", 50)
    state = torch.get_rng_state()
    Measures(Corners(), real)(real[:70])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_classifier_of_the_digits_sees_the_digits(extractor):
    """Of random weights: shapes and ranges only."""
    from hsivi_diffusers.evaluation.classifier import ImageClassifier

    digits = load_images("digits", 8, 1)[0][:600].float() / 255
    measures = Measures(ImageClassifier.from_pretrained(extractor).eval(), digits[:300])
    found = measures(digits[300:])
    assert found.keys() == NAMES
    assert len(measures.shares) == 10
    assert sum(measures.shares) == pytest.approx(1)
    assert 0.5 < found["nearest"] < 1.5


@pytest.mark.parametrize("shape", [(10, 1, 6, 6), (10, 3, 6, 5), (3, 6, 6)])
def test_pictures_of_another_shape_are_refused(measures, shape):
    with pytest.raises(ValueError, match=r"have the shape .* give \(M, C, H, W\).* \(120, 3, 6, 6\)"):
        measures(torch.rand(shape))


@pytest.mark.parametrize("count", [0, 1, 6])
def test_too_few_pictures_are_refused(measures, real, count):
    with pytest.raises(ValueError, match=f"{count} pictures are too few to be measured: give 7 or more"):
        measures(real[:count])
    with pytest.raises(ValueError, match="too few"):
        Measures(Corners(), real[:count])


@pytest.mark.parametrize("change", [lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x * torch.nan])
def test_pictures_on_another_range_are_refused(measures, real, change):
    with pytest.raises(ValueError, match=r"pictures are torch\.float32 from .* to .*: give floats in \[0, 1\]"):
        measures(change(real))


def test_pictures_of_bytes_are_refused(measures, real):
    with pytest.raises(ValueError, match=r"pictures are torch\.uint8 from 0 to 0: give floats"):
        measures(torch.zeros(real.shape, dtype=torch.uint8))


def test_real_pictures_that_are_there_twice_are_refused(real):
    with pytest.raises(ValueError, match="most of the real pictures are there twice: leave the copies out"):
        Measures(Corners(), torch.cat([real, real]))
