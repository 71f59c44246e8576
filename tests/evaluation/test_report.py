import json
import math
from dataclasses import replace

import pytest
import torch

from hsivi_diffusers.evaluation.report import Report, load_run, pick
from hsivi_diffusers.runs.measures import REPORTED

RUN = {"teacher": "t", "seed": 3, "seconds": 2.0}


def measures(images):
    """A stand-in: every measure is the mean of the images."""
    return dict.fromkeys(REPORTED, images.mean().item())


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path, dict(RUN), "kid", "features", "digits", {})


def add(report, method, nfe, value, count=9):
    images = torch.full((count, 1, 8, 8), 0.5)
    images[:] = value
    report.add(method, nfe, "800, 200", images, measures, 1)
    return json.loads((report.output_dir / "report.json").read_text())["rows"]


def text_of(report):
    return (report.output_dir / "report.md").read_text()


def test_a_row_is_written_as_soon_as_it_is_measured(report):
    made = {"dataset": "digits", "method": "HSIVI", "nfe": 2, "grid": "800, 200", "train_seed": 3, "eval_seed": 1}
    (ours,) = add(report, "HSIVI", 2, 0.25)
    assert ours == {**made, "num_samples": 9, **dict.fromkeys(REPORTED, 0.25), "train_seconds": 2.0}
    assert [*ours][-1] == "train_seconds"
    assert "| 2 | **HSIVI** | 250.00 |" in text_of(report)
    first, other = add(report, "DDIM", 2, 0.5)
    assert first == ours
    assert (other["train_seed"], other["train_seconds"]) == (None, None)
    assert "| 2 | DDIM | 500.00 |" in text_of(report)


def test_images_that_are_not_finite_lose_no_row(report):
    add(report, "HSIVI", 2, 0.25)
    images = torch.full((9, 1, 8, 8), 0.5)
    images[2, 0, 0, 0], images[4] = math.nan, math.inf
    report.add("UniPC", 2, "800, 200", images, measures, 1)
    rows = add(report, "DDIM", 2, 0.5)
    assert [row.get("kid") for row in rows] == [0.25, 0.5, None]
    assert [row.get("not_finite") for row in rows] == [None, None, 2]
    lines = [line for line in text_of(report).splitlines() if line.startswith("| 2 |")]
    assert [line.split(" | ")[1].strip("*") for line in lines] == ["HSIVI", "DDIM", "UniPC"]  # the last, unmeasured
    assert "| 2 | UniPC | 2 images are not finite | - |" in lines[2]
    assert "best solver at as many calls: DDIM, 500.00" in report.closing_lines()
    report.draw(torch.rand(20, 1, 8, 8), None, None)
    assert (report.output_dir / "samples.png").is_file()
    assert (report.output_dir / "curve.png").is_file()


def test_a_student_whose_images_are_not_finite_is_reported_too(report):
    add(report, "HSIVI", 2, math.nan)
    add(report, "DDIM", 4, 0.5)
    assert "Result: KID x 1000 not finite at 2 network calls; with the most calls, 4: DDIM" in report.closing_lines()


@pytest.mark.parametrize(("other", "headline", "level"), [(1, "kid", False), (-1, "kid", True), (-1, "fd", False)])
def test_a_difference_within_its_error_names_no_winner(report, other, headline, level):
    """Of rows on the same noise, whose errors may be the same ones: the difference is 0.4, its error 0 or 0.6."""
    report = replace(report, headline=headline)
    add(report, "HSIVI", 2, 0.2)
    add(report, "DDIM", 2, 0.6)
    for row, sign in zip(report.rows, (1, other), strict=True):
        row |= {"kid_error": 0.3, "kid_folds": [row["kid"] + sign * 0.1, row["kid"] - sign * 0.1] * 5}
    report.write()
    assert ("| 2 | **HSIVI** | 200.00 ± 300.00 | 0.20 |" in text_of(report)) == (headline == "kid")
    closing = report.closing_lines().splitlines()[1]
    assert closing.endswith(", too close to tell apart by this many images") == level


def test_of_several_long_baselines_the_best_is_named(report):
    for method, nfe, value in (("HSIVI", 2, 0.3), ("DDIM", 4, 0.9), ("UniPC", 4, 0.1)):
        add(report, method, nfe, value)
    wanted = "KID x 1000 300.00 at 2 network calls; with the most calls, 4: UniPC, 100.00"
    assert wanted in report.closing_lines()


def test_each_number_of_calls_is_compared(report):
    for method, nfe, value in (("HSIVI", 4, 0.3), ("HSIVI", 1, 0.5), ("DDIM", 1, 0.9), ("UniPC", 8, 0.1)):
        add(report, method, nfe, value)
    wanted = (
        "Result: KID x 1000 500.00 at 1 network call; best solver at as many calls: DDIM, 900.00; KID x 1000 300.00 at "
        "4 network calls; with the most calls, 8: UniPC, 100.00"
    )
    assert wanted in report.closing_lines()


@pytest.mark.parametrize("value", [-0.0004, 0.1])
def test_a_kid_below_0_is_explained(report, value):
    add(report, "HSIVI", 2, 0.3)
    add(report, "DDPM", 4, value)
    text = "; KID is estimated without bias, so near the best it may fall below 0\n"
    assert (text in report.closing_lines()) == (value < 0)


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        ({"guidance_scale": 3.0}, ["Teacher and solvers use guidance, too"], ["decreased with noise"]),
        ({"guidance_scale": 3.0, "guidance_falls": True}, ["network calls. In training the guidance of HSIVI"], []),
        ({"guidance_scale": 3.0, "decay_guidance": True}, ["network calls. In training the guidance of HSIVI"], []),
        ({"guidance_scale": 3.0, "decay_guidance": False}, [], ["decreased with noise"]),
        ({"guidance_scale": 1.0, "decay_guidance": True}, [], ["guidance"]),
        ({"class_shares": [1.0, 0.0, 2.0, 0.0]}, ["Classes that the student was not trained on: 1, 3."], []),
    ],
)
def test_the_report_says_how_the_student_was_trained(report, settings, present, absent):
    report.training.update(settings)
    add(report, "HSIVI", 2, 0.5)
    text = text_of(report)
    assert all(each in text for each in present)
    assert not any(each in text for each in absent)


def test_the_reference_is_shown_class_by_class():
    images, labels = torch.arange(6.0).reshape(6, 1, 1, 1), torch.tensor([2, 2, 1, 0, 0, 1])
    assert pick(images, labels, 3, 5).flatten().tolist() == [3, 2, 0, 4, 5]
    assert pick(images, labels, 4, 4).flatten().tolist() == [0, 1, 3, 5]  # class 3 has no image
    assert pick(images, None, None, 3).flatten().tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pipeline", None, "lacks pipeline: give the folder of a finished run"),
        ("training.json", None, "finished run; this run has not ended: continue it by hsivi distil --output_dir "),
        ("options.json", "[]", None),
        ("training.json", '{"updates": 3', "training.json is damaged"),
        ("training.json", "{}", "training.json in .* is damaged: it lacks seconds"),
        ("pipeline/model_index.json", "[1]", "model_index.json is damaged"),
    ],
)
def test_a_run_that_is_unfinished_or_damaged_is_refused(tmp_path, name, content, message):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "options.json").write_text('{"pretrained_teacher_model": "t", "seed": 3}')
    (tmp_path / "training.json").write_text('{"seconds": 2.0}')
    assert load_run(tmp_path) == {"pretrained_teacher_model": "t", "seed": 3, "seconds": 2.0}
    if content is None:
        (tmp_path / name).rename(tmp_path / "gone")
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message or "damaged: it lacks pretrained_teacher_model, seed"):
        load_run(tmp_path)
