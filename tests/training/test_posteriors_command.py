import csv
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from hsivi_diffusers.evaluation.pages import fill_tables
from training.benchmarks.inference import posteriors
from training.benchmarks.inference.posterior_methods import METHODS, QUICK, Fitted
from training.benchmarks.inference.posteriors import make_reference, make_rows, measure, table

TINY = replace(QUICK, draws=30, warmup=3, reference_draws=10, gaussian_steps=3, num_steps=3)
TWO = ["logistic_regression", "funnel"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished comparison of two models: to be read, not written to."""
    path = tmp_path_factory.mktemp("posteriors")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(posteriors, "QUICK", TINY)
        posteriors.main(["--models", *TWO, "--seeds", "0", "--quick", "true", f"--output_dir={path}"])
    return path


def read(folder):
    return json.loads((folder / "rows.json").read_text())["rows"]


def copy_of(folder, path):
    for name in ("rows.json", *(f"reference_{model}.safetensors" for model in TWO)):
        (path / name).write_bytes((folder / name).read_bytes())
    return path


def timeless(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_the_command_writes_rows_references_and_a_table(folder):
    rows = read(folder)
    expected = [(TWO[0], method) for method in METHODS] + [(TWO[1], method) for method in ["exact", *METHODS]]
    assert [(row["model"], row["method"]) for row in rows] == expected
    for row in rows:
        assert row["sd_ratio_min"] <= row["sd_ratio_max"]
        assert min(row["mean_error"], row["swd"], row["seconds"]) >= 0
        assert ("pareto_k" in row) == (row["method"] in ("mean_field", "full_rank", "hsivi"))
    with (folder / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["swd"]) for line in lines] == [row["swd"] for row in rows]
    page = (folder / "posteriors.md").read_text()
    assert [page.count(f"| {model.replace('_', ' ')} |") for model in TWO] == [4, 5]
    notes = json.loads((folder / "reference_logistic_regression.json").read_text())
    assert {"max_rhat", "min_ess", "divergences", "seconds"} == notes.keys()


def test_a_comparison_that_was_stopped_makes_the_rows_that_are_missing(folder, tmp_path, monkeypatch):
    results = json.loads((copy_of(folder, tmp_path) / "rows.json").read_text())
    lost = results["rows"].pop(1)
    (tmp_path / "rows.json").write_text(json.dumps(results))
    made = []
    monkeypatch.setattr(posteriors, "draw", lambda *given, draw=posteriors.draw: made.append(given[1]) or draw(*given))
    rows = make_rows(TWO, [0], TINY, tmp_path)
    assert made == [lost["method"]]
    assert timeless(rows[-1]) == timeless(lost)
    assert read(tmp_path) == rows
    assert make_rows(TWO, [0], TINY, tmp_path) == rows
    assert made == [lost["method"]]


def test_a_reference_is_made_once(folder, monkeypatch):
    monkeypatch.setattr(posteriors, "run_chain", lambda *given: pytest.fail("a chain was run"))
    model = posteriors.MODELS["logistic_regression"]()
    assert make_reference("logistic_regression", model, TINY, folder).shape == (20, 6)


def test_errors_are_those_of_a_known_shift_and_scale():
    reference = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 2.0, 0.5])
    reference = (reference - reference.mean(0)) / reference.std(0) * scale
    found = measure(reference * torch.tensor([1.0, 0.8, 1.5]) + torch.tensor([0.3, 0.0, 0.0]), reference)
    assert found["mean_error"] == pytest.approx(0.3, abs=1e-3)
    assert (found["sd_ratio_min"], found["sd_ratio_max"]) == pytest.approx((0.8, 1.5), rel=1e-3)
    shift = torch.tensor([0.6, 0.0, 0.0])
    assert measure(reference + shift, reference)["swd"] == pytest.approx(0.6 / 3**0.5, rel=0.15)


def test_a_fit_that_diverges_is_a_row_without_measures(folder, tmp_path, monkeypatch):
    nan = Fitted(torch.full((30, 10), torch.nan), {})
    monkeypatch.setattr(posteriors, "METHODS", {"hsivi": lambda *given: nan})
    copy_of(folder, tmp_path)
    row = make_rows(["funnel"], [1], TINY, tmp_path)[-1]
    assert row.keys() == {"model", "method", "seed", "seconds", "failed"}
    assert "300 of 300 numbers are not finite" in row["failed"]
    line = f"| funnel | HSIVI | 1 of 1 failed | – | – | – | {row['seconds']:.3g} |"
    assert table(pd.DataFrame([row], columns=posteriors.COLUMNS)).splitlines()[-1] == line


def test_the_page_in_the_docs_is_that_of_its_rows():
    folder = Path(__file__).parents[2] / "docs" / "inference" / "posteriors"
    rows = pd.DataFrame(read(folder), columns=posteriors.COLUMNS)
    page = (folder / "posteriors.md").read_text()
    assert fill_tables(page, {"posteriors": table(rows)}) == page
    assert (folder / "rows.csv").read_text() == rows.to_csv(index=False)
    assert len(rows) == 3 * sum(4 + (model().exact is not None) for model in posteriors.MODELS.values())


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (["nine_schools"], TINY, "no posterior is called 'nine_schools': choose of eight_schools_centred"),
        (["funnel"], QUICK, "was made with other settings: write to another --output_dir"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, models, settings, message):
    with pytest.raises(ValueError, match=message):
        make_rows(models, [0], settings, folder)


def test_it_has_a_help(check_help):
    check_help(posteriors.main, "comparison")
