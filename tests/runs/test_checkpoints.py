"""Checkpoints are sealed, pruned, read without pickles, and made once more when SIGTERM or Ctrl-C comes."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hsivi_diffusers import load_teacher
from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation.trainer import signals_as_trigger
from hsivi_diffusers.runs.checkpoints import Checkpoints
from hsivi_diffusers.runs.output import Output, claimed, find_damage
from hsivi_diffusers.runs.state_dicts import load_state_dict, random_state, save_state_dict, set_random_state
from hsivi_diffusers.teachers.teacher import fingerprint
from training.benchmarks.images import train_baseline, train_teacher, training_loop
from training.benchmarks.images.training_loop import TrainingLoop

SCRIPT = Path(__file__).parents[2] / "training" / "train_hsivi.py"
PREEMPTED = 75


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run(fast_run, tmp_path):
    """A copy of a finished run, with the checkpoints 4 and 5."""
    return shutil.copytree(fast_run, tmp_path / "run")


@pytest.fixture
def stop_after(monkeypatch):
    """Ctrl-C after the checkpoint of a step."""

    def patch(step):
        save = Checkpoints.save

        def interrupted(self, done, seconds):
            save(self, done, seconds)
            if done == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", interrupted)

    return patch


@pytest.mark.parametrize("name", ["layers.safetensors", "random-0.json", "progress.json"])
def test_a_byte_that_changed_is_found(distil, run, name):
    path = run / "checkpoints" / "checkpoint-5"
    assert find_damage(path) is None
    damage(path / name)
    with pytest.raises(ValueError, match=re.escape(f"--resume_from_checkpoint {path / name} is damaged: name one of")):
        distil(run, resume_from_checkpoint=path)


def test_every_file_is_under_the_seal(run):
    path = run / "checkpoints" / "checkpoint-5"
    for file in path.rglob("*"):
        content = file.read_bytes()
        damage(file)
        assert find_damage(path) == f"{file} is damaged"
        file.unlink()
        assert find_damage(path) in (f"{path} lacks {file.name}", f"{path} holds no checkpoint")
        file.write_bytes(content)
    assert find_damage(path) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"sha256": 1}', '{"step": 5, "sha256": "0"}', "\x00"])
def test_a_progress_file_of_nonsense_is_damage(run, text):
    path = run / "checkpoints" / "checkpoint-5"
    (path / "progress.json").write_text(text)
    assert find_damage(path) == f"{path}/progress.json is damaged"


@pytest.mark.parametrize("remove", [False, True])
def test_latest_passes_over_what_is_damaged_and_says_so(distil, run, fast_run, differences, capsys, remove):
    path = run / "checkpoints" / "checkpoint-5" / "critic_optimizer.safetensors"
    path.unlink() if remove else damage(path)
    distil(run, resume_from_checkpoint="latest")
    said = f"{path.parent} lacks {path.name}" if remove else f"{path} is damaged"
    assert f"passed over: {said}\n" in capsys.readouterr().out
    assert differences(run, fast_run) == []
    assert find_damage(path.parent) is None


def test_a_run_without_a_whole_checkpoint_does_not_start_over_by_itself(distil, run):
    for step in (4, 5):
        damage(run / "checkpoints" / f"checkpoint-{step}" / "layers.safetensors")
    before = names(run)
    with pytest.raises(ValueError, match="no checkpoint of .*checkpoint-5.*checkpoint-4.*--overwrite_output_dir"):
        distil(run, resume_from_checkpoint="latest")
    assert names(run) == before


def test_a_path_that_is_no_checkpoint_is_refused(distil, run, tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no checkpoint"):
        distil(run, resume_from_checkpoint=tmp_path / "nowhere")


def test_what_a_killed_run_left_half_written_is_removed_on_resuming(distil, run):
    folder = run / "checkpoints"
    for name in ("partial-3", "partial-5", "checkpoint-2.retired"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    (folder / "partial-5" / "stale.bin").write_bytes(b"0")
    distil(run, resume_from_checkpoint=folder / "checkpoint-4")
    assert names(run) == ["checkpoint-4", "checkpoint-5"]
    assert not (folder / "checkpoint-5" / "stale.bin").exists()


def test_pruning_never_counts_on_checkpoints_of_a_later_step(distil, tmp_path, stop_after):
    """They may be damaged, which is why one resumed before them."""
    folder = distil(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=5)
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        distil(
            folder,
            checkpointing_steps=1,
            checkpoints_total_limit=1,
            resume_from_checkpoint=folder / "checkpoints" / "checkpoint-2",
        )
    assert names(folder) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_what_is_left_of_a_pipeline_half_saved_is_not_taken_into_the_next(distil, run, fast_run, differences):
    shutil.copytree(run / "pipeline" / "unet", run / "pipeline.partial" / "unet_noise_scale")
    shutil.rmtree(run / "pipeline")
    distil(run, resume_from_checkpoint="latest")
    assert differences(run, fast_run) == []


# ----- what a checkpoint must not do -----


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def seal(path):
    """Makes a checkpoint look whole, as anyone can: the seal is no signature."""
    progress = json.loads((path / "progress.json").read_text())
    del progress["sha256"]
    progress["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != "progress.json"
    }
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
    (path / "progress.json").write_text(json.dumps({**progress, "sha256": digest}))


def test_no_pickle_of_a_checkpoint_is_loaded(distil, run, tmp_path):
    """A pickle is ignored under a name that accelerate would load, and refused in place of one of our files."""
    path, marker = run / "checkpoints" / "checkpoint-5", tmp_path / "ran"
    for name in ("optimizer", "optimizer_1", "scheduler", "sampler", "pytorch_model", "scaler"):
        torch.save(Bomb(marker), path / f"{name}.{'pt' if name == 'scaler' else 'bin'}")
    for name in ("custom_checkpoint_0", "custom_checkpoint_1", "custom_checkpoint_2", "random_states_0"):
        torch.save(Bomb(marker), path / f"{name}.pkl")
    seal(path)
    distil(run, resume_from_checkpoint=path)
    assert not marker.exists()
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        torch.save(Bomb(marker), file)
        seal(path)
        with pytest.raises(Exception, match=r"[Hh]eader"):
            distil(run, resume_from_checkpoint=path)
        file.write_bytes(content)
    assert not marker.exists()
    torch.load(path / "optimizer.bin", weights_only=False)
    assert marker.exists()


def test_a_checkpoint_with_pickles_of_an_earlier_version_is_refused(distil, run):
    for path in (run / "checkpoints").iterdir():
        progress = json.loads((path / "progress.json").read_text())
        del progress["identity"]
        (path / "progress.json").write_text(json.dumps(progress))
        seal(path)
    with pytest.raises(ValueError, match="checkpoint-5 was written by an earlier version and holds pickles, .* start"):
        distil(run, resume_from_checkpoint="latest")


def test_a_run_goes_on_with_its_own_teacher_alone(distil, teacher, tmp_path):
    place = shutil.copytree(teacher, tmp_path / "teacher")
    options = {"pretrained_teacher_model": place, "max_train_steps": 1, "critic_updates": 1}
    folder = distil(tmp_path / "run", **options)
    weights, config = place / "unet" / "diffusion_pytorch_model.safetensors", place / "scheduler/scheduler_config.json"
    contents = {path: path.read_bytes() for path in (weights, config)}
    changed = bytearray(contents[weights])
    changed[-1] ^= 1
    for path, content in ((weights, changed), (config, contents[config].replace(b"0.02", b"0.03"))):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"checkpoint-1 is of a run with another teacher .*\(teacher_sha256: \w+ ->"
        ):
            distil(folder, resume_from_checkpoint="latest", **options)
        path.write_bytes(contents[path])
    distil(folder, resume_from_checkpoint="latest", **options)


def test_a_run_is_resumed_by_the_name_of_its_folder(distil, tmp_path):
    """Its options are those that it had, but for what the command line says."""
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "seed": 5, "num_inference_steps": (1, 2)}
    whole = distil(tmp_path / "whole", **options, gradient_accumulation_steps=2)
    weights = (whole / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(whole / "checkpoints" / "checkpoint-4")
    shutil.rmtree(whole / "pipeline")
    words = [f"--output_dir={whole}", "--resume_from_checkpoint=latest"]
    with pytest.raises(ValueError, match=r"other options \(seed: 5 -> 6\): resume with the same ones"):
        cli.distil([*words, "--seed=6"])
    cli.distil(words)
    assert (whole / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert json.loads((whole / "options.json").read_text())["gradient_accumulation_steps"] == 2
    named = [f"--output_dir={tmp_path / 'other'}", f"--resume_from_checkpoint={whole / 'checkpoints/checkpoint-2'}"]
    cli.distil(named)
    weights_of_other = tmp_path / "other" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights_of_other.read_bytes() == weights


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[1, 2]", "options.json is damaged"),
        ("{", "options.json is damaged"),
        ('{"pretrained_teacher_model": null}', "was given its teacher from Python: resume it there"),
    ],
)
def test_a_run_that_cannot_be_resumed_by_its_folder_is_told(tmp_path, record, message):
    (tmp_path / "options.json").write_text(record)
    with pytest.raises(ValueError, match=message):
        cli.distil([f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest"])


def test_a_fingerprint_is_of_weights_and_configs(teacher, tmp_path):
    unet, scheduler = load_teacher(str(shutil.copytree(teacher, tmp_path / "elsewhere")))
    before = fingerprint(unet, scheduler)
    assert before == fingerprint(*load_teacher(str(teacher)))
    assert fingerprint(unet.half(), scheduler) != before


@pytest.mark.parametrize("named", [False, True])
def test_options_are_under_the_seal(distil, run, tmp_path, named):
    """So a run whose options.json is gone does not continue with others, in its folder or in another."""
    (run / "options.json").unlink()
    folder = tmp_path / "other" if named else run
    checkpoint = run / "checkpoints" / "checkpoint-4" if named else "latest"
    with pytest.raises(ValueError, match=r"run holds a run with other options \(seed: 0 -> 1\): resume with the same"):
        distil(folder, resume_from_checkpoint=checkpoint, seed=1)
    assert not (folder / "options.json").exists()
    distil(run, resume_from_checkpoint="latest")


# ----- the folder of a run -----


@pytest.fixture
def tiny(tmp_path):
    """Checkpoints of one parameter that is trained by Adam, in the folder `run`; options by keyword."""

    def make(**options):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        parameter.square().sum().backward()
        optimizer.step()
        run, network = Output(str(tmp_path / "run"), **options), torch.nn.ParameterList([parameter])
        return TrainingLoop(run, Accelerator(), network, optimizer, 0.9, {"seed": 0}).checkpoints

    (tmp_path / "run").mkdir()
    return make


@pytest.mark.parametrize("name", ["checkpoint-best", "partial-best", "checkpoint-1.old", "notes"])
def test_what_is_not_ours_is_left_alone(tiny, tmp_path, name):
    folder = tmp_path / "run" / "checkpoints"
    tiny().save(1, 0.0)
    shutil.copytree(folder / "checkpoint-1", folder / name)
    tiny(checkpoints_total_limit=1).save(2, 0.0)
    assert tiny(resume_from_checkpoint="latest").load() == (2, 0.0)
    assert names(tmp_path / "run") == sorted(["checkpoint-2", name])
    assert len(list((folder / name).iterdir())) == 4


@pytest.mark.parametrize("happens", ["moved", "deleted", "replaced"])
def test_a_folder_that_is_gone_is_not_made_anew(tiny, tmp_path, happens):
    folder = tmp_path / "run"
    checkpoints = tiny()
    checkpoints.save(1, 0.0)
    os.replace(folder, tmp_path / "elsewhere")
    if happens == "deleted":
        shutil.rmtree(tmp_path / "elsewhere")
    if happens == "replaced":
        folder.mkdir()
    with pytest.raises(ValueError, match=r"--output_dir .*run was moved or deleted during the run.* continue with"):
        checkpoints.save(2, 0.0)
    assert folder.exists() == (happens == "replaced")
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize(
    "left", [["options.json"], ["options.json.partial"], ["options.json", "logs/run", "checkpoints/partial-3"]]
)
def test_a_start_without_a_checkpoint_is_taken_up_again(tmp_path, left, resume):
    folder = tmp_path / "run"
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    output = Output(str(folder), resume_from_checkpoint=resume)
    for _ in range(2):  # after the first there is a lock, too
        with claimed(output):
            pass
    (folder / "precious").touch()
    if resume is None or "options.json" not in left:
        with pytest.raises(ValueError, match="is not empty"), claimed(output):
            pass


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(train, whole, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    assert (tmp_path / "run" / "options.json").is_file()
    assert weights(train(tmp_path / "run")) == weights(whole)


# ----- state dicts -----


def test_a_state_dict_is_read_bit_for_bit(tmp_path):
    tensors = [torch.rand(2, 3).T, torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0), torch.tensor([True])]
    state = {"state": {0: {"step": tensors[0]}, 1: {}}, "a/b": tensors[1], "list": [tensors[2:], 0.1, None, "x", True]}
    save_state_dict(state, tmp_path / "file")
    read = load_state_dict(tmp_path / "file")
    found = [read["state"][0]["step"], read["a/b"], *read["list"][0]]
    assert all(one.equal(other) and one.dtype == other.dtype for one, other in zip(found, tensors, strict=True))
    assert read["state"].keys() == {0, 1}
    assert read["list"][1:] == [0.1, None, "x", True]


def test_something_else_is_not_written_as_state(tmp_path):
    with pytest.raises(TypeError):
        save_state_dict({"a": object()}, tmp_path / "file")


def test_global_generators_go_on_where_they_were():
    def draw():
        array = np.random.standard_normal(3)  # noqa: NPY002
        return random.random(), random.gauss(0, 1), array.tolist(), torch.rand(3).tolist()

    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002  # of each pair of normal numbers one is kept
    state = json.loads(json.dumps(random_state(torch.device("cpu"))))
    expected = draw()
    set_random_state(state, torch.device("cpu"))
    assert draw() == expected


# ----- teachers and baselines -----


@pytest.fixture(scope="module", params=[train_teacher, train_baseline], ids=lambda program: program.__name__)
def train(request, teacher):
    """Trains for five updates of 4 rows, with checkpoints after 2, 4 and 5."""
    own = {
        train_teacher: ["--block_out_channels", "8", "16"],
        train_baseline: [f"--pretrained_teacher_model={teacher}"],
    }
    settings = ["--max_train_steps=5", "--train_batch_size=4", "--lr_warmup_steps=2", "--checkpointing_steps=2"]

    def run(folder, *arguments):
        request.param.main([*own[request.param], *settings, f"--output_dir={folder}", *arguments])
        return folder

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A finished training: to be read, not written to."""
    return train(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def trained(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def weights(folder):
    (path,) = folder.rglob("diffusion_pytorch_model.safetensors")
    return path.read_bytes()


@pytest.fixture
def saved(monkeypatch):
    """Steps after which checkpoints were written."""
    steps, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *given: save(self, *given) or steps.append(given[0]))
    return steps


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(train, whole, tmp_path, saved, stop_after, step):
    stop_after(step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("diffusion_pytorch_model.safetensors"))
    saved.clear()
    train(tmp_path / "run", "--resume_from_checkpoint=latest")
    assert saved == [after for after in (2, 4, 5) if after > step]
    assert weights(tmp_path / "run") == weights(whole)
    assert names(tmp_path / "run") == names(whole) == ["checkpoint-4", "checkpoint-5"]


def test_a_training_without_a_checkpoint_yet_starts_and_a_finished_one_stays(train, tmp_path, saved):
    folder = train(tmp_path / "run", "--resume_from_checkpoint=latest")
    before = weights(folder)
    train(folder, "--resume_from_checkpoint=latest")
    assert weights(folder) == before
    assert saved == [2, 4, 5]


def test_an_earlier_training_stays_until_the_next_can_start(train, trained, tmp_path):
    folder = trained
    before = weights(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        train(folder, "--overwrite_output_dir", f"--train_data={tmp_path / 'empty'}")
    assert weights(folder) == before
    assert names(folder) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("inside", ["pipeline", "checkpoints/kept"])
@pytest.mark.parametrize("program", [cli.distil, train_baseline.main])
def test_a_student_is_not_written_over_its_teacher(teacher, tmp_path, inside, program):
    place = shutil.copytree(teacher, tmp_path / "run" / inside)
    with pytest.raises(ValueError, match="--output_dir .* holds the teacher, which would be lost: name another folder"):
        program([f"--pretrained_teacher_model={place}", f"--output_dir={tmp_path / 'run'}", "--overwrite_output_dir"])
    assert (place / "unet" / "config.json").exists()


def test_a_baseline_may_lie_beside_its_teacher(teacher, tmp_path):
    place = shutil.copytree(teacher, tmp_path / "teacher")
    options = train_baseline.Teacher(str(place)), train_baseline.Training(), Output(output_dir=str(tmp_path))
    train_baseline.check_options(*options)


def test_a_training_goes_on_with_its_own_options_alone(train, trained, tmp_path):
    folder = trained
    with pytest.raises(ValueError, match=r"other options \(seed: 0 -> 1\): resume with the same ones, name another"):
        train(folder, "--resume_from_checkpoint=latest", "--seed=1")
    with pytest.raises(
        ValueError, match="--overwrite_output_dir starts over and --resume_from_checkpoint latest continues"
    ):
        train(folder, "--resume_from_checkpoint=latest", "--overwrite_output_dir")
    with pytest.raises(ValueError, match="--checkpointing_steps 0: give a number of at least 1"):
        train(folder, "--overwrite_output_dir", "--checkpointing_steps=0")
    shorter = train(tmp_path / "shorter", "--max_train_steps=1")
    train(folder, "--overwrite_output_dir", "--max_train_steps=1")
    assert weights(folder) == weights(shorter)
    assert names(folder) == ["checkpoint-1"]


def test_a_folder_of_something_else_is_not_gone_on_with(train, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(
        ValueError, match="is not empty and holds no run to continue with: name another folder, or pass"
    ):
        train(tmp_path, "--resume_from_checkpoint=latest")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_ended_training_whose_checkpoints_are_gone_is_not_trained_again(train, trained):
    folder = trained
    before = weights(folder)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(
        ValueError, match="holds a run that has ended, and no checkpoint to continue from: name another"
    ):
        train(folder, "--resume_from_checkpoint=latest")
    assert weights(folder) == before


def test_a_new_run_never_finds_the_checkpoints_of_an_earlier_one(train, trained, tmp_path):
    """Not even where the user has linked them from elsewhere."""
    folder, scratch = trained, tmp_path / "scratch"
    os.replace(folder / "checkpoints", scratch)
    (folder / "checkpoints").symlink_to(scratch)
    train(folder, "--overwrite_output_dir", "--max_train_steps=1")
    assert names(folder) == ["checkpoint-1"]
    assert sorted(path.name for path in scratch.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_seconds_before_a_stop_count_towards_a_limit_of_seconds(teacher, tmp_path, monkeypatch, saved, stop_after):
    """The clock moves one second each time it is read: once at the start, once for each update."""
    arguments = [f"--pretrained_teacher_model={teacher}", "--train_batch_size=4", "--max_train_seconds=5"]
    arguments += ["--checkpointing_steps=2", "--resume_from_checkpoint=latest", f"--output_dir={tmp_path / 'run'}"]
    for interrupted in (True, False):
        clock = itertools.count(100.0)
        monkeypatch.setattr(training_loop, "time", SimpleNamespace(perf_counter=lambda clock=clock: next(clock)))
        if interrupted:
            stop_after(2)
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            train_baseline.main(arguments)
    assert saved == [2, 4, 5]
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["max_train_steps"], record["seconds"]) == (5, 5.0)


def test_an_average_that_is_not_finite_is_not_saved(tmp_path):
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(network.parameters())
    loop = TrainingLoop(Output(str(tmp_path)), Accelerator(), network, optimizer, 0.9, {})
    loop.average.shadow_params[0][0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="a weight is not finite after 7 updates: lower --learning_rate"):
        loop.checkpoints.save(7, 1.0)
    assert not list(tmp_path.iterdir())


# ----- signals -----


@pytest.mark.parametrize(
    ("name", "options"), [("SIGTERM", {}), ("SIGINT", {"processes": 2, "preset": "paper"})], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_and_leaves_with_the_status_try_again(launch, tmp_path, differences, name, options):
    """One of the processes gets it, and all stop."""
    processes = options.get("processes", 1)
    kill = {"point": name, "step": 3, "rank": processes - 1}
    statuses, text = launch(tmp_path / "run", kill=kill, **options)
    assert statuses == [PREEMPTED] * processes, text
    assert "stopped and saved after update 3: continue with --resume_from_checkpoint latest" in text
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "run" / "pipeline").exists()
    for folder, resume in (("run", {"resume_from_checkpoint": "latest"}), ("at_once", {})):
        assert launch(tmp_path / folder, **resume, **options)[0] == [0] * processes
    assert differences(tmp_path / "run", tmp_path / "at_once") == []


def test_a_second_ctrl_c_ends_the_run_at_once():
    pulled, before = [], signal.getsignal(signal.SIGINT)
    with signals_as_trigger(SimpleNamespace(set_trigger=lambda: pulled.append(1))):
        signal.raise_signal(signal.SIGINT)
        assert pulled == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_in_the_last_step_ends_the_run(launch, fast_run, tmp_path, differences):
    assert launch(tmp_path / "run", kill={"point": "SIGTERM", "step": 5})[0] == [0]
    assert differences(tmp_path / "run", fast_run) == []


@pytest.mark.slow  # each imports everything; signals of forked processes are above
@pytest.mark.parametrize(
    ("launcher", "statuses"),
    [
        pytest.param([sys.executable], {PREEMPTED}, id="python"),
        pytest.param(["torchrun", "--nproc_per_node=2"], range(-15, 256), id="torchrun"),
    ],
)
def test_a_run_that_is_taken_away_goes_on(launch, arguments, tmp_path, differences, launcher, statuses):
    processes = 1 if launcher[0] == sys.executable else 2
    options = {"max_train_steps": 50, "checkpointing_steps": 5, "critic_updates": 1}
    folder = tmp_path / "run"
    if processes == 2:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *launcher[1:]]
    command = [*launcher, SCRIPT, *arguments(folder, **options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        end = time.monotonic() + 600
        while job.poll() is None and time.monotonic() < end and not (folder / "checkpoints" / "checkpoint-5").exists():
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=600)[1]
    assert job.returncode in statuses, said
    saved = max(int(name.split("-")[1]) for name in names(folder))
    assert 5 < saved < 50
    assert not any("partial" in name for name in names(folder))
    resume = {"processes": processes, "resume_from_checkpoint": "latest", **options}
    assert launch(folder, **resume)[0] == [0] * processes
    assert launch(tmp_path / "at_once", **resume)[0] == [0] * processes
    assert differences(folder, tmp_path / "at_once") == []
