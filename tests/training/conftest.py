"""Fixtures of the programs of a clone."""

import pytest

from training.benchmarks.images import train_baseline as train_program


@pytest.fixture(scope="session")
def train_baseline(teacher, tmp_path_factory):
    """Trains a baseline for 3 updates of 4 rows, by default a consistency model, and returns the output folder."""
    settings = [f"--pretrained_teacher_model={teacher}", "--max_train_steps=3", "--train_batch_size=4"]
    settings += ["--lr_warmup_steps=1"]

    def run(*arguments):
        folder = tmp_path_factory.mktemp("baseline") / "run"
        pairs = ["--num_pairs=10"] if "--method=regression" in arguments else []
        train_program.main([*settings, *pairs, f"--output_dir={folder}", *arguments])
        return folder

    return run


@pytest.fixture
def overwrite(tmp_path, monkeypatch):
    """Trains into a filled folder, refused before any work and then overwritten; returns the folder."""

    def check(train, module, first_work):
        (tmp_path / "precious").touch()
        with monkeypatch.context() as patched:
            patched.setattr(module, first_work, lambda *given: pytest.fail("work was begun"))
            with pytest.raises(ValueError, match="is not empty"):
                train(f"--output_dir={tmp_path}")
        train(f"--output_dir={tmp_path}", "--overwrite_output_dir")
        return tmp_path

    return check
