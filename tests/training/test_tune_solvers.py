"""`training/benchmarks/images/tune_solvers.py` and its spaces."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch

from hsivi_diffusers import HSIVIScheduler, load_teacher
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Measures, total_variation
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.solvers import SOLVERS, make_scheduler, make_solver, sample
from training.benchmarks.images import benchmark_results, solver_pages, tune_solvers
from training.benchmarks.images import spaces as spaces_module
from training.benchmarks.images.set_teacher import SetTeacher
from training.benchmarks.images.spaces import OF_CLASSIFIER, ClassMeasures, SetMeasures, Space, make_spaces

ASSETS = Path(__file__).parents[2] / "assets"
GUIDED = f"--teacher={ASSETS / 'digits_guided_ddpm'}"


@pytest.fixture(scope="module")
def digits():
    images, labels = load_images("digits", 8, 1)
    return images.float() / 255, labels


@pytest.fixture(scope="module")
def spaces(digits):
    return make_spaces(ASSETS / "digits_classifier", digits[0])


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
        drawn = [
            real[torch.randint(len(real), (size,), generator=torch.Generator().manual_seed(0))] for size in (500, 5000)
        ]
        assert 0 < space.distance(drawn[0]) < space.distance(noise) / 10
        assert space.distance(drawn[1]) < space.distance(drawn[0]) / 3


def test_a_space_beside_has_other_images_in_the_place_of_the_real_ones(digits, spaces):
    real, _ = digits
    dark = 0.5 * real
    for space in spaces:
        beside = space.beside(dark)
        assert (beside.name, beside.measure) == (space.name, space.measure)
        assert beside.distance(dark) < 1e-3 < space.distance(dark)
        assert beside.distance(real) == pytest.approx(space.distance(dark), rel=1e-3)  # FD is symmetric
        assert space.distance(real) < 1e-3  # which is as it was


def test_a_kid_is_told_by_a_thousand_and_of_at_most_so_many_images(digits, monkeypatch):
    real, _ = digits
    monkeypatch.setattr(spaces_module, "MOST", 150)
    network = torch.nn.Flatten()
    space = Space("pixels", "kid", Measures(network, real[:200], ["kid"]))
    assert space.distance(0.5 * real) == 1000 * Measures(network, real[:200], ["kid"])(0.5 * real)["kid"]
    assert len(space.beside(real).measures.real) == 150
    assert len(Space("pixels", "fd", Measures(network, real[:200], ["fd"])).beside(real).measures.real) == len(real)


def test_a_row_has_distances_to_real_images_and_to_those_of_the_teacher(digits, spaces):
    real, labels = digits
    converged = real[real.flatten(1).mean(1) > 0.3]
    measures = SetMeasures(ASSETS / "digits_classifier", real, labels, converged)
    found = measures(converged)
    assert found.keys() == {"distances", "teacher_distances", "class_shares", "real_class_shares", *OF_CLASSIFIER}
    assert found["distances"] == {space.name: pytest.approx(space.distance(converged)) for space in spaces}
    assert list(found["teacher_distances"]) == [space.name for space in spaces]
    assert max(found["teacher_distances"].values()) < 1e-3 < min(found["distances"].values())
    assert found["nearest"] == 0
    assert sum(found["class_shares"]) == pytest.approx(1)
    assert found["class_shares"] != found["real_class_shares"]
    assert measures(real)["class_shares"] == found["real_class_shares"]
    pair = found["class_shares"], found["real_class_shares"]
    assert found["class_tv"] == pytest.approx(total_variation(*pair))


def test_images_are_held_against_the_class_that_was_asked_for(digits):
    real, labels = (each[:600] for each in digits)
    measures = ClassMeasures(ImageClassifier.from_pretrained(ASSETS / "digits_classifier").eval(), real, labels)
    right, wrong = (measures(real, asked) for asked in (labels, (labels + 1) % 10))
    assert right["accuracy"] > 0.98
    assert wrong["accuracy"] < 0.02
    assert right["class_fd"] < 1e-3 < wrong["class_fd"]
    assert right["class_recall"] == 1 > wrong["class_recall"]
    half = labels >= 5
    (asked := labels.clone())[half] = (labels[half] + 1) % 10
    assert measures(real, asked)["accuracy"] == pytest.approx(
        (right["accuracy"] * (~half).sum() / len(half)).item(), abs=0.01
    )


def test_scenes_that_are_not_right_count_and_images_that_are_not_finite_are_the_worst():
    tuning = tune_solvers.Tuning.__new__(tune_solvers.Tuning)
    tuning.spaces, tuning.teacher, tuning.measures = [], SimpleNamespace(asked=torch.arange), SimpleNamespace()
    for right, wrong in ((0.75, 0.25), (1.0, 0.125)):  # half of one of four, so that a logarithm is finite
        tuning.measures.right = lambda images, asked, right=right: right if len(images) == len(asked) else None
        assert tuning.distances(torch.zeros(4, 3, 8, 8)) == {"wrong": wrong}
    assert tuning.distances(torch.full((4, 3, 8, 8), torch.nan)) == {"wrong": math.inf}
    tuning.measures = None
    assert tuning.distances(torch.zeros(4, 3, 8, 8)) == {}


def test_a_guided_step_takes_two_calls_and_other_guidance_starts_from_what_constant_guidance_has(
    arguments, tmp_path, monkeypatch
):
    guided = [GUIDED, "--guidance_scale=2", f"--output_dir={tmp_path}"]
    guided += [f"--runs_dir={tmp_path}", "--solvers", "iPNDM", "--trials=3", "--calls", "4"]
    tune_solvers.main([*arguments, *guided])
    tried, suggest = [], tune_solvers.suggest
    monkeypatch.setattr(tune_solvers, "suggest", lambda *given: tried.append(suggest(*given)) or tried[-1])
    tune_solvers.main([*arguments, *guided, "--guidance_falls=true"])
    before, now = benchmark_results.read_rows(tmp_path / "solvers.json")
    assert (before["dataset"], now["dataset"]) == ("digits", "digits falling")
    assert (before["calls"], len(before["settings"]["timesteps"])) == (4, 2)
    assert now["settings"].pop("guidance_end") in (200, 350, 500, 800)
    assert [each["timesteps"] for each in tried] == [pytest.approx(before["settings"]["timesteps"], abs=1)] * 3

    tune_solvers.main([*arguments, *guided, "--guidance_interval=true"])
    rows = benchmark_results.read_rows(tmp_path / "solvers.json")
    (now,) = (row for row in rows if row["dataset"] == "digits interval")
    assert [len(each["timesteps"]) for each in tried[3:]] == [2, 3, 3]
    assert tried[3]["timesteps"] == tried[0]["timesteps"]
    assert now["steps"] == len(now["settings"]["timesteps"]) == 4 - now["settings"]["guided_steps"]
    places = [each.split("=")[1] for each in (GUIDED, arguments[2])]
    tuning = tune_solvers.Tuning(tune_solvers.Options("digits", *places, guidance_scale=2, calls=[4]))
    images = tuning.draw("iPNDM", 4, 30, 0, **now["settings"])
    assert tuning.distances(images) == pytest.approx(now["tuned"], rel=1e-4)


def test_an_interval_ends_halfway_to_the_next_steps():
    times = [800.0, 500.0, 333.4, 100.0]
    found = [tune_solvers.interval_of(times, *steps, 1000) for steps in ((0, 4), (0, 1), (1, 2), (3, 1))]
    assert found == [(0, 1000), (650, 1000), (216.7, 650), (0, 216.7)]


def test_each_solver_has_a_row_that_is_as_good_as_its_stock_settings_and_the_page_the_best_and_the_floor(path):
    rows, text = benchmark_results.read_rows(path), (path.parent / "solvers.md").read_text()
    keys = [(row["dataset"], row["calls"], row["solver"]) for row in rows]
    assert keys == [("digits", 2, "UniPC"), ("digits", 2, "iPNDM")]
    for row in rows:
        assert row["trials"] == 10
        assert row["tuned"].keys() == row["stock"].keys() == row["floor"].keys()
        assert row["tuned"]["classifier"] < row["stock"]["classifier"]
    best = min(rows, key=lambda row: solver_pages.score(row["tuned"]))
    first, *_ = best["tuned"]
    assert f"| 2 | {best['solver']} | {best['tuned'][first]:.3g} / {best['stock'][first]:.3g} |" in text
    assert text.count("| 2 | ") == text.count("|  | floor |") == 1


def test_stock_settings_that_are_better_than_those_of_the_trials_are_kept(arguments, tmp_path, monkeypatch):
    def found_bad(self, solver, calls, trial):
        trial.set_user_attr("settings", {"timesteps": [30, 20]})
        return 0.0

    monkeypatch.setattr(tune_solvers.Tuning, "score", found_bad)
    solvers = ["DDIM", "DPM-Solver++ SDE", "UniPC"]
    places = [f"--output_dir={tmp_path / 'docs'}", f"--runs_dir={tmp_path / 'runs'}"]
    tune_solvers.main([*arguments, *places, "--trials=1", "--solvers", *solvers])
    rows = benchmark_results.read_rows(tmp_path / "docs/solvers.json")
    assert [(row["solver"], row["settings"]) for row in rows] == [(solver, SOLVERS[solver][1]) for solver in solvers]
    assert all(row["tuned"] == row["stock"] for row in rows)
    # Another set, which starts from grids alone.
    tune_solvers.main([*arguments, *places, "--trials=1", "--solvers", *solvers, "--dataset=other"])


def test_the_settings_of_a_row_make_the_solver_again(path, spaces):
    row = json.loads(path.read_text())["rows"][1]
    teacher, timesteps = load_teacher(ASSETS / "digits_ddpm"), row["settings"].pop("timesteps", None)
    teacher.network.eval().to(memory_format=torch.channels_last)
    sampler = make_solver(row["solver"], row["calls"], Guided(teacher), timesteps, **row["settings"])
    images = torch.cat([*sample(sampler, row["num_samples"], 500, row["eval_seed"])])
    for space in spaces:
        assert space.distance(images) == pytest.approx(row["tuned"][space.name], rel=1e-4)


def test_rows_are_kept_and_trials_too(path, arguments, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(tune_solvers.Tuning, "draw", lambda *given, **settings: pytest.fail("measured again"))
    tune_solvers.main(arguments)
    assert path.read_bytes() == before
    storage = tune_solvers.JournalStorage(tune_solvers.JournalFileBackend(arguments[-1].split("=")[1] + "/trials.log"))
    (name,) = (each for each in optuna.get_all_study_names(storage) if each.startswith("digits, UniPC at 2, "))
    assert name.endswith(
        f"{json.loads(before)['rows'][0]['networks']}, w=None"
    )  # the trials of another teacher are not of it
    study = optuna.load_study(study_name=name, storage=storage)
    grids = [trial.params["grid"] for trial in study.trials]
    assert grids[:3] == ["leading", "trailing", "linspace"]
    assert grids[3:8] == ["power"] * 5
    usual = {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
    assert all(usual.items() <= trial.params.items() for trial in study.trials[:8])


def test_a_set_starts_from_what_was_found_for_another(path, arguments, tmp_path):
    shutil.copytree(path.parent, tmp_path / "docs")
    places = [f"--output_dir={tmp_path / 'docs'}", f"--runs_dir={tmp_path / 'runs'}"]
    tune_solvers.main(
        [*arguments, *places, "--dataset=again", "--solvers", "UniPC", "--trials=1", "--mixed_precision=bf16"]
    )
    before, now = (
        row for row in benchmark_results.read_rows(tmp_path / "docs/solvers.json") if row["solver"] == "UniPC"
    )
    assert sorted([before["dataset"], now["dataset"]]) == ["again", "digits"]
    assert now["settings"].keys() == before["settings"].keys()
    assert now["settings"].get("timesteps", []) == pytest.approx(before["settings"].get("timesteps", []), abs=1)


def test_polish_that_moves_nothing_is_the_tuned_solver(digits):
    times = [700.0, 395.0, 159.0, 30.0]
    start, teacher = tune_solvers.Polish(times, 1000), SetTeacher(str(ASSETS / "digits_ddpm"), "digits")
    tuned = teacher.draw(teacher.solver("UniPC", 4, [700, 395, 159, 30]), 8, 8, 0)
    same = teacher.solver("UniPC", 4, **start.moved([0.0] * start.size))
    torch.testing.assert_close(teacher.draw(same, 8, 8, 0), tuned, atol=1e-4, rtol=0)
    for number in range(start.size):  # each of them does something
        other = teacher.solver("UniPC", 4, **start.moved([5.0 * (each == number) for each in range(start.size)]))
        assert (teacher.draw(other, 8, 8, 0) - tuned).abs().max() > 1e-3


def test_a_polished_solver_is_nearer_on_the_noise_of_the_trials_and_has_a_row_of_its_own(path, arguments, tmp_path):
    shutil.copytree(path.parent, tmp_path / "docs")
    sizes = ["--trials=40", "--tuning_samples=100", "--num_samples=100", "--eval_seed=9", "--polish=true"]
    polish = [*arguments, *sizes, f"--output_dir={tmp_path / 'docs'}"]
    tune_solvers.main(polish)
    tuned, _, row = benchmark_results.read_rows(tmp_path / "docs/solvers.json")
    assert (row["dataset"], row["solver"], row["calls"], row["trials"]) == ("digits polished", "UniPC", 2, 40)
    assert row["settings"].keys() == {*tuned["settings"], "timesteps", "polish"} - {"timestep_spacing"}
    assert solver_pages.score(row["tuned"]) < solver_pages.score(row["stock"])
    assert "told" in (tmp_path / "docs/solvers.md").read_text()
    # Another set, which starts from the rows of others, but not from those.
    more = ["--dataset=again", "--solvers", "UniPC", "--trials=1", f"--runs_dir={tmp_path / 'runs'}"]
    tune_solvers.main([*arguments, *more, f"--output_dir={tmp_path / 'docs'}"])
    with pytest.raises(ValueError, match="has no UniPC of digits at 3, where --polish begins: tune it first"):
        tune_solvers.main([*polish, "--calls", "3"])


def test_a_tuned_solver_that_is_better_than_what_polish_finds_is_kept(path, arguments, tmp_path, monkeypatch):
    shutil.copytree(path.parent, tmp_path / "docs")
    bad = SimpleNamespace(x=torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0, -40.0, 0.0]))
    monkeypatch.setattr(tune_solvers, "minimize", lambda *given, **options: bad)
    tune_solvers.main([*arguments, "--polish=true", f"--output_dir={tmp_path / 'docs'}"])
    *_, row = benchmark_results.read_rows(tmp_path / "docs/solvers.json")
    assert row["tuned"] == row["stock"]
    assert row["settings"]["polish"] == {
        "told": row["settings"]["timesteps"],
        **{"noise_scale": 1.0, "contrast": 1.0, "brightness": 0.0},
    }


@pytest.mark.parametrize("solver", tune_solvers.CHOICES)
def test_the_first_trials_have_the_defaults_of_diffusers(solver):
    usual = tune_solvers.usual(solver)
    stock = make_scheduler(solver, HSIVIScheduler())[0].config
    assert usual == {name: stock[name] for name in usual}
    more = {"final_sigmas_type"} if solver in tune_solvers.FINAL else set()
    assert usual.keys() == tune_solvers.CHOICES[solver].keys() | more
    study = optuna.create_study()
    study.enqueue_trial({**usual, "grid": "power", "start": 0.7, "end": 0.03, "power": 1.5})
    settings = tune_solvers.suggest(study.ask(), solver, 3, 1000)
    assert settings == {**usual, "timesteps": [700, 267, 30]}


@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize(
    ("solver", "grid"),
    [*((solver, "power") for solver in tune_solvers.CHOICES), ("UniPC", "trailing"), ("DDIM", "leading")],
)
def test_what_was_found_for_one_set_is_a_first_trial_of_another(solver, calls, grid):
    chosen = {name: kinds[-1] for name, kinds in tune_solvers.CHOICES[solver].items()}
    final = {"final_sigmas_type": "sigma_min"} if solver in tune_solvers.FINAL else {}
    study = optuna.create_study()
    study.enqueue_trial({**chosen, **final, "grid": grid, "start": 0.7, "end": 0.03, "power": 1.5})
    settings = tune_solvers.suggest(study.ask(), solver, calls, 1000)
    study.enqueue_trial(tune_solvers.as_trial(solver, {"algorithm_type": "of the class", **settings}, 1000))
    again = tune_solvers.suggest(study.ask(), solver, calls, 1000)
    timesteps = settings.pop("timesteps", [])
    assert again.pop("timesteps", []) == pytest.approx(timesteps, abs=1)
    assert again == settings
    assert timesteps == sorted({*timesteps}, reverse=True)
    assert len(timesteps) == (calls if grid == "power" else 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset=", "--teacher=", "--classifier="], "--dataset, --teacher, --classifier missing: give --config"),
        (["--solvers", "Euler"], "--solvers Euler unknown: choose from DDIM"),
        (["--guidance_falls=true"], "--guidance_falls true has no effect without a --guidance_scale other than 1"),
        (
            [GUIDED, "--guidance_scale=2", "--guidance_falls=true", "--guidance_interval=true"],
            "--guidance_falls true --guidance_interval true: give one of them",
        ),
        (
            [GUIDED, "--guidance_scale=2", "--guidance_interval=true", "--calls", "4", "2"],
            "--calls 2: one guided step has no other beside it, give 4 or more",
        ),
        ([GUIDED, "--guidance_scale=2", "--calls", "4", "3"], r"--calls \[3\]: a guided step is two network calls"),
        (
            ["--polish=true", f"--teacher={ASSETS / 'digits_flow'}"],
            "--polish true is for teachers of betas, not for rect",
        ),
        ([GUIDED, "--guidance_scale=2", "--polish=true", "--guidance_falls=true"], "--polish true goes with constant"),
        ([GUIDED, "--guidance_scale=1"], "has rows of digits of another teacher or classifier: name another --output"),
    ],
)
def test_bad_input_is_refused_before_work(path, arguments, monkeypatch, given, message):
    monkeypatch.setattr(tune_solvers.Tuning, "tune", lambda *given: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        tune_solvers.main([*arguments, *given])
