"""`training/benchmarks/images/lengths.py`: students of several lengths, on noise of their own."""

from pathlib import Path

import pytest

from short_run import call
from training.benchmarks.images import lengths, trainings
from training.benchmarks.images.benchmark_results import REAL, read_rows

ROOT = Path(__file__).parents[2]
STUDENT = "critic_updates: 1\ncritic_first: 0\nnum_pairs: 0\ntrain_batch_size: 8\nlr_warmup_steps: 1\n"
TEACHERS = ("teacher", "teacher, SDE")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "call", call)
    (tmp_path / "student.yaml").write_text(STUDENT)
    return [
        *["--dataset=digits", f"--teacher={ROOT / 'assets/digits_ddpm'}", "--num_samples=24", "--batch_size=24"],
        *[f"--classifier={ROOT / 'assets/digits_classifier'}", f"--student={tmp_path / 'student.yaml'}"],
        *["--updates=2", "--factors", "0.5", "2", "--steps", "1", "2", "--noise_seeds", "101", "102"],
        *["--teacher_steps=2", f"--output_dir={tmp_path / 'docs'}", f"--runs_dir={tmp_path / 'runs'}"],
    ]


def test_each_length_is_trained_once_and_measured_on_each_noise_seed(arguments, tmp_path, monkeypatch):
    lengths.main([*arguments, "--seeds", "0"])
    rows = read_rows(tmp_path / "docs" / "lengths.json")
    of_students = [(row["method"], row["nfe"], row["eval_seed"]) for row in rows if row["train_seed"] == 0]
    wanted = [(f"{steps} step{'s' * (steps > 1)}", n, seed) for n in (1, 4) for steps in (1, 2) for seed in (101, 102)]
    assert of_students == wanted
    others = [row["method"] for row in rows if row["train_seed"] is None]
    assert others[:2] == [REAL, REAL]
    assert others[2] == others[3] in TEACHERS
    assert len({row["distances"]["classifier"] for row in rows}) == len(rows)
    page = (tmp_path / "docs" / "digits.md").read_text()
    assert [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| 2 steps")] == [
        ["| 2 steps", str(updates), "1"] for updates in (1, 4)
    ]
    assert (tmp_path / "docs" / "digits_teacher.png").is_file()
    monkeypatch.setattr(trainings, "call", lambda *given: pytest.fail("it was trained again"))
    lengths.main([*arguments, "--seeds", "0"])
    assert read_rows(tmp_path / "docs" / "lengths.json") == rows


def test_noise_that_was_chosen_on_is_refused(arguments):
    with pytest.raises(ValueError, match=r"--noise_seeds \[100, 101\]: give numbers above 100"):
        lengths.main([*arguments, "--noise_seeds", "100", "101"])
    with pytest.raises(ValueError, match="--dataset, --teacher, --classifier, --student missing: give --config"):
        lengths.main([])
