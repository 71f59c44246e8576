import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from hsivi_diffusers.evaluation.figures import draw_curves, draw_samples


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figure.png"


@pytest.fixture
def axes(monkeypatch):
    """Returns the axes of the figure that was drawn, before it is closed."""
    kept, close = [], plt.close
    monkeypatch.setattr(plt, "close", kept.append)
    yield lambda: kept[0].axes
    close("all")


def pixels(path, mode="RGB"):
    return np.asarray(Image.open(path).convert(mode)).astype(int)


def test_samples_are_drawn_row_by_row(path):
    black, white = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    draw_samples([("black", black), ("HSIVI at 5", white)], path)
    grey = pixels(path, "L")
    upper, lower = np.array_split(grey[:, grey.shape[1] // 4 :], 2)
    assert (upper < 30).mean() > 0.3
    assert (lower < 30).mean() < 0.1


@pytest.mark.parametrize("columns", [1, 3])
def test_figures_are_large_enough_to_be_seen_and_rows_of_one_length(path, columns):
    row = ("HSIVI at 1", torch.rand(columns, 1, 8, 8))
    draw_samples([row], path, ["class 0"] * columns)
    assert Image.open(path).width >= 512
    with pytest.raises(ValueError, match="argument 2"):
        draw_samples([row, ("b", torch.zeros(2, 1, 8, 8))], path)


def test_images_in_colour_stand_upright_under_their_titles(path, axes):
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0, :4] = images[:, 2, 4:] = 1  # red above blue
    draw_samples([("a", images)], path, ["one", "two"])
    red, blue = (np.flatnonzero((pixels(path) == colour).all(2).any(1)) for colour in ([255, 0, 0], [0, 0, 255]))
    assert red.max() < blue.min()
    assert len(red) == pytest.approx(len(blue), abs=2)
    (axis,) = axes()
    assert [text.get_text() for text in axis.get_xticklabels()] == ["one", "two"]
    assert axis.get_xticks().tolist() == [0.5, 1.5]


def test_the_curve_has_every_method_in_its_colour(path):
    rows = [{"method": f"{i}", "nfe": nfe, "fd": 10.0 * i + nfe} for i in range(1, 8) for nfe in (5, 10)]
    draw_curves(rows, {"fd": "FD"}, path)
    for place in range(7):
        wanted = [round(255 * part) for part in to_rgb(f"C{place}")]
        assert (pixels(path) == wanted).all(2).sum() > 20


def test_a_long_name_of_the_features_fits_and_the_ticks_are_the_calls_that_were_measured(path, axes):
    rows = [{"method": "DDIM", "nfe": nfe, "kid": 1.0 / nfe} for nfe in (4, 8, 50)]
    draw_curves(rows, {"kid": "KID x 1000, EfficientNet-Lite0 (ImageNet) features at 64x64"}, path)
    (axis,) = axes()
    for text in (axis.title, axis.yaxis.label):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= axis.figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= axis.figure.bbox.height
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["4", "8", "50"]


def test_of_a_name_that_is_no_measure_lower_is_better_and_the_number_is_drawn_as_it_is(path, axes):
    rows = [{"method": "HSIVI", "nfe": nfe, "pixels": 0.02 * nfe, "recall": 0.9} for nfe in (1, 2)]
    draw_curves(rows, {"pixels": "principal components", "recall": "recall"}, path)
    axis, other = axes()
    assert axis.get_title() == "principal components"
    assert [axis.get_ylabel(), other.get_ylabel()] == ["lower is better", "higher is better"]
    assert [axis.get_yscale(), other.get_yscale()] == ["log", "linear"]
    assert axis.lines[0].get_ydata().tolist() == [0.02, 0.04]


def test_a_curve_may_go_below_zero(path):
    draw_curves([{"method": "HSIVI", "nfe": nfe, "kid": 0.3 * (1.6 - nfe)} for nfe in (1, 2)], {"kid": "KID"}, path)
    found = pixels(path)
    wanted = [round(255 * part) for part in to_rgb("C0")]
    places = (np.abs(found - wanted).sum(2) < 20).nonzero()[1]
    assert places.min() < 0.3 * found.shape[1]
    assert places.max() > 0.8 * found.shape[1]


def test_lines_have_the_height_of_their_mean_and_no_place_among_the_calls(path, axes):
    rows = [{"method": "HSIVI", "nfe": nfe, "kid": 2.0 / nfe} for nfe in (1, 2)]
    rows += [{"method": "teacher", "nfe": 100, "kid": kid} for kid in (0.4, 0.6)]
    rows.append({"method": "floor", "nfe": 0, "kid": -0.1})
    draw_curves(rows, {"kid": "KID"}, path, lines=("floor", "teacher"))
    (axis,) = axes()
    heights = {line.get_label(): line.get_ydata()[0] for line in axis.lines if not line.get_label().startswith("_")}
    assert heights["teacher"] == 500
    assert np.isnan(heights["floor"])  # which a logarithmic axis has no place for
    assert axis.get_yscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2"]
