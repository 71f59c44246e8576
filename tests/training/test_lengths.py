"""`training/benchmarks/images/lengths.py`: students of several lengths, on noise of their own."""

import json
from pathlib import Path

import pytest

from short_run import call
from training.benchmarks.images import lengths, trainings
from training.benchmarks.images.benchmark_results import read_rows

ROOT = Path(__file__).parents[2]
STUDENT = "critic_updates: 1\ncritic_first: 0\nnum_pairs: 0\ntrain_batch_size: 8\nlr_warmup_steps: 1\n"
TEACHERS = ("teacher", "teacher, SDE")
TUNED = {"solver": "DDIM", "settings": {"timestep_spacing": "trailing"}, "tuned": {"pixels": 1.0}}
SOLVERS = [{"dataset": "digits", "calls": calls, **TUNED} for calls in (1, 2)]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "call", call)
    (tmp_path / "student.yaml").write_text(STUDENT)
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": SOLVERS}))
    return [
        *["--dataset=digits", f"--teacher={ROOT / 'assets/digits_ddpm'}", "--num_samples=24", "--batch_size=24"],
        *[f"--classifier={ROOT / 'assets/digits_classifier'}", f"--student={tmp_path / 'student.yaml'}"],
        *["--updates=2", "--factors", "0.5", "2", "--steps", "1", "2", "--noise_seeds", "101", "102"],
        *[f"--solvers={tmp_path / 'solvers.json'}", "--solver_steps=2"],
        *["--teacher_steps=2", f"--output_dir={tmp_path / 'docs'}", f"--runs_dir={tmp_path / 'runs'}"],
    ]


def test_each_length_is_trained_once_and_measured_on_each_noise_seed(arguments, tmp_path, monkeypatch):
    lengths.main([*arguments, "--seeds", "0"])
    rows = read_rows(tmp_path / "docs" / "lengths.json")
    of_students = [(row["method"], row["nfe"], row["eval_seed"]) for row in rows if row["train_seed"] == 0]
    wanted = [(f"{steps} step{'s' * (steps > 1)}", n, seed) for n in (1, 4) for steps in (1, 2) for seed in (101, 102)]
    assert of_students == wanted
    teacher, *free = dict.fromkeys(row["method"] for row in rows if row["train_seed"] is None)
    assert teacher in TEACHERS
    assert free == ["real images", "tuned solver at 2"]
    assert len({row["distances"]["classifier"] for row in rows}) == len(rows)
    page = (tmp_path / "docs" / "digits.md").read_text()
    assert [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| 2 steps")] == [
        ["| 2 steps", str(updates), "1"] for updates in (1, 4)
    ]
    assert f"classifier, to {teacher}" in page
    assert (tmp_path / "docs" / "digits_teacher.png").is_file()
    monkeypatch.setattr(trainings, "call", lambda *given: pytest.fail("it was trained again"))
    monkeypatch.setattr(lengths.Study, "_draw", lambda *given: pytest.fail("it was drawn again"))
    lengths.main([*arguments, "--seeds", "0"])
    assert read_rows(tmp_path / "docs" / "lengths.json") == rows
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": SOLVERS}).replace("trailing", "leading"))
    with pytest.raises(ValueError, match="has tuned solver at 2 at 0 of other settings than --solvers"):
        lengths.main([*arguments, "--seeds", "0"])
    with pytest.raises(ValueError, match=r"--solver_steps has \[3\], and .* has solvers of digits at \[1, 2\]: tune"):
        lengths.main([*arguments, "--seeds", "0", "--solver_steps", "2", "3"])
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": SOLVERS}))
    with pytest.raises(ValueError, match="of other images or networks"):
        lengths.main([*arguments, "--seeds", "0", "--num_samples=25"])
    (tmp_path / "student.yaml").write_text(STUDENT.replace("train_batch_size: 8", "train_batch_size: 9"))
    with pytest.raises(ValueError, match="of other options than --students have now .train_batch_size: 8 -> 9"):
        lengths.main([*arguments, "--seeds", "0"])


def test_the_reference_are_images_of_the_nearer_sampler_and_a_killed_study_goes_on(arguments, tmp_path, monkeypatch):
    drawn, made, draw = [], lengths.Study._row, lengths.Study._draw

    class Study(lengths.Study):
        def _score(self, sampler):
            return [*self.samplers.values()][::-1].index(sampler)

        def _draw(self, sampler, seed):
            drawn.append(seed)
            return super()._draw(sampler, seed)

        def _row(self, entry, seed, images):
            if entry.nfe == 1:
                raise KeyboardInterrupt
            reference = self.samplers[TEACHERS[1]]
            again = made(self, entry, seed, draw(self, reference, lengths.REFERENCE))
            assert all(abs(distance) < 1e-3 for distance in again["teacher_distances"].values())
            return made(self, entry, seed, images)

    with monkeypatch.context() as patched:
        patched.setattr(lengths, "Study", Study)
        with pytest.raises(KeyboardInterrupt):
            lengths.main([*arguments, "--seeds", "0"])
    rows = read_rows(tmp_path / "docs" / "lengths.json")
    measured = [(row["method"], row["eval_seed"]) for row in rows]
    methods = (TEACHERS[1], "real images", "tuned solver at 2")
    assert measured == [(method, seed) for method in methods for seed in (101, 102)]
    assert drawn == [lengths.REFERENCE, 101, 102, 101, 102, 101, 102, 101]
    lengths.main([*arguments, "--seeds", "0"])
    assert read_rows(tmp_path / "docs" / "lengths.json")[: len(rows)] == rows


def test_the_pages_in_the_docs_are_those_of_their_rows(tmp_path):
    docs = ROOT / "docs" / "benchmarks" / "lengths"
    for name in ("lengths.json", "digits.md"):
        (tmp_path / name).write_text((docs / name).read_text())
    lengths.write_pages(tmp_path)
    assert (tmp_path / "digits.md").read_text() == (docs / "digits.md").read_text()


def test_noise_that_was_chosen_on_is_refused(arguments):
    with pytest.raises(ValueError, match=r"--noise_seeds \[100, 101\]: give numbers above 100"):
        lengths.main([*arguments, "--noise_seeds", "100", "101"])
    with pytest.raises(ValueError, match=r"--factors \[0.1\]: give such as make one update or more of --updates 2"):
        lengths.main([*arguments, "--factors", "0.1", "1"])
    with pytest.raises(ValueError, match="--dataset, --teacher, --classifier, --student missing: give --config"):
        lengths.main([])
