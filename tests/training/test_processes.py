"""Two processes equal one that accumulates two batches, bit for bit."""

import json

import pytest
from safetensors.torch import load_file

PROCESSES = {"processes": 2}
ACCUMULATION = {"gradient_accumulation_steps": 2}
KINDS = {"fast": {"preset": "fast"}, "paper": {"preset": "paper"}, "classes": {"max_grad_norm": 0.5}}


@pytest.fixture(scope="module")
def make(launch, class_teacher):
    """Does a run of a kind in processes of its own, or what is left of one."""

    def run(folder, kind, *flags, **options):
        teacher = {"pretrained_teacher_model": class_teacher} if kind == "classes" else {}
        statuses, text = launch(folder, *flags, **KINDS[kind], **teacher, **options)
        assert set(statuses) == {0}, text
        return folder

    return run


@pytest.fixture(scope="module")
def accumulated(make, tmp_path_factory):
    """One process with two batches an update, by kind of run."""
    folders = tmp_path_factory.mktemp("runs")
    return {kind: make(folders / kind, kind, **ACCUMULATION) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_two_accumulated_batches(make, accumulated, tmp_path, differences, kind):
    folder = make(tmp_path / "run", kind, **PROCESSES)
    assert differences(folder, accumulated[kind]) == []
    assert json.loads((folder / "training.json").read_text())["processes"] == 2
    chains = [load_file(folder / "checkpoints" / "checkpoint-5" / f"chains-{place}.safetensors") for place in (0, 1)]
    if kind != "paper":
        assert not chains[0]["x_next"].equal(chains[1]["x_next"])


def test_two_batches_an_update_are_not_one(fast_run, accumulated, differences):
    assert differences(fast_run, accumulated["fast"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [(PROCESSES, ACCUMULATION), (ACCUMULATION, PROCESSES)])
def test_a_run_resumes_with_its_batches_in_other_processes(
    launch, make, accumulated, tmp_path, differences, class_teacher, kind, first, second, monkeypatch
):
    folder = make(tmp_path / "run", kind, **first)
    for path in (folder / "checkpoints" / "checkpoint-5", folder / "pipeline"):
        path.rename(tmp_path / path.name)
    make(folder, kind, resume_from_checkpoint="latest", **second)
    assert differences(folder, accumulated[kind]) == []


@pytest.mark.parametrize("options", [{}, {"processes": 2, "gradient_accumulation_steps": 2}])
def test_another_number_of_batches_is_refused(launch, accumulated, tmp_path, options):
    number = 1 if not options else 4
    statuses, text = launch(
        tmp_path / "run",
        resume_from_checkpoint=accumulated["fast"] / "checkpoints" / "checkpoint-4",
        **KINDS["fast"],
        **options,
    )
    assert set(statuses) == {1}
    assert f"checkpoint-4 is of a run with 2 micro-batches an update, now there are {number}: choose" in text
