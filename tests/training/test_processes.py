"""Two processes equal one that accumulates two batches, bit for bit."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tiny_text import PROMPTS

PROCESSES = {"processes": 2, "gradient_accumulation_steps": 1}
ACCUMULATION = {"gradient_accumulation_steps": 2}
KINDS = {
    "fast": {"preset": "fast"},
    "paper": {"preset": "paper", "max_train_steps": 3, "critic_updates": 1},
    "classes": {"max_grad_norm": 0.5, "max_train_steps": 3, "critic_updates": 1},
    "guided": {"guidance_scale": (1.0, 3.0), "max_train_steps": 3, "critic_updates": 1},
    "flow": {"max_train_steps": 3, "critic_updates": 1, "noise_eta": 0.0},
    "dit": {"guidance_scale": 3.0, "max_train_steps": 3, "critic_updates": 1},
    "text": {"guidance_scale": 3.0, "max_train_steps": 3, "critic_updates": 1, "lora_rank": 4},
}


@pytest.fixture(scope="module")
def make(launch, distil, class_teacher, flow_teacher, dit_teacher, text_teachers, tmp_path_factory):
    """Does a run of a kind, or what is left of one: several processes of their own, or batches in this one."""

    teachers = {"classes": class_teacher, "guided": class_teacher, "flow": flow_teacher, "dit": dit_teacher}
    teachers["text"] = text_teachers("sd")
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def run(folder, kind, *flags, processes=1, **options):
        teacher = {"pretrained_teacher_model": teachers[kind]} if kind in teachers else {}
        told = {"prompts": prompts} if kind == "text" else {}
        options = {**KINDS[kind], **teacher, **told, **options}
        if processes == 1:
            return distil(folder, *flags, **options)
        statuses, text = launch(folder, *flags, processes=processes, **options)
        assert set(statuses) == {0}, text
        return folder

    return run


@pytest.fixture(scope="module")
def accumulated(make, tmp_path_factory):
    """One process with two batches an update, by kind of run."""
    folders = tmp_path_factory.mktemp("runs")
    return {kind: make(folders / kind, kind, **ACCUMULATION) for kind in KINDS}


@pytest.fixture(scope="module")
def parallel(make, tmp_path_factory):
    """Two processes, by kind of run."""
    folders = tmp_path_factory.mktemp("runs")
    return {kind: make(folders / kind, kind, **PROCESSES) for kind in KINDS}


def last_checkpoint(folder):
    return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_two_accumulated_batches(parallel, accumulated, differences, kind):
    folder = parallel[kind]
    assert differences(folder, accumulated[kind]) == []
    assert json.loads((folder / "training.json").read_text())["processes"] == 2
    chains = [load_file(last_checkpoint(folder) / f"chains-{number}.safetensors") for number in (0, 1)]
    if kind != "paper":
        assert not chains[0]["x_next"].equal(chains[1]["x_next"])


def test_two_batches_an_update_are_not_one(fast_run, accumulated, differences):
    assert differences(fast_run, accumulated["fast"])


@pytest.mark.parametrize(
    ("kind", "second"),
    [("fast", PROCESSES), ("fast", ACCUMULATION), ("paper", ACCUMULATION), ("classes", PROCESSES)]
    + [("guided", ACCUMULATION), ("flow", PROCESSES), ("dit", ACCUMULATION)],
)
def test_a_run_resumes_with_its_batches_in_other_processes(
    make, accumulated, parallel, tmp_path, differences, kind, second
):
    """From the last checkpoint but one."""
    folder = shutil.copytree((accumulated if second is PROCESSES else parallel)[kind], tmp_path / "run")
    for path in (last_checkpoint(folder), folder / "pipeline"):
        shutil.rmtree(path)
    make(folder, kind, resume_from_checkpoint="latest", **second)
    assert differences(folder, accumulated[kind]) == []


@pytest.mark.parametrize(
    ("options", "batches"), [({"gradient_accumulation_steps": number}, number) for number in (1, 4)]
)
def test_another_number_of_batches_is_refused(distil, accumulated, tmp_path, options, batches):
    checkpoint = accumulated["fast"] / "checkpoints" / "checkpoint-4"
    message = f"checkpoint-4 is of a run with 2 micro-batches an update, now there are {batches}: choose"
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", resume_from_checkpoint=checkpoint, **KINDS["fast"], **options)
