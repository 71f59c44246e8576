import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hsivi_diffusers.evaluation.pages import fill_tables
from hsivi_diffusers.vi import DivergenceError, GaussianMLP, Inference
from training.benchmarks.inference import fit_target as script
from training.benchmarks.inference import study, study_figures, study_tables, target_fit
from training.benchmarks.inference.benchmark_targets import load_reference
from training.benchmarks.inference.fit_target import Output, fit_one, write_pages
from training.benchmarks.inference.study import NULLS, read_study, run_job, run_study
from training.benchmarks.inference.study_figures import FIGURES, draw_fits, draw_marginals_figure
from training.benchmarks.inference.study_rows import NULL_LABELS, csv_of, frame_of
from training.benchmarks.inference.study_tables import TABLES
from training.benchmarks.inference.target_fit import Fit, prepare, score_network, width_of

STUDIES = sorted((Path(__file__).parents[2] / "training" / "configs").glob("study_*.yaml"))
DOCS = Path(__file__).parents[2] / "docs" / "inference"
TINY = Fit("ring", 2, "LB", "geometric", num_steps=20, batch_size=16, parameters=1000, depth=1)
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Measures of few draws are as good here, and quick."""
    monkeypatch.setattr(target_fit, "JS_DRAWS", 500)
    monkeypatch.setattr(study, "JS_DRAWS", 500)


@pytest.fixture
def quick_score_network(monkeypatch):
    monkeypatch.setattr(target_fit, "score_network", lambda name: score_network(name, 3))


@pytest.fixture
def inline_pool(monkeypatch):
    """Does the jobs of a study in a thread of this process, without a diagnosis, which takes long."""
    monkeypatch.setattr(Inference, "diagnose", lambda *given, **named: [])
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *given, **named: ThreadPoolExecutor(1))


# Reading


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_a_study_has_the_combinations_of_its_axes(path, quick):
    content = yaml.safe_load(path.read_text())
    axes = content["axes"] | {k: v for k, v in content["quick"].items() if quick and k in content["axes"]}
    jobs = read_study(path, quick)
    fits = [fit for _, method, fit in jobs if method not in NULLS]
    others = {name: len(values) for name, values in axes.items() if name not in ("num_layers", "bridges", "training")}
    each = torch.tensor(list(others.values())).prod()
    deep = sum(number > 1 for number in axes["num_layers"])
    ways = len(axes.get("bridges", [0])) * len(axes.get("training", [0]))
    assert len(fits) == each * (deep * ways + (1 in axes["num_layers"]))
    assert len(set(jobs)) == len(jobs)
    assert {fit.target for fit in fits} == set(axes["targets"])


def test_there_is_a_laplace_row_for_posteriors_alone():
    nulls = {(fit.target, method) for path in STUDIES for _, method, fit in read_study(path) if method in NULLS}
    assert ("rare_events", "laplace") in nulls
    assert ("ring", "laplace") not in nulls
    assert ("ring", "exact") in nulls


def test_settings_of_an_objective_or_a_target_go_before_those_of_all_and_quick_before_them(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "study: mine\nnulls: false\naxes: {targets: [ring, cross], objectives: [LB, KL], seeds: [0]}\n"
        "fit: {num_steps: 1}\nby_objective: {KL: {num_steps: 2}}\nby_target: {cross: {num_steps: 3}}\n"
        "quick: {num_steps: 4}\n"
    )
    steps = {(fit.target, fit.objective): fit.num_steps for _, _, fit in read_study(path)}
    assert steps == {("ring", "LB"): 1, ("ring", "KL"): 2, ("cross", "LB"): 3, ("cross", "KL"): 3}
    assert {fit.num_steps for _, _, fit in read_study(path, quick=True)} == {4}


# Running


def rows_in(path):
    return json.loads(path.read_text())["rows"]


def test_a_study_goes_on_where_it_stopped(tmp_path, inline_pool, monkeypatch):
    path = tmp_path / "results.json"
    jobs = [("mine", "HSIVI", replace(TINY, seed=seed)) for seed in range(3)]
    done = []
    monkeypatch.setattr(study, "run_job", lambda job: done.append(job) or run_job(job))
    run_study(jobs[:2], path, workers=1)
    first = path.read_text()
    run_study(jobs[:2], path, workers=1)
    assert path.read_text() == first
    run_study(jobs, path, workers=1)
    assert done == jobs
    assert [row["seed"] for row in rows_in(path)] == [0, 1, 2]
    assert rows_in(path)[:2] == json.loads(first)["rows"]


@pytest.mark.slow  # a process of its own imports everything; the other tests do the jobs here
def test_jobs_run_in_processes_of_their_own(tmp_path):
    path = tmp_path / "results.json"
    refused = replace(TINY, bridge="diffusion", whitening="laplace")
    run_study([("mine", "HSIVI", refused)], path, workers=1)
    (row,) = rows_in(path)
    assert (row["T"], "use --bridge geometric" in row["failed"]) == (2, True)


def test_an_error_stops_the_study_and_what_is_done_is_kept(tmp_path, inline_pool, monkeypatch):
    begun = []

    def work(job):
        begun.append(job[2].seed)
        if begun[-1] == 1:
            raise RuntimeError("no room")
        return run_job(job)

    monkeypatch.setattr(study, "run_job", work)
    monkeypatch.setattr(study, "as_completed", lambda futures: futures)
    path = tmp_path / "results.json"
    with pytest.raises(RuntimeError, match="no room"):
        run_study([("mine", "HSIVI", replace(TINY, seed=seed)) for seed in range(9)], path, workers=1)
    assert [row["seed"] for row in rows_in(path)] == [0]
    assert 8 not in begun


def test_a_row_tells_what_was_fitted_and_how_well():
    row = run_job(("mine", "HSIVI", TINY))
    said = {"study": "mine", "method": "HSIVI", "target": "ring", "T": 2, "objective": "LB", "parameters_wanted": 1000}
    assert row.items() >= said.items()
    assert row.keys() >= {"parameters", "seconds", "js", "swd", "mmd", "ksd", "mode_tv", "modes_found", "findings"}
    assert abs(row["parameters"] / 1000 - 1) < 0.15
    json.dumps(row)


@pytest.mark.parametrize("method", ["exact", "untrained", "gaussian"])
def test_rows_to_hold_fits_against_have_no_settings_of_a_fit(method):
    row = run_job(("mine", method, Fit(target="ring", num_steps=1)))
    assert row["method"] == method
    assert row["T"] is row["objective"] is row["bridge"] is None
    assert row["js"] >= 0
    assert "seconds" not in row


def test_the_time_of_a_fit_that_fails_counts(monkeypatch):
    now = [0.0]

    def diverge(self):
        now[0] += 5.0
        raise DivergenceError("the loss of the layers", 3, [0])

    monkeypatch.setattr(study.time, "process_time", lambda: now[0])
    monkeypatch.setattr(Inference, "steps", diverge)
    row = run_job(("mine", "HSIVI", TINY))
    assert row["failed"].startswith("the loss of the layers is not finite at step 3")
    assert row["seconds"] == 5.0


@settings(max_examples=60)
@given(
    parameters=st.integers(500, 100_000),
    depth=st.integers(1, 6),
    dimension=st.integers(1, 30),
    networks=st.integers(1, 10),
)
def test_networks_have_about_the_parameters_that_were_asked_for(parameters, depth, dimension, networks):
    width = width_of(Fit(parameters=parameters, depth=depth), dimension, networks)
    assert width >= 8
    assume(width > 8)
    network = GaussianMLP(dimension, width, depth)
    count = networks * sum(parameter.numel() for parameter in network.parameters())
    assert abs(count / parameters - 1) < 0.15


# One fit


def test_the_program_makes_one_fit_and_writes_its_files(tmp_path, capsys):
    options = [
        f"--{name}={getattr(TINY, name)}" for name in ("target", "num_layers", "bridge", "num_steps", "parameters")
    ]
    script.main([*options, f"--output_dir={tmp_path / 'fit'}"])
    names = {"report.json", "layers.safetensors", "draws.safetensors", "marginals.png"}
    assert {path.name for path in (tmp_path / "fit").iterdir()} == names
    report = json.loads((tmp_path / "fit" / "report.json").read_text())
    assert report["fit"]["target"] == "ring"
    assert report["agreement"]["js"] > 0
    assert load_file(tmp_path / "fit" / "draws.safetensors")["x"].shape == (10_000, 2)
    assert "report.json: js" in capsys.readouterr().out


def test_a_whitened_fit_draws_in_the_coordinates_of_its_target():
    fit = replace(TINY, target="rare_events", whitening="moments", whitening_rounds=1, whitening_steps=5)
    fitted = prepare(fit)
    z = fitted.inference.sample(100, seed=0)
    torch.testing.assert_close(fitted.sample(100, seed=0), fitted.unwhiten(z))
    assert not torch.allclose(fitted.unwhiten(z), z)


def test_the_program_does_studies(tmp_path, inline_pool, monkeypatch):
    monkeypatch.setattr(script, "FIGURES", {})  # they take most of the time
    path = tmp_path / "mine.yaml"
    path.write_text("study: plane\nnulls: false\naxes: {targets: [ring], seeds: [0]}\nfit: {num_steps: 5}\n")
    monkeypatch.setattr(script, "draw_fits", lambda *_: None, raising=False)
    script.main([f"--study={path}", f"--output_dir={tmp_path / 'pages'}", "--workers=1"])
    assert "| LB | diffusion | sequential | 0." in (tmp_path / "pages" / "study.md").read_text()
    script.main(["--pages_only=true", f"--output_dir={tmp_path / 'pages'}"])


def test_help_names_its_groups(check_help):
    check_help(script.main, "fit", "run", "study")


# Pages


def fitted_row(js, **changes):
    row = {"study": "plane", "method": "HSIVI", "target": "ring", "T": 2, "objective": "LB", "bridge": "geometric"}
    row |= {"training": "sequential", "seed": 0, "whitening": "none", "parameters": 30_100, "parameters_wanted": 30_000}
    row |= {"seconds": 12.5, "num_steps": 20, "depth": 3, "findings": [], "js": js, "swd": 0.1, "mmd": 1e-5, "ksd": 0.2}
    return row | {"modes_found": 8.0, "mode_tv": 0.05, "mode_max_error": 0.1} | changes


def failed_row(**changes):
    row = fitted_row(0.0, **changes)
    for name in ("js", "swd", "mmd", "ksd", "modes_found", "mode_tv", "mode_max_error", "findings", "parameters"):
        row.pop(name, None)
    return row | {"failed": "a loss | is\nnan"}


def null_row(method, js, **changes):
    return fitted_row(js, method=method, T=None, objective=None, bridge=None, training=None, whitening=None, **changes)


def posterior_row(error, **changes):
    row = {name: value for name, value in fitted_row(0.0).items() if name != "js" and not name.startswith("mode")}
    row |= {"study": "posteriors", "target": "rare_events", "whitening": "moments", "sd_ratio_min": 0.75}
    return (
        row | {"sd_ratio_max": 1.25, "mean_error": error, "mean_error_rms": error, "covariance_error": error} | changes
    )


def lines(rows, name):
    """The cells of a table of rows."""
    found = [line.strip("|").split("|") for line in TABLES[name](frame_of(rows)).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in found]


def test_a_cell_is_the_mean_with_the_range_over_seeds_that_differ():
    rows = [fitted_row(js, seed=seed) for seed, js in enumerate((0.1, 0.2, 0.36))]
    assert ["LB", "geometric", "sequential", "0.220 (0.100..0.360)"] in lines(rows, "ring")
    rows = [fitted_row(js, seed=seed) for seed, js in enumerate((0.19, 0.2, 0.21))]
    assert ["LB", "geometric", "sequential", "0.200"] in lines(rows, "ring")


def test_one_layer_is_shown_for_all_bridges_and_the_floor_comes_first():
    rows = [null_row("gaussian", 0.3), null_row("exact", 0.008), fitted_row(0.5, T=1, method="SIVI"), fitted_row(0.25)]
    table = lines(rows, "ring")
    assert [line[:2] for line in table[2:4]] == [["exact, the floor", "0.00800"], [NULL_LABELS["gaussian"], "0.300"]]
    assert ["LB", "geometric", "sequential", "0.500", "0.250"] in table
    assert ["LB", "diffusion", "joint", "0.500", "–"] in table


def test_fits_that_failed_are_counted():
    rows = [fitted_row(0.2), failed_row(seed=1), failed_row(seed=2)]
    assert "0.200, 2 of 3 failed" in [line[-1] for line in lines(rows, "ring")]
    assert "Not counted: 2 fits that failed." in TABLES["findings"](frame_of(rows))
    assert ["LB", "geometric", "sequential", "2 of 2 failed"] in lines(rows[1:], "ring")


def test_a_long_fit_has_a_line():
    rows = [fitted_row(0.2, study="long", findings=["lost_modes"]), failed_row(study="long", seed=1)]
    table = lines(rows, "long")
    assert table[2][:9] == ["ring", "LB", "geometric", "sequential", "2", "0", "lost_modes", "0.200", "0.100"]
    assert table[3][5:8] == ["1", "failed: a loss / is nan", "–"]
    assert len({len(line) for line in table}) == 1


def test_a_posterior_has_its_errors():
    rows = [null_row("laplace", 0.0, study="posteriors", target="rare_events", mean_error=0.5, covariance_error=0.6)]
    rows += [posterior_row(0.1), posterior_row(0.3, seed=1, sd_ratio_min=0.5)]
    rows.append(failed_row(study="posteriors", target="rare_events", whitening="moments", seed=2, seconds=99.0))
    table = lines(rows, "rare_events")
    assert table[2] == ["Laplace", "", "", "0.500", "–", "0.600", "–"]
    errors = ["0.200 (0.100..0.300), 1 of 3 failed", "0.500..1.25", "0.200 (0.100..0.300)"]
    assert table[3] == ["LB", "sequential", "2", *errors, "12.5"]  # seconds of those that ended


def test_whitening_by_moments_is_taken_from_the_posteriors():
    rows = [posterior_row(0.1), posterior_row(0.4, study="whitening", whitening="none"), posterior_row(0.9, T=5)]
    found = {line[3]: line[4] for line in lines(rows, "whitening")[2:]}
    assert found == {"none": "0.400", "moments": "0.100"}


def test_shapes_and_sizes_have_a_column_for_each_target_and_size():
    rows = [fitted_row(0.2, study="shapes", target=target, T=5) for target in ("cross", "banana")]
    rows += [fitted_row(0.1, study="size", parameters_wanted=size) for size in (5000, 30_000)]
    shapes = lines(rows, "shapes")
    assert shapes[0][4:] == ["banana", "cross"]
    assert ["LB", "geometric", "sequential", "5", "0.200", "0.200"] in shapes
    assert lines(rows, "size")[2] == ["LB", "2", "3", "0.100", "0.100"]


def test_the_winner_of_pairs_is_told_and_pairs_that_failed():
    rows = [fitted_row(0.3, seed=seed) for seed in range(3)]
    rows += [fitted_row(0.1, bridge="diffusion"), fitted_row(0.4, bridge="diffusion", seed=1)]
    rows += [failed_row(bridge="diffusion", seed=2), fitted_row(0.1, objective="KL", num_steps=7)]
    rows += [fitted_row(9.0, seed=5), fitted_row(9.0, seed=6, bridge="diffusion")]  # of no pair
    table = lines(rows, "winners")
    assert table[2] == ["geometric, diffusion", "JS", "2", "0.300", "0.250", "-0.0500", "0.833", "1 (50 %)", "0, 1"]
    assert table[3][:3] == ["LB, KL", "JS", "1"]


def test_the_summary_has_one_layer_and_layers_trained_together_on_one_bridge():
    rows = [null_row("exact", 0.01), fitted_row(0.5, T=1, method="SIVI")]
    rows += [fitted_row(0.9, T=3), fitted_row(0.8, T=3, bridge="diffusion")]
    rows += [fitted_row(0.3, T=3, bridge="diffusion", training="joint"), posterior_row(0.2, T=3, training="joint")]
    table = lines(rows, "summary")
    assert table[0] == ["objective", "T", "ring, JS", "rare_events, mean error"]
    assert table[2] == ["exact, the floor", "", "0.0100", "–"]
    assert table[3:5] == [["LB", "1", "0.500", "–"], ["LB", "3", "0.300", "0.200"]]


def test_signs_of_failure_are_held_against_the_truth():
    rows = [null_row("exact", 0.01), fitted_row(0.2, findings=["lost_modes"], modes_found=7.0)]
    rows += [fitted_row(0.3, seed=1), fitted_row(0.02, seed=2, findings=["critic_lag"])]
    found = {line[0]: line[1:] for line in lines(rows, "findings")}
    assert found["lost modes"] == ["1 of 2", "1 of 1", "0 of 1", "–", "–"]
    assert found["critic lag"] == ["0 of 2", "0 of 1", "1 of 1", "–", "–"]
    assert found["any of them"] == ["1 of 2", "1 of 1", "1 of 1", "–", "–"]


@pytest.mark.parametrize("rows", [[], [fitted_row(0.2), failed_row(seed=1)]])
def test_a_part_of_the_results_makes_a_page_of_what_there_is(rows, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    write_pages(tmp_path)
    text = (tmp_path / "study.md").read_text()
    heads, *fits = (tmp_path / "study.csv").read_text().splitlines()
    assert heads.startswith("study,method,T,")
    assert len(fits) == len(rows)
    for name in TABLES:
        assert f"<!-- table: {name} -->\n\n" in text
    assert "<!-- table: size -->\n\nNot run yet.\n\n<!-- end of table -->" in text
    for name in FIGURES:
        assert (tmp_path / name).read_bytes().startswith(PNG)
        assert f"]({name})" in text


def test_what_stands_between_the_markers_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FIGURES", {})
    (tmp_path / "results.json").write_text(json.dumps({"rows": [fitted_row(0.2)]}))
    (tmp_path / "study.md").write_text("# Mine\n\n<!-- table: ring -->\nold\n<!-- end of table -->\n\nprose\n")
    write_pages(tmp_path)
    before = (tmp_path / "study.md").read_text()
    assert before.startswith("# Mine\n\n<!-- table: ring -->\n\n| objective |")
    assert before.endswith("|\n\n<!-- end of table -->\n\nprose\n")
    assert "old" not in before
    write_pages(tmp_path)
    assert (tmp_path / "study.md").read_text() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.0500"), (9.996, "10.0"), (123.4, "123"), (12345, "12,300"), (-1e-5, "-1.00e-05"), (0, "0"), (1, "1.00")],
)
def test_numbers_have_three_digits(value, text):
    assert study_tables._number(value) == text


def test_the_page_in_the_docs_is_what_the_program_writes():
    page = (DOCS / "study.md").read_text()
    rows = frame_of(json.loads((DOCS / "results.json").read_text())["rows"])
    assert csv_of(rows) == (DOCS / "study.csv").read_text()
    assert fill_tables(page, {name: make(rows) for name, make in TABLES.items()}) == page


# Figures


@pytest.mark.parametrize(
    "fit", [TINY, replace(TINY, bridge="diffusion"), replace(TINY, target="banana", bridge="diffusion")]
)
def test_the_marginals_are_drawn(fit, tmp_path, quick_score_network):
    fitted = prepare(fit)
    assert (fit.target == "banana") == (getattr(fitted.inference.bridge, "network", None) is not None)
    draw_marginals_figure(fitted, tmp_path / "marginals.png")
    assert (tmp_path / "marginals.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["marginals.png"]


@pytest.mark.parametrize(("quick", "num_steps", "gallery"), [(True, 200, []), (False, 3000, ["shapes.png"])])
def test_fits_are_drawn(quick, num_steps, gallery, tmp_path, monkeypatch):
    done, marginals = [], []
    small = {"parameters": 1000, "depth": 1}
    monkeypatch.setattr(study_figures, "run", lambda fit: (done.append(fit) or prepare(replace(fit, **small)), 0.0))
    monkeypatch.setattr(study_figures, "draw_marginals_figure", lambda fitted, path: marginals.append(path))
    monkeypatch.setattr(study_figures, "MARGINALS", study_figures.MARGINALS[1:2])
    monkeypatch.setattr(study_figures, "PLANE", ("checkerboard", "ring"))
    draw_fits(tmp_path, quick)
    assert marginals == [tmp_path / "marginals_checkerboard_diffusion.png"]
    assert [path.name for path in tmp_path.iterdir()] == gallery
    assert {fit.num_steps for fit in done} == {num_steps}
    assert len(done) == 1 + len(gallery) * 3  # five layers on the checkerboard once


# Refusals

RING, END = "<!-- table: ring -->\n", "<!-- end of table -->\n"
STUDY = "study: mine\naxes: {targets: [ring], seeds: [0]"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda folder: read_study(folder / "steps.yaml"), "unknown key 'steps'; known are axes, by_objective"),
        (lambda folder: read_study(folder / "axis.yaml"), "unknown key 'layers'; known are bridges, depths"),
        (lambda folder: read_study(folder / "fit.yaml"), "unknown key 'rate'; known are base_std, batch_size"),
        (lambda folder: fit_one(TINY, Output(str(folder))), "is not empty"),
        (lambda folder: load_reference("ring", folder), "ring.safetensors is missing: make it with python"),
        (lambda _: prepare(replace(TINY, target="moon")), "no target is called 'moon': choose one of checkerb"),
        (lambda folder: prepare(replace(TINY, whitening="moments", whitening_rounds=0)), "give 1 or more"),
        (lambda folder: script.main(["--quick", "true"]), "--quick is for a --study"),
        (lambda _: fill_tables(RING.replace("ring", "rang") + END, {"ring": ""}), "no table 'rang': there are ring"),
        (lambda _: fill_tables(RING, {"ring": ""}), "1 tables begin and 0 end"),
        (lambda _: fill_tables(RING + RING + END, {"ring": ""}), "2 tables begin and 1 end"),
        (lambda folder: write_pages(folder), "results.json is missing: do a study first"),
        (
            lambda folder: run_study([("plane", "SIVI", Fit(num_layers=1, num_steps=1))], folder / "stale.json", 1),
            "holds 1 rows of plane with settings that are no longer asked for",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, act, message):
    for name, content in {"steps": "}\nsteps: 5", "axis": ", layers: [1]}", "fit": "}\nfit: {rate: 1}"}.items():
        (tmp_path / f"{name}.yaml").write_text(STUDY + content)
    stale = study._describe(("plane", "SIVI", Fit(num_layers=1, learning_rate=1.0)))
    (tmp_path / "stale.json").write_text(json.dumps({"rows": [stale]}))
    with pytest.raises(ValueError, match=message):
        act(tmp_path)
