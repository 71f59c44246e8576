"""The charts of the page of a run."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_diffusers.runs import curves
from hsivi_diffusers.runs.curves import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP

VALUES = st.floats(-1e37, 1e37) | st.floats(-3, 3) | st.floats(0, 1e-37)


def parse(figure):
    """The polylines as points, the texts of the axes, and the legend."""
    root = ElementTree.fromstring(figure)
    lines = [[tuple(map(float, xy.split(","))) for xy in line.get("points").split()] for line in root.iter("polyline")]
    return lines, [text.text for text in root.iter("text")], ["".join(item.itertext()) for item in root.iter("li")]


def test_the_first_charts_are_those_of_images_and_losses_then_those_of_callbacks_and_the_rest_is_further():
    log = [{"step": step, "mine": 1.0, "fid/small": 2.0, "learning_rate/student": 1e-4} for step in (1, 2)]
    log += [{"step": step, "loss/student": 2.0, "images/contrast": 1.0, "images/diversity": 1.0} for step in (3, 4)]
    main, further = curves.charts([*log, {"step": 4, "stopped": "grey"}, {"step": 4, "loss/critic": 1.0}])
    titles = [re.search("<figcaption>(.*?)<ul>", figure)[1] for figure in (*main, *further)]
    assert titles == [
        "Images, as ratios to the teacher's".replace("'", "&#x27;"),
        "Loss",
        "mine",
        "fid",
        "Learning rate",
    ]
    assert [parse(figure)[2] for figure in main[:2]] == [["contrast 1", "diversity 1"], ["student 2"]]


def test_points_are_where_their_values_belong_on_a_logarithmic_scale():
    log = [{"step": step, "loss/student": 10.0 / step, "loss/critic": 100.0} for step in (1, 2, 4)]
    lines, texts, legend = parse(curves.charts(log)[0][0])
    student, critic = lines
    assert [x for x, _ in student] == pytest.approx([LEFT + (RIGHT - LEFT) * step / 4 for step in (1, 2, 4)], abs=0.1)
    assert student[1][1] - student[0][1] == pytest.approx(student[2][1] - student[1][1], abs=0.2)  # twice halved
    assert len({y for _, y in critic}) == 1
    assert TOP < critic[0][1] < student[0][1] < student[2][1] < BOTTOM
    assert texts == ["10", "100", "updates", "0", "1", "2", "3", "4"] or {"10", "100", "updates", "0", "4"} <= set(
        texts
    )
    assert legend == ["student 2.5", "critic 100"]


def test_the_last_label_of_updates_is_whole():
    root = ElementTree.fromstring(curves.charts([{"step": step, "loss/student": 1.0} for step in (0, 10**6)])[0][0])
    (label,) = (text for text in root.iter("text") if text.text == "1,000,000")
    assert float(label.get("x")) + 9 * 7 / 2 <= curves.WIDTH  # nine letters, centred, of 7 units each


def test_the_usual_range_and_the_teachers_value_are_marked_beside_contrast_and_diversity():
    log = [{"step": step, "images/contrast": 0.5, "images/diversity": 2.0} for step in (0, 9)]
    root = ElementTree.fromstring(curves.charts(log)[0][0])
    (band,) = root.iter("rect")
    top, height = float(band.get("y")), float(band.get("height"))
    (contrast, *_), (diversity, *_) = parse(curves.charts(log)[0][0])[0]
    (one,) = (
        float(path.get("d").split()[1].split("H")[0]) for path in root.iter("path") if path.get("class") == "teacher"
    )
    assert diversity[1] < top < one < top + height < contrast[1]


@pytest.mark.parametrize("log", [[], [{"step": 3, "loss/student": 1.0}], [{"step": 1}, {"step": 2}]])
def test_one_value_is_no_curve(log):
    assert curves.charts(log) == ([], [])


def test_values_that_are_not_finite_have_no_point():
    values = [1.0, float("nan"), float("inf"), -1e38, 3.0]
    log = [{"step": step, "loss/student": value} for step, value in enumerate(values)]
    assert len(parse(curves.charts(log)[0][0])[0][0]) == 2


@pytest.mark.parametrize("number", [MOST_POINTS, MOST_POINTS + 1, 10 * MOST_POINTS - 3])
def test_a_long_curve_is_shown_by_means_and_ends_at_its_last_update(number):
    thin = curves.thin([(step, float(step % 2)) for step in range(number)])
    assert MOST_POINTS / 2 <= len(thin) <= MOST_POINTS
    assert thin[-1][0] == number - 1
    if number > 2 * MOST_POINTS:
        assert all(value == pytest.approx(0.5, abs=0.05) for _, value in thin[:-1])


@settings(max_examples=50)
@given(st.lists(VALUES, min_size=2, max_size=6), st.integers(1, 10**9))
def test_all_points_and_ticks_lie_in_the_chart(values, every):
    for name in ("loss/student", "images/contrast"):
        log = [{"step": every * step, name: value} for step, value in enumerate(values)]
        figure = curves.charts(log)[0][0]
        (line,), texts, _ = parse(figure)
        assert all(LEFT <= x <= RIGHT and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in line)
        assert len(texts) <= 16
        places = [float(text.get("y")) for text in ElementTree.fromstring(figure).iter("text")]
        assert all(TOP <= y <= curves.HEIGHT for y in places)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 400, [0, 100, 200, 300, 400]), (0.65, 1.52, [0.8, 1.0, 1.2, 1.4]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round(low, high, ticks):
    assert curves.linear_ticks(low, high) == pytest.approx(ticks)
