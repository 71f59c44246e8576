"""`training/benchmarks/images/tune_solvers.py` and its spaces."""

import json
from pathlib import Path

import optuna
import pytest
import torch

from hsivi_diffusers import load_teacher
from hsivi_diffusers.evaluation.solvers import make_solver, sample
from hsivi_diffusers.images import load_images
from training.benchmarks.images import benchmark_results, solver_pages, tune_solvers
from training.benchmarks.images.spaces import make_spaces

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def digits():
    images, labels = load_images("digits", 8, 1)
    return images.float() / 255, labels


@pytest.fixture(scope="module")
def spaces(digits):
    return make_spaces(ASSETS / "digits_classifier", *digits)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    parts = ["--dataset=digits", f"--teacher={ASSETS / 'digits_ddpm'}", f"--classifier={ASSETS / 'digits_classifier'}"]
    sizes = ["--solvers", "UniPC", "iPNDM", "--calls", "2", "--trials=10", "--tuning_samples=40", "--num_samples=30"]
    return [*parts, *sizes, f"--output_dir={folder / 'docs'}", f"--runs_dir={folder / 'runs'}"]


@pytest.fixture(scope="module")
def path(arguments):
    tune_solvers.main(arguments)
    return Path(arguments[-2].split("=")[1]) / "solvers.json"


def test_real_images_are_nearer_to_real_ones_than_noise_in_every_space(digits, spaces):
    real, _ = digits
    noise = torch.rand(900, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert [space.name for space in spaces] == ["classifier", "MLP", "pixels"]
    for space in spaces:
        assert space.distance(real) < 1e-3
        assert 0 < space.floor(500) < space.distance(noise) / 10
        assert space.floor(5000) < space.floor(500) / 3


def test_each_solver_has_a_row_that_is_as_good_as_its_stock_settings(path):
    rows = benchmark_results.read_rows(path)
    assert [(row["dataset"], row["calls"], row["solver"]) for row in rows] == [
        ("digits", 2, "UniPC"),
        ("digits", 2, "iPNDM"),
    ]
    for row in rows:
        assert row["trials"] == 10
        assert row["tuned"].keys() == row["stock"].keys() == row["floor"].keys()
        assert row["tuned"]["classifier"] < row["stock"]["classifier"]


def test_the_page_has_the_best_solver_of_each_count_and_all_of_them(path):
    rows, text = benchmark_results.read_rows(path), (path.parent / "solvers.md").read_text()
    best, every = text.split("<!-- table: all_solvers_digits -->")
    assert f"| 2 | {min(rows, key=lambda row: solver_pages.score(row['tuned']))['solver']} |" in best
    assert sum(f"| 2 | {row['solver']} |" in best for row in rows) == 1
    assert all(f"| 2 | {row['solver']} |" in every for row in rows)
    assert "|  | floor |" in best


def test_the_settings_of_a_row_make_the_solver_again(path, spaces):
    row = json.loads(path.read_text())["rows"][1]
    unet, schedule = load_teacher(str(ASSETS / "digits_ddpm"))
    unet.eval().to(memory_format=torch.channels_last)
    sampler = make_solver(row["solver"], row["calls"], unet, schedule.config, **row["settings"])
    images = torch.cat([*sample(sampler, row["num_samples"], 500, row["eval_seed"])])
    for space in spaces:
        assert space.distance(images) == pytest.approx(row["tuned"][space.name], rel=1e-4)


def test_rows_are_kept_and_trials_too(path, arguments, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(tune_solvers.Tuning, "measure", lambda *given, **settings: pytest.fail("measured again"))
    tune_solvers.main(arguments)
    assert path.read_bytes() == before
    study = optuna.load_study(
        study_name="digits, UniPC at 2",
        storage=tune_solvers.JournalStorage(
            tune_solvers.JournalFileBackend(arguments[-1].split("=")[1] + "/trials.log")
        ),
    )
    grids = [trial.params["grid"] for trial in study.trials]
    assert grids[:3] == ["leading", "trailing", "linspace"]
    assert grids[3:8] == ["power"] * 5


@pytest.mark.parametrize("solver", tune_solvers.CHOICES)
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_suggested_grid_descends_within_the_clock(solver, calls):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = 0
    for _ in range(20):
        try:
            settings = tune_solvers.suggest(study.ask(), solver, calls, 1000)
        except optuna.TrialPruned:
            continue
        if timesteps := settings.get("timesteps"):
            seen += 1
            assert len(timesteps) == calls
            assert timesteps == sorted(set(timesteps), reverse=True)
            assert 0 <= timesteps[-1] <= timesteps[0] < 1000
    assert seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--dataset, --teacher, --classifier missing: give --config"),
        (["--solvers", "Euler"], "--solvers Euler unknown: choose from DDIM"),
    ],
)
def test_bad_input_is_refused_before_work(arguments, given, message):
    with pytest.raises(ValueError, match=message):
        tune_solvers.main([*arguments[:3], *given] if given else given)
