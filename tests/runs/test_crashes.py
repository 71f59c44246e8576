"""Runs in processes of their own that are killed and go on: nothing is lost and no bit changes."""

import random
import signal

import pytest

from hsivi_diffusers.runs.output import find_damage
from slow import others_slow

STEPS = 4
OPTIONS = {"max_train_steps": STEPS, "checkpointing_steps": 1, "critic_updates": 1}
POINTS = ["half a file", "progress", "renamed", "half removed", "pipeline", "state", "half a part", "chains"]
KILLED = [-signal.SIGKILL]


@pytest.fixture(scope="module")
def at_once(distil, tmp_path_factory):
    return distil(tmp_path_factory.mktemp("runs") / "at_once", **OPTIONS)


def check_checkpoints(folder):
    """All that have their final name are whole."""
    for path in (folder / "checkpoints").glob("checkpoint-*"):
        assert path.suffix == ".retired" or find_damage(path) is None


@pytest.mark.parametrize("point", others_slow(POINTS, "half a file", "pipeline"))
def test_a_run_killed_while_it_saves_ends_as_if_it_had_not_been(launch, at_once, tmp_path, differences, point):
    folder = tmp_path / "run"
    resume = {"resume_from_checkpoint": "latest", **OPTIONS}
    kill = {"point": point, "step": 3}
    assert launch(folder, kill=kill, **resume)[0] == KILLED
    check_checkpoints(folder)
    assert launch(folder, **resume)[0] == [0]
    assert differences(folder, at_once) == []
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoints", "critic", "pipeline"]


def test_a_run_killed_twice_ends_as_if_it_had_not_been(launch, at_once, tmp_path, differences):
    """The second kill is between the retirement of a damaged checkpoint and the renaming of the one for its place."""
    folder = tmp_path / "run"
    resume = {"resume_from_checkpoint": "latest", **OPTIONS}
    assert launch(folder, kill={"point": "half a file", "step": 4}, **resume)[0] == KILLED
    weights = folder / "checkpoints" / "checkpoint-3" / "layers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert launch(folder, kill={"point": "between retire and rename", "step": 3}, **resume)[0] == KILLED
    check_checkpoints(folder)
    assert launch(folder, **resume)[0] == [0]
    assert differences(folder, at_once) == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_moments_change_no_bit(launch, tmp_path, differences, processes):
    """A run that was done before it was to be killed is compared with one that was let be, and the next one begins."""
    options = {**OPTIONS, "max_train_steps": 30, "resume_from_checkpoint": "latest"}
    assert launch(tmp_path / "at_once", processes=processes, **options)[0] == [0] * processes
    delays, kills, folder = random.Random(processes), 0, tmp_path / "run-0"
    while kills < 20:
        kill = {"after": delays.uniform(0.1, 1.0) * processes}
        statuses, text = launch(folder, processes=processes, kill=kill, **options)
        assert set(statuses) <= {0, *KILLED}, text
        check_checkpoints(folder)
        if any(statuses):
            kills += 1
        else:
            assert differences(folder, tmp_path / "at_once") == []
            folder = tmp_path / f"run-{kills}"
    statuses, text = launch(folder, processes=processes, **options)
    assert statuses == [0] * processes, text
    assert differences(folder, tmp_path / "at_once") == []
