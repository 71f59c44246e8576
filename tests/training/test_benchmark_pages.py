"""`training/benchmarks/images/benchmark_pages.py`: tables and figures of rows made by hand."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from hsivi_diffusers.evaluation import pages
from training.benchmarks.images import benchmark_pages
from training.benchmarks.images.benchmark_pages import (
    costs,
    differences_table,
    floor_table,
    measures,
    summary_table,
    three_digits,
    write_pages,
)
from training.benchmarks.images.benchmark_results import (
    CONSISTENCY,
    OURS,
    PAIRS,
    PROGRESSIVE,
    REAL,
    SOLVER,
    TEACHER,
    UNGUIDED,
    Results,
    read_rows,
)
from training.benchmarks.images.spaces import OF_CLASSIFIER

ROOT = Path(__file__).parents[2]


def row(method, nfe, one, other, seed=None, **more):
    """A row with distances in two spaces, twice as large to the teacher's images."""
    distances = {"classifier": one, "pixels": other}
    measured = dict.fromkeys(OF_CLASSIFIER, 0.5) | {"num_samples": 20, "solver": "UniPC", "eval_seed": 0}
    return {
        **{"dataset": "digits", "method": method, "nfe": nfe, "train_seed": seed, "distances": distances},
        "teacher_distances": {space: 2 * distance for space, distance in distances.items()},
        **{"class_shares": [0.4, 0.6], "real_class_shares": [0.5, 0.5], "train_seconds": None, "train_calls": None},
        **measured,
        **more,
    }


def lines_of(table):
    """The cells of the lines of a table, without its heads."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# ----- summaries -----


def test_a_glance_at_all_sets_has_the_best_of_each_kind_in_their_first_space(tmp_path):
    rows = [
        row(SOLVER, 2, 3.0, 9.0),
        row(PAIRS, 1, 4.0, 1.0, 0),
        row(PROGRESSIVE, 1, 3.5, 2.0, 0),
        row(REAL, 0, 0.1, 0.1),
    ]
    rows += [row(OURS, 1, 1.0, 0.5, 0), row(OURS, 1, 2.0, 0.5, 1)]
    letters = [row(SOLVER, 2, 5.5, 9.0), row(SOLVER, 5, 7.0, 9.0), row(SOLVER, 8, 1.0, 1.0)]
    letters += [row(OURS, nfe, 6.0, 0.5, 0) for nfe in (1, 2, 5)]
    rows += [{**each, "dataset": "letters"} for each in letters]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "README.md").write_text("before\n<!-- table: glance -->\n<!-- end of table -->\nafter\n")
    benchmark_pages.fill_glance(tmp_path, tmp_path / "README.md")
    before, table, after = (tmp_path / "README.md").read_text().split("\n\n")
    assert (before.splitlines()[0], after.splitlines()[-1]) == ("before", "after")
    assert lines_of(table) == [
        ["digits", "**1.5 ± 0.71** (–, 3.5)", "", ""],
        ["letters", "6 (–, –)", "6 (**5.5**, –)", "6 (**5.5**, –)"],
    ]


# ----- the other tables -----


def test_the_summary_has_the_best_baseline_of_each_space():
    rows = [row(REAL, 0, 0.1, 0.01), row(TEACHER, 100, 0.2, 0.02), row(SOLVER, 1, 9.0, 0.9), row(SOLVER, 3, 4.0, 0.4)]
    rows += [row(PAIRS, 1, 3.0, 0.5, 0), row(PAIRS, 1, 2.0, 0.5, 1), row(PROGRESSIVE, 1, 4.0, 0.3, 0)]
    rows += [row(CONSISTENCY, 2, 1.5, 0.2, 0), row(OURS, 1, 1.0, 0.1, 0), row(OURS, 1, 2.0, 0.2, 1)]
    rows += [row(f"{OURS}, eta 0", 2, 0.1, 0.1, 0)]
    table = summary_table(rows)
    heads = [
        f"{space}: {word}" for space in ("classifier", "pixels") for word in ("tuned solver", "best baseline", OURS)
    ]
    assert [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")] == ["NFE", *heads]
    assert lines_of(table) == [
        ["1", "9", "2.5 ± 0.71 (pairs)", "**1.5 ± 0.71**", "0.9", "0.3 (progressive)", "**0.15 ± 0.071**"],
        ["3", "4", "", "", "0.4", "", ""],
    ]
    assert lines_of(floor_table(rows)) == [["real images", "0.1", "0.01"], ["teacher at 100", "0.2", "0.02"]]


def test_the_share_of_right_scenes_comes_first_and_the_highest_is_best():
    def right(method, share, seed=None):
        return row(method, 4, 1.0, 0.5, seed, right=share, diversity=3.0, class_shares=[])

    rows = [right(SOLVER, 0.3), right(UNGUIDED, 0.4), right(CONSISTENCY, 0.2, 0), right(OURS, 0.8, 0)]
    assert lines_of(summary_table(rows))[0][:5] == ["4", "0.3", "0.4 (unguided)", "**0.8**", "**1**"]
    assert floor_table([row(REAL, 0, 1.0, 0.5, right=0.99), *rows]).splitlines()[0].split("|")[2].strip() == "right"


def test_the_measures_have_both_kinds_of_distances_and_methods_in_one_order():
    rows = [row(method, 1, 1.0, 0.5, 0) for method in (f"{OURS}, eta 0", OURS, CONSISTENCY, PROGRESSIVE, PAIRS, SOLVER)]
    rows.append(row(SOLVER, 2, 1.0, 0.5, settings={"guidance_end": 200}))
    rows.append(row(SOLVER, 3, 1.0, 0.5, settings={"guided_steps": 1, "guidance_interval": [300, 600]}))
    rows += [row(TEACHER, 100, 2.0, 0.2), row(REAL, 0, 3.0, 0.3), row(PAIRS, 1, 3.0, 0.5, 1, recall=0.7)]
    table = measures(rows)
    heads = ["classifier", "pixels", "classifier, to teacher", "pixels, to teacher"]
    assert [*table][:8] == ["NFE", "method", *heads, "precision", "recall"]
    lines = table.values.tolist()
    assert [line[:2] for line in lines] == [
        *[["", REAL], [1, f"{SOLVER} (UniPC)"], [1, PAIRS], [1, PROGRESSIVE], [1, CONSISTENCY]],
        *[[1, OURS], [1, f"{OURS}, eta 0"]],
        *[[2, f"{SOLVER} (UniPC, falling guidance)"], [3, f"{SOLVER} (UniPC, guidance in an interval)"]],
        [100, TEACHER],
    ]
    assert lines[2][2:6] == ["2 ± 1.4", "0.5 ± 0", "4 ± 2.8", "1 ± 0"]
    assert lines[2][7] == "0.600 ± 0.141"
    shown = dict(zip(OF_CLASSIFIER, lines[0][6:], strict=True))  # of real images, which are copies of the reference
    assert {name for name, text in shown.items() if text} == {"class_tv"}


def test_a_solver_without_guidance_is_a_baseline_that_costs_nothing():
    rows = [
        row(SOLVER, 4, 9.0, 0.9),
        row(UNGUIDED, 4, 2.0, 0.7),
        row(CONSISTENCY, 4, 3.0, 0.5, 0),
        row(OURS, 4, 1.0, 0.8, 0),
    ]
    assert lines_of(summary_table(rows)) == [["4", "9", "2 (unguided)", "**1**", "0.9", "**0.5 (consistency)**", "0.8"]]
    assert f"{UNGUIDED} (UniPC)" in [*measures(rows).method]


def test_costs_are_told_seed_by_seed_and_as_multiples_of_those_of_ours():
    def trained(method, nfe, seed, seconds, calls):
        return row(method, nfe, 1.0, 0.1, seed, train_seconds=seconds, train_calls=calls)

    rows = [row(SOLVER, 1, 9.0, 0.9), trained(OURS, 1, 0, 100.4, 2_000_000), trained(OURS, 1, 1, 50.0, 2_000_000)]
    rows += [trained(PAIRS, 1, 1, 75.0, 3_000_000), trained(PAIRS, 1, 0, 100.4, 2_500_000)]
    rows += [trained(PROGRESSIVE, 2, 0, 80.0, 1_000_000)]  # ours of as many calls are missing
    assert costs(rows).values.tolist() == [
        [1, PAIRS, "75, 100", "1.50, 1.00", "3.00, 2.50", "1.50, 1.25"],
        [1, OURS, "100, 50", "", "2.00, 2.00", ""],
        [2, PROGRESSIVE, "80", "", "1.00", ""],
    ]
    assert costs([trained(OURS, 1, 0, 100.4, None)]).values.tolist() == [[1, OURS, "100", "", "", ""]]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((0.1234,), "0.123"), ((1953.4,), "1,950"), ((999.6,), "1,000"), ((1.5, 0.7071), "1.5 ± 0.71")],
)
def test_a_distance_has_three_digits_and_its_spread_two(numbers, text):
    assert three_digits(*numbers) == text


# ----- other noise -----


def on_noise(method, nfe, *distances, seed=None, first=101, **more):
    """Rows of a method on noise seeds from the first on."""
    return [row(method, nfe, each, each / 4, seed, eval_seed=first + i, **more) for i, each in enumerate(distances)]


def test_rows_of_several_noise_seeds_have_a_standard_error_of_both_kinds_of_seeds():
    """The teacher's variance over the noise is 2, that of ours 2 over the noise and 8 over the trainings."""
    rows = on_noise(TEACHER, 100, 1.0, 3.0) + on_noise(OURS, 1, 1.0, 3.0, seed=0) + on_noise(OURS, 1, 5.0, 7.0, seed=1)
    rows += on_noise(SOLVER, 1, 9.0, 9.0)
    assert lines_of(floor_table(rows)) == [["teacher at 100", "2 ± 1", "0.5 ± 0.25"]]
    assert lines_of(summary_table(rows)) == [["1", "9 ± 0", "", "**4 ± 2.2**", "2.25 ± 0", "", "**1 ± 0.56**"]]
    rows[3]["recall"] = 0.7
    assert [*measures(rows).recall] == ["0.500 ± 0.000", "0.550 ± 0.071", "0.500 ± 0.000"]
    assert benchmark_pages.make_tables(rows)["differences"] == differences_table(rows)
    assert lines_of(differences_table(rows)) == [
        ["1", f"**{OURS}** - {SOLVER} (UniPC) at 1", "-5 ± 2.2", "-1.25 ± 0.56"]
    ]


def test_a_curve_has_the_means_over_the_noise_for_each_training():
    rows = on_noise(OURS, 1, 1.0, 3.0, seed=0) + on_noise(OURS, 1, 5.0, 7.0, seed=1) + on_noise(SOLVER, 2, 1.0, 2.0)
    found = benchmark_pages.over_noise([{**each, **each["distances"]} for each in rows], ["classifier", "recall"])
    assert [(each["method"], each["nfe"], each["classifier"]) for each in found] == [
        *[(OURS, 1, 2.0), (OURS, 1, 6.0), (SOLVER, 2, 1.5)]
    ]
    assert {each["recall"] for each in found} == {0.5}


def test_a_difference_is_paired_by_the_noise_that_both_rows_have():
    ours, solver = on_noise(OURS, 4, 1.0, 2.0, 9.0, seed=0), on_noise(SOLVER, 4, 50.0, 4.0, 11.0, first=100)
    name = f"**{OURS}** - {SOLVER} (UniPC) at 4"
    assert lines_of(differences_table(ours + solver)) == [["4", name, "-6 ± 3", "-1.5 ± 0.75"]]  # 1 - 4 and 2 - 11
    assert lines_of(differences_table(ours + on_noise(SOLVER, 4, 1.0, first=900))) == [["4", name, "", ""]]


def test_ours_are_compared_with_solvers_of_up_to_twice_as_many_calls():
    rows = on_noise(OURS, 4, 1.0, 2.0, seed=0) + on_noise(REAL, 0, 0.5)
    for calls in (2, 4, 8, 10):
        rows += on_noise(SOLVER, calls, 4.0, 4.0)
    assert lines_of(differences_table(rows)) == [
        ["4", f"**{OURS}** - {SOLVER} (UniPC) at {calls}", "-2.5 ± 0.5", "-0.625 ± 0.12"] for calls in (4, 8)
    ]


# ----- the page -----


def test_a_figure_of_scenes_has_their_prompts_and_a_curve_of_the_right_ones(tmp_path, monkeypatch):
    drawn, curves = [], []
    monkeypatch.setattr(benchmark_pages, "draw_samples", lambda *given: drawn.append(given))
    monkeypatch.setattr(benchmark_pages, "draw_curves", lambda rows, labels, path, lines: curves.append(labels))
    rows = [row(method, 1, 1.0, 0.5, right=0.5, diversity=3.0, class_shares=[]) for method in (OURS, REAL)]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    results, images = Results(tmp_path, tmp_path / "runs", "digits"), torch.rand(2, 3, 8, 8)
    results.images_path.parent.mkdir(parents=True)
    results.keep_images(f"{OURS} at 1", images, images, ["a red apple above a cat on blue", "short"])
    write_pages(tmp_path, tmp_path / "runs")
    ((_, _, titles),) = drawn
    assert titles == ["a red\napple\nabove a\ncat on\nblue", "short"]
    assert [list(each) for each in curves] == [["right", "classifier", "pixels"]]
    lines = (tmp_path / "measures_digits.csv").read_text().splitlines()
    assert [line.count("0.500") for line in lines if REAL in line] == [len(OF_CLASSIFIER)]  # they are new ones


def test_each_set_has_a_page_of_all_tables_and_figures_of_what_is_measured_and_kept(tmp_path, monkeypatch):
    curves, draw_curves = [], benchmark_pages.draw_curves

    def draw(*given, lines):
        curves.append(given)
        draw_curves(*given, lines=lines)

    monkeypatch.setattr(benchmark_pages, "draw_curves", draw)
    rows = [row(REAL, 0, 0.1, 0.01), row(OURS, 1, 1.0, -0.1, 0), row(TEACHER, 100, 0.2, 0.02)]
    rows += [row(REAL, 0, 0.1, 0.01, dataset="begun"), row(SOLVER, 2, 0.1, 0.01, dataset="a solver.2")]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "digits.md").write_text("# By hand\n")
    results, images = Results(tmp_path, tmp_path / "runs", "digits"), torch.rand(3, 1, 8, 8)
    results.images_path.parent.mkdir(parents=True)
    figures = ["classes_digits.png", "curves_a_solver_2.png", "curves_digits.png"]
    before = None
    for name, more in ((f"{OURS} at 1", []), (f"{TEACHER} at 100", ["samples_digits.png"])):
        results.keep_images(name, images, images)
        write_pages(tmp_path, tmp_path / "runs")
        assert sorted(path.name for path in tmp_path.glob("*.png")) == [*figures, *more]
        texts = {page: (tmp_path / f"{page}.md").read_text() for page in ("digits", "begun", "a_solver_2")}
        for kind in ("measures", "costs"):
            for page, text in texts.items():
                assert (
                    text.count(f"[{kind}_{page}]({kind}_{page}.csv)") == (tmp_path / f"{kind}_{page}.csv").exists() == 1
                )
        for table in ("summary", "floor"):
            assert [text.count(f"<!-- table: {table} -->") for text in texts.values()] == [1, 1, 1]
        assert not any("differences" in text for text in texts.values())
        assert texts["digits"].startswith("# By hand\n")
        for figure in [*figures, *more]:
            assert f"({figure})" in texts["a_solver_2" if "solver" in figure else "digits"]
        assert ".png" not in texts["begun"]
        before = before or texts
    assert [before[page] == texts[page] for page in texts] == [False, True, True]
    (shown, labels, path), *_ = curves
    assert [(each["method"], each["classifier"]) for each in shown] == [(REAL, 0.1), (TEACHER, 0.2), (OURS, 1.0)]
    assert list(labels.values()) == ["distance, classifier", "distance, pixels"]
    assert path == tmp_path / "curves_digits.png"


def test_classes_are_those_of_the_teacher_the_baselines_and_ours(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    rows = [row(OURS, 1, 1.0, 0.1, seed, class_shares=[share, 1 - share]) for seed, share in enumerate((0.5, 0.3))]
    rows += [row(SOLVER, nfe, 1.0, 0.1) for nfe in (5, 10)] + [row(TEACHER, 100, 1.0, 0.1), row(REAL, 0, 1.0, 0.1)]
    benchmark_pages.draw_classes([*rows, row(PAIRS, 1, 1.0, 0.1, 0)], tmp_path / "classes.png")
    (figure,) = kept
    assert [axis.get_title() for axis in figure.axes] == [
        *["pairs only at 1", "teacher at 100", "tuned solver at 10", f"{OURS} at 1"]
    ]
    assert [bar.get_height() for bar in figure.axes[-1].patches] == pytest.approx([0.4, 0.6])
    monkeypatch.undo()
    plt.close(figure)


@pytest.mark.parametrize(("colors", "mode"), [(200, "P"), (20_000, "RGB")])
def test_a_figure_of_few_colours_gets_a_palette_and_looks_the_same(tmp_path, colors, mode):
    places = torch.arange(200 * 200) % colors
    pixels = torch.stack([places % 256, places // 256, 0 * places], 1).reshape(200, 200, 3).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "figure.png")
    benchmark_pages.shrink(tmp_path / "figure.png")
    figure = Image.open(tmp_path / "figure.png")
    assert figure.mode == mode
    assert (numpy.asarray(figure.convert("RGB")) == pixels).all()


def test_pictures_are_shown_in_order():
    white = torch.full((1,), 255, dtype=torch.uint8)
    names = ["real", f"{OURS} at 10", f"{OURS} at 2", f"{PAIRS} at 1"]
    names += [f"{SOLVER} at 4", f"{SOLVER} at 2", f"{TEACHER} at 9"]
    kept = dict.fromkeys(names, white)
    assert all(pictures == 1.0 for _, pictures in benchmark_pages.picture_rows(kept))
    assert [name for name, _ in benchmark_pages.picture_rows(kept)] == [*reversed(names[1:]), "real"]


@pytest.mark.parametrize(
    ("method", "nfe", "shown"),
    [(REAL, 0, False), (SOLVER, 4, True), (SOLVER, 5, False), (TEACHER, 100, True), (PAIRS, 1, True), (OURS, 5, True)],
)
def test_the_figure_of_samples_has_images_of(method, nfe, shown):
    assert benchmark_pages.is_shown(method, nfe) == shown


def test_the_tables_of_the_docs_are_those_of_the_results(tmp_path):
    docs = ROOT / "docs" / "benchmarks"
    for folder in (docs, docs / "kinds", docs / "text"):
        for name, rows in benchmark_pages.in_sets(read_rows(folder / "results.json")).items():
            page = (folder / f"{benchmark_pages.as_word(name)}.md").read_text(encoding="utf-8")
            assert pages.fill_tables(page, benchmark_pages.make_tables(rows)) == page
            for kind, text in benchmark_pages.make_files(rows).items():
                assert (folder / f"{kind}_{benchmark_pages.as_word(name)}.csv").read_text(encoding="utf-8") == text
    for page in (ROOT / "README.md", docs / "index.md"):
        filled = Path(shutil.copy(page, tmp_path))
        benchmark_pages.fill_glance(docs, filled)
        assert filled.read_bytes() == page.read_bytes()
