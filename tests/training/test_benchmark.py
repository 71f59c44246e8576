import importlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DEISMultistepScheduler
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline, cli
from hsivi_diffusers.distillation.checkpoints import Checkpoints
from hsivi_diffusers.evaluation import pages
from hsivi_diffusers.evaluation.solvers import make_student, sample
from hsivi_diffusers.folders import LOCK
from training.benchmarks.images import benchmark, benchmark_pages, benchmark_results, train_teacher

ROOT = Path(__file__).parents[2]
STUDENT = """
preset: fast
num_layers: [1, 2]
max_train_steps: 2
train_batch_size: 8
lr_warmup_steps: 1
checkpointing_steps: 1
"""
BASELINE = """
train_data: digits
train_batch_size: 8
lr_warmup_steps: 1
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A benchmark of the digits teacher that takes seconds."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "student.yaml").write_text(STUDENT)
    (folder / "baseline.yaml").write_text(BASELINE)
    return [
        *["--dataset=digits", f"--teacher={ROOT / 'assets/digits_ddpm'}"],
        *[f"--classifier={ROOT / 'assets/digits_classifier'}", f"--students={folder / 'student.yaml'}"],
        *[f"--baseline={folder / 'baseline.yaml'}", f"--baseline_of={folder / 'student.yaml'}", "--baseline_steps=1"],
        *["--seeds", "0", "1", "--solvers", "DDIM", "DEIS", "DDPM", "--solver_steps", "1", "2", "--ddpm_steps=3"],
        *["--num_samples=20", "--batch_size=15", f"--output_dir={folder / 'docs'}", f"--runs_dir={folder / 'runs'}"],
    ]


def call(program, given):
    """Runs a program in this process."""
    if program == benchmark.DISTIL:
        cli.distil(given)
    else:
        importlib.import_module(program).main(given)


@pytest.fixture(scope="module")
def folder(arguments):
    with pytest.MonkeyPatch.context() as patched:  # one process: each of its own would import everything again
        patched.setattr(benchmark, "_call", call)
        benchmark.main(arguments)
    return Path(next(text for text in arguments if text.startswith("--output_dir=")).split("=")[1]).parent


@pytest.fixture
def copied(folder, arguments, tmp_path):
    """A copy of the finished benchmark, and the arguments to go on in it."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", [text.replace(str(folder), str(tmp_path / "copy")) for text in arguments]


@pytest.fixture
def no_pages(monkeypatch):
    """Tables and figures take most of the time where nothing has to be sampled."""
    monkeypatch.setattr(benchmark, "write_pages", lambda folder: None)


def rows_of(folder):
    return benchmark_results.read_rows(folder / "docs" / "results.json")


def forget(folder, method):
    """Removes the rows of a method."""
    rows = [row for row in rows_of(folder) if row["method"] != method]
    (folder / "docs/results.json").write_text(json.dumps({"rows": rows}))


def test_every_method_and_seed_has_a_row_at_each_number_of_calls(folder):
    keys = [(row["method"], row["nfe"], row["train_seed"]) for row in rows_of(folder)]
    ours = [("HSIVI fast, one for all", nfe, seed) for seed in (0, 1) for nfe in (1, 2)]
    baseline = [("consistency distillation", 1, seed) for seed in (0, 1)]
    solvers = [(method, nfe, None) for nfe in (1, 2) for method in ("DDIM", "DEIS", "DDPM")]
    assert keys == [*ours, *baseline, *solvers, ("DDPM", 3, None)]


def test_a_row_has_all_measures_and_what_its_training_cost(folder):
    for row in rows_of(folder):
        assert row.keys() >= {*pages.MEASURES, "dataset", "eval_seed", "measured"} - {"teacher_tv"}
        assert sum(row["class_shares"]) == pytest.approx(1)
        assert sum(row["real_class_shares"]) == pytest.approx(1)
        assert (row["recipe"] is not None) == ("HSIVI" in row["method"])
        assert row["recipe"] is None or row["recipe"]["num_inference_steps"] == [1, 2]
        assert (row["num_samples"], row["batch_size"]) == (20, 15)
        trained = row["train_seed"] is not None
        assert (row["train_seconds"] is not None, row["train_calls"] is not None) == (trained, trained)


@pytest.mark.parametrize("forgotten", [["HSIVI fast, one for all"], []])
def test_the_baseline_is_given_the_seconds_of_the_student(copied, monkeypatch, forgotten):
    folder, arguments = copied
    seconds = json.loads((folder / "runs/digits/student_seed0/training.json").read_text())["seconds"]
    for method in ["consistency distillation", *forgotten]:
        forget(folder, method)
    shutil.rmtree(folder / "runs/digits/baseline_seed0")
    if not forgotten:  # the row tells, and the student may be gone
        shutil.rmtree(folder / "runs/digits/student_seed0")
    called = []

    def stop(program, given):
        called.append((program, given))
        raise SystemExit

    monkeypatch.setattr(benchmark, "_call", stop)
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    ((program, given),) = called
    assert program == "training.benchmarks.images.train_consistency"
    assert given[-2:] == ["--resume_from_checkpoint", "latest"]
    assert float(given[given.index("--max_train_seconds") + 1]) == seconds


def never(*_):
    raise AssertionError("it was trained again")


def test_ddpm_has_no_further_rows_where_it_is_not_among_the_solvers(copied, monkeypatch, no_pages):
    folder, arguments = copied
    forget(folder, "DDPM")
    monkeypatch.setattr(benchmark, "sample", lambda *given: pytest.fail("nothing is missing"))
    benchmark.main([*arguments, "--solvers", "DDIM", "DEIS"])
    assert all(row["method"] != "DDPM" for row in rows_of(folder))


def test_a_student_is_found_again(copied, monkeypatch, no_pages):
    folder, arguments = copied
    before = [row for row in rows_of(folder) if row["train_seed"] == 1 and "HSIVI" in row["method"]]
    forget(folder, "HSIVI fast, one for all")
    monkeypatch.setattr(benchmark, "_call", never)
    benchmark.main(arguments)
    again = [row for row in rows_of(folder) if row["train_seed"] == 1 and "HSIVI" in row["method"]]
    assert [row["fd"] for row in again] == [row["fd"] for row in before]


def test_nothing_is_trained_for_rows_that_are_there(copied, monkeypatch, no_pages):
    folder, arguments = copied
    shutil.rmtree(folder / "runs")
    monkeypatch.setattr(benchmark, "_call", never)
    before = rows_of(folder)
    benchmark.main(arguments)
    assert rows_of(folder) == before


def test_a_stopped_benchmark_measures_only_what_is_missing(copied, monkeypatch, no_pages):
    folder, arguments = copied
    lost = [row for row in rows_of(folder) if row["method"] == "DEIS"]
    forget(folder, "DEIS")
    drawn = []

    def recorded(sampler, *given):
        drawn.append((type(sampler.scheduler), sampler.num_steps))
        return sample(sampler, *given)

    monkeypatch.setattr(benchmark, "sample", recorded)
    benchmark.main(arguments)
    assert drawn == [(DEISMultistepScheduler, 1), (DEISMultistepScheduler, 2)]
    again = [row for row in rows_of(folder) if row["method"] == "DEIS"]
    assert [(row["fd"], row["swd"], row["kid"]) for row in again] == [
        (row["fd"], row["swd"], row["kid"]) for row in lost
    ]


@pytest.mark.parametrize("other", ["num_samples: 20 -> 25", "batch_size: 15 -> 10", "eval_seed: 0 -> 1"])
def test_rows_of_other_images_are_not_added_to(copied, other):
    folder, arguments = copied
    before = rows_of(folder)
    name, number = other.split(":")[0], other.split()[-1]
    with pytest.raises(ValueError, match=rf"results.json has HSIVI .* of other images \({other}\): name another"):
        benchmark.main([*arguments, f"--{name}={number}"])
    assert rows_of(folder) == before


def test_a_student_may_be_given_options_besides_its_config(copied, monkeypatch):
    folder, arguments = copied
    given = [text for text in arguments if not text.startswith("--students")]
    called = []

    def stop(program, given):
        called.append((program, given))
        raise SystemExit

    monkeypatch.setattr(benchmark, "_call", stop)
    student = f"{folder / 'student.yaml'} --num_layers 3 --noise_eta 0.5"
    with pytest.raises(SystemExit):
        benchmark.main([*given, "--students", student, f"--baseline_of={student}"])
    ((program, words),) = called
    assert (program, words[2:6]) == (benchmark.DISTIL, ["--num_layers", "3", "--noise_eta", "0.5"])
    assert words[words.index("--output_dir") + 1].endswith("digits/student_num_layers_3_noise_eta_0.5_seed0")


def test_a_baseline_of_none_of_the_students_is_refused(arguments):
    with pytest.raises(ValueError, match="--baseline_of other.yaml is not among --students: give one of them"):
        benchmark.main([*arguments, "--baseline_of=other.yaml"])


def test_a_student_of_other_options_is_refused(copied):
    folder, arguments = copied
    forget(folder, "HSIVI fast, one for all")
    (folder / "student.yaml").write_text(STUDENT + "learning_rate: 0.5\n")
    with pytest.raises(ValueError, match="was trained with other options.*learning_rate: .* -> 0.5.*--runs_dir"):
        benchmark.main(arguments)


def test_rows_of_a_student_of_other_options_are_not_added_to(copied):
    folder, arguments = copied
    (folder / "student.yaml").write_text(STUDENT + "learning_rate: 0.5\n")
    with pytest.raises(ValueError, match="one for all at 1, seed 0, of other .*learning_rate: .* -> 0.5.: remove"):
        benchmark.main(arguments)


def test_rows_tell_by_which_options_a_student_differed(copied):
    folder, arguments = copied
    rows = rows_of(folder)
    for each in rows[:4]:
        each["recipe"] = {**each["recipe"], "critic_updates": 3}
    (folder / "docs/results.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match="than --students have now .critic_updates: 3 -> 1.: remove that row"):
        benchmark.main(arguments)


def test_a_baseline_of_another_time_is_refused(copied):
    folder, arguments = copied
    forget(folder, "consistency distillation")
    path = folder / "runs/digits/baseline_seed0/training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_train_seconds": 1000.5}))
    with pytest.raises(ValueError, match="baseline_seed0 was given 1000.5 s, and the student that it is compared"):
        benchmark.main(arguments)


def test_an_unknown_solver_is_refused_before_any_training(arguments, monkeypatch):
    monkeypatch.setattr(benchmark, "_call", never)
    with pytest.raises(ValueError, match="method 'DPM' is unknown: choose one of 'DDPM', 'DDIM',"):
        benchmark.main([*arguments, "--solvers", "DPM", "DDIM"])


def test_a_student_that_cannot_be_trained_is_refused_before_any_training(copied, monkeypatch):
    folder, arguments = copied
    monkeypatch.setattr(benchmark, "_call", never)
    (folder / "last.yaml").write_text("num_layers: 4\nmax_train_steps: 0\n")
    given = [text for text in arguments if not text.startswith("--students")]
    with pytest.raises(ValueError, match="max_train_steps=0: give a number of at least 1"):
        benchmark.main([*given, "--students", str(folder / "student.yaml"), str(folder / "last.yaml")])


def test_two_students_of_the_same_rows_are_refused(copied):
    folder, arguments = copied
    (folder / "second.yaml").write_text(STUDENT)
    given = [text for text in arguments if not text.startswith("--students")]
    with pytest.raises(ValueError, match="have HSIVI fast, one for all at 1, HSIVI fast, one for all at 2 more than"):
        benchmark.main([*given, "--students", str(folder / "student.yaml"), str(folder / "second.yaml")])


def test_rows_and_parts_of_another_set_are_kept_and_added(copied):
    folder, arguments = copied
    rows = rows_of(folder)
    other = [{**row, "dataset": "other-set.2"} for row in rows]
    (folder / "docs/results.json").write_text(json.dumps({"rows": [*other, *rows]}))
    page = folder / "docs/index.md"
    page.write_text("# By hand\n\n" + page.read_text())
    benchmark.main(arguments)
    assert rows_of(folder) == [*other, *rows]
    text = page.read_text()
    assert text.startswith("# By hand")
    assert "| other-set.2 | HSIVI fast, one for all | 1 | FD" in text
    assert text.count("<!-- table: fd_digits -->") == text.count("<!-- table: fd_other_set_2 -->") == 1
    assert "(curves_other_set_2.png)" in text
    assert "(samples_other_set_2.png)" not in text


def test_the_page_has_tables_and_figures(folder):
    text = (folder / "docs/index.md").read_text()
    assert "| **HSIVI fast, one for all** |" in text
    for name in ("curves_digits.png", "samples_digits.png", "classes_digits.png"):
        assert f"({name})" in text
        assert (folder / "docs" / name).stat().st_size > 1000


def test_a_missing_teacher_without_a_config_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="is missing: give the config of training.benchmarks.images.train_teacher"):
        benchmark.main([*arguments, f"--teacher={tmp_path / 'none'}"])


def test_a_teacher_that_was_stopped_goes_on(tmp_path, monkeypatch):
    config = tmp_path / "teacher.yaml"
    config.write_text("block_out_channels: [8, 16]\nmax_train_steps: 3\ntrain_batch_size: 4\ncheckpointing_steps: 1\n")
    make = partial(benchmark._make, tmp_path / "teacher", "train_teacher.py", str(config), *benchmark.RESUME)
    saved, save = [], Checkpoints.save

    def stop_once(self, step, seconds):
        save(self, step, seconds)
        saved.append(step)
        if saved == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop_once)
    monkeypatch.setattr(benchmark, "_call", lambda program, given: train_teacher.main(given))
    with pytest.raises(KeyboardInterrupt):
        make()
    assert not (tmp_path / "teacher").exists()
    make()
    assert saved == [1, 2, 3]
    names = {path.name for path in (tmp_path / "teacher").iterdir()}
    assert names - {LOCK} == {"model_index.json", "options.json", "scheduler", "unet"}


def test_half_a_baseline_is_refused(arguments):
    given = [text for text in arguments if not text.startswith("--baseline_of")]
    for half in (given, [text for text in arguments if not text.startswith("--baseline=")]):
        with pytest.raises(ValueError, match="--baseline and --baseline_of go together"):
            benchmark.main(half)


def test_a_failed_training_ends_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("import sys\nassert sys.argv[1] == 'distil'\nsys.exit(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="failing distil --config none.yaml ended with status 2"):
        benchmark._call("failing distil", ["--config", "none.yaml"])


def row(method, nfe, fd, seed=None, **more):
    measured = {**dict.fromkeys(pages.MEASURES, 0.5), "fd": fd, "num_samples": 20, "train_seconds": None}
    return {"dataset": "digits", "method": method, "nfe": nfe, "train_seed": seed, **measured, **more}


def test_goals_hold_the_mean_of_the_seeds_against_the_best_solver_at_equal_calls():
    rows = [
        *(row("HSIVI fast", 5, fd, seed) for seed, fd in enumerate((0.5, 0.7))),
        *[row("UniPC", 5, 0.55), row("DDIM", 5, 0.65), row("UniPC", 15, 9.0), row("HSIVI paper", 5, 9.0, 0)],
    ]
    table = benchmark_pages.goals_table({"digits": rows}).splitlines()
    assert table[2:] == ["| digits | HSIVI fast | 5 | FD | 0.60 ± 0.14 | best stock solver at 5 | 0.55 | no |"]
    rows[0]["fd"] = 0.4
    assert benchmark_pages.goals_table({"digits": rows}).endswith("| 0.55 | yes |")


def test_the_summary_has_ours_the_baseline_and_the_best_solver_and_ddpm_at_many_calls():
    few = [row("HSIVI fast", 4, 0.5, 0), row("HSIVI fast", 4, 0.7, 1), row("DDIM", 4, 3.0), row("UniPC", 4, 2.0)]
    others = [row(benchmark_pages.BASELINE, 4, 4.0, 0), row("HSIVI paper", 4, 0.1, 0), row("HSIVI fast", 3, 0.1, 0)]
    many = [row("DDPM", 50, 0.5), row("DDPM", 100, 0.4), row("DDIM", 100, 0.3)]
    table = benchmark_pages.summary_table({"digits": [*few, *others, *many], "fashion": [row("UniPC", 4, 9.0)]})
    assert table.splitlines()[2:] == [
        "| 4 | **HSIVI fast** | 0.60 ± 0.14 |  |",
        f"| 4 | {benchmark_pages.BASELINE} | 4.00 |  |",
        "| 4 | best stock solver | 2.00 UniPC | 9.00 UniPC |",
        "| 50 | DDPM | 0.50 |  |",
        "| 100 | best stock solver | 0.30 DDIM |  |",
        "| 100 | DDPM | 0.40 |  |",
    ]


def test_the_tables_of_the_docs_are_those_of_the_results_and_the_readme_has_the_summary():
    docs = ROOT / "docs" / "benchmarks"
    page = (docs / "index.md").read_text(encoding="utf-8")
    rows = json.loads((docs / "results.json").read_text(encoding="utf-8"))["rows"]
    tables = benchmark_pages.make_tables(benchmark_pages.in_sets(rows))
    assert pages.fill_tables(page, tables) == page
    assert tables["summary"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_classes_are_held_against_those_of_the_teacher():
    rows = [
        *(row("HSIVI fast", 1, 1.0, seed, class_shares=[share, 1 - share]) for seed, share in enumerate((0.5, 0.3))),
        row("DDPM", 100, 1.0, class_shares=[0.7, 0.3]),
    ]
    rows = benchmark_pages.beside_teacher(rows)
    assert [each["teacher_tv"] for each in rows] == pytest.approx([0.2, 0.4, 0])
    goals = benchmark_pages.goals_table({"digits": rows})
    assert "| digits | HSIVI fast | 1 | TV to teacher | 0.300 ± 0.141 | 0.1 | 0.100 | no |" in goals
    assert "TV to teacher" in benchmark_pages.measures_table(rows)


def test_without_the_teacher_no_classes_are_held_against_its():
    rows = [{**row("HSIVI fast", 1, 1.0, 0), "class_shares": [1.0]}]
    del rows[0]["teacher_tv"]
    rows = benchmark_pages.beside_teacher(rows)
    assert "teacher_tv" not in rows[0]
    assert "TV to teacher" not in benchmark_pages.measures_table(rows) + benchmark_pages.goals_table({"digits": rows})


def test_a_mean_has_its_spread():
    assert pages.written("fd", 1.0, 3.0) == "2.00 ± 1.41"
    assert pages.written("kid", 0.0012) == "1.20"


def test_methods_have_the_same_order_whatever_was_measured_first():
    rows = [row(method, 4, 1.0) for method in ("UniPC", benchmark_pages.BASELINE, "HSIVI paper", "DDIM", "HSIVI fast")]
    names = [line.split("|")[1].strip(" *") for line in benchmark_pages.calls_table(rows).splitlines()[2:]]
    assert names == ["HSIVI fast", "HSIVI paper", "DDIM", "UniPC", benchmark_pages.BASELINE]
    rows = [row("DDIM", 2, 1.0), *(row(f"HSIVI fast{more}", 2, 1.0, 0) for more in (", one for all", ""))]
    goals = benchmark_pages.goals_table({"digits": rows}).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in goals] == ["HSIVI fast", "HSIVI fast, one for all"]


def test_pictures_of_what_is_shown_stay_beside_the_results(folder):
    """So the figures are drawn anew where nothing has to be sampled."""
    kept = load_file(folder / "docs" / "pictures_digits.safetensors")
    ours = "HSIVI fast, one for all at 2"
    assert set(kept) == {"real", ours, ours[:-1] + "1", f"{benchmark_pages.BASELINE} at 1"}
    student = make_student(HSIVIPipeline.from_pretrained(folder / "runs/digits/student_seed0/pipeline"), 2)
    drawn = torch.cat([*sample(student, 20, 15, 0)])[:16]
    torch.testing.assert_close(kept[ours] / 255, drawn, atol=0.51 / 255, rtol=0)


def test_pictures_are_shown_in_order():
    white = torch.full((1,), 255, dtype=torch.uint8)
    kept = dict.fromkeys(["real", "HSIVI fast at 10", "HSIVI fast at 2", "UniPC at 4", "DDIM at 4"], white)
    assert all(pictures == 1.0 for _, pictures in benchmark_pages.picture_rows(kept))
    assert [name for name, _ in benchmark_pages.picture_rows(kept)] == [
        *["UniPC at 4", "HSIVI fast at 2", "HSIVI fast at 10", "real"],
    ]
