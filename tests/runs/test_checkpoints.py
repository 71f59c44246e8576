"""Checkpoints are sealed, pruned, read without pickles, and made once more when SIGTERM or Ctrl-C comes."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation.trainer import signals_as_trigger
from hsivi_diffusers.runs import checkpoints as runs_checkpoints
from hsivi_diffusers.runs.checkpoints import Checkpoints
from hsivi_diffusers.runs.output import Output, claimed, find_damage
from short_run import contents
from slow import others_slow
from training.benchmarks.images import train_baseline, train_teacher, training_loop
from training.benchmarks.images.training_loop import TrainingLoop

SCRIPT = Path(__file__).parents[2] / "training" / "train_hsivi.py"
PREEMPTED = 75
TWO = {"processes": 2, "preset": "paper"}


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights(folder):
    (path,) = folder.rglob("diffusion_pytorch_model.safetensors")
    return path.read_bytes()


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


def seal(path, *forgotten):
    """Makes a checkpoint look whole, as anyone can: the seal is no signature."""
    progress = json.loads((path / "progress.json").read_text())
    progress = {name: value for name, value in progress.items() if name not in ("sha256", *forgotten)}
    files = [file for file in path.iterdir() if file.name != "progress.json"]
    progress["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
    (path / "progress.json").write_text(json.dumps({**progress, "sha256": digest}))


def on_all(change):
    return lambda run: [change(path) for path in (run / "checkpoints").iterdir()]


def empty(run):
    for path in run.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "precious").touch()


def write(name, text):
    return lambda run: (run / name).write_text(text)


AT, NAMED = "checkpoints/checkpoint-5", "--resume_from_checkpoint .*checkpoint-5"
REFUSED = [
    (AT, lambda run: damage(run / AT / "layers.safetensors"), f"{NAMED}/layers.safetensors is damaged: name one of"),
    (AT, lambda run: damage(run / AT / "progress.json"), f"{NAMED}/progress.json is damaged: name one of"),
    *((AT, write(f"{AT}/progress.json", text), "json is damaged") for text in ("", "{}", "[]", '{"sha256": 1}', "\0")),
    ("nowhere", lambda run: None, "nowhere holds no checkpoint: name one of .*, or latest"),
    ("latest", on_all(lambda path: damage(path / "layers.safetensors")), r"no checkpoint .* is whole \(.*-5.*-4"),
    (
        "latest",
        on_all(lambda path: seal(path, "identity")),
        "-5 .* before version 0.2 and holds pickles, .* start over",
    ),
    ("latest", lambda run: shutil.rmtree(run / "checkpoints"), "ended, and no checkpoint to continue from: name an"),
    ("latest", empty, "is not empty and holds no run to continue with: name another folder, or pass"),
    ("latest", write("options.json", "[1, 2]"), "options.json is damaged"),
    ("latest", write("training.json", "{"), "training.json is damaged .*: make it again, or remove it"),
    ("latest", write("training.json", '{"seconds": "x"}'), "training.json is damaged .seconds is not a number.: make"),
]


@pytest.mark.parametrize(("checkpoint", "change", "message"), REFUSED)
def test_what_cannot_be_resumed_is_refused_and_left(distil, run, checkpoint, change, message):
    change(run)
    before = {**contents(run), Path(".lock"): b""}
    with pytest.raises(ValueError, match=message):
        distil(run, preset="fast", resume_from_checkpoint=checkpoint if checkpoint == "latest" else run / checkpoint)
    assert {**contents(run), Path(".lock"): b""} == before


def test_a_run_whose_teacher_came_from_python_is_resumed_there(tmp_path):
    (tmp_path / "options.json").write_text('{"pretrained_teacher_model": null}')
    with pytest.raises(ValueError, match="was given its teacher from Python: resume it there"):
        cli.distil([f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest"])


@pytest.mark.parametrize("happens", ["load", "save"])
def test_a_process_that_does_not_see_the_output_folder_is_refused(tiny, tmp_path, monkeypatch, happens):
    """It is told of a checkpoint, or of a folder for one, that the first process made on another machine."""
    checkpoints = tiny(resume_from_checkpoint="latest")
    monkeypatch.setattr(checkpoints.accelerator.state, "process_index", 1, raising=False)
    monkeypatch.setattr(type(checkpoints.accelerator), "is_main_process", False)
    choice = [(tmp_path / "run" / "checkpoints" / "checkpoint-1", None)]
    monkeypatch.setattr(runs_checkpoints, "broadcast_object_list", lambda own: choice)
    with pytest.raises(ValueError, match="process 1 does not see .*: give an --output_dir that all machines"):
        checkpoints.load() if happens == "load" else checkpoints.save(1, 0.0)
    assert not list((tmp_path / "run").iterdir())


def test_what_a_killed_run_left_is_passed_over_or_removed(distil, run, fast_run, differences, capsys):
    folder, path = run / "checkpoints", run / "checkpoints" / "checkpoint-5" / "critic_optimizer.safetensors"
    for name in ("partial-3", "partial-5", "checkpoint-2.retired"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    (folder / "partial-5" / "stale.bin").write_bytes(b"0")
    shutil.copytree(run / "pipeline" / "unet", run / "pipeline.partial" / "unet_noise_scale")
    shutil.rmtree(run / "pipeline")
    damage(path)
    distil(run, resume_from_checkpoint="latest")
    assert f"passed over: {path} is damaged\n" in capsys.readouterr().out
    assert differences(run, fast_run) == []
    assert names(run) == ["checkpoint-4", "checkpoint-5"]
    assert find_damage(path.parent) is None
    assert not (path.parent / "stale.bin").exists()


# ----- what a checkpoint must not do -----


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


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
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "critic_updates": 1, "lr_warmup_steps": 0, "seed": 5}
    whole = distil(tmp_path / "whole", **options, num_inference_steps=(1, 2), gradient_accumulation_steps=2)
    before = weights(whole / "pipeline")
    shutil.rmtree(whole / "checkpoints" / "checkpoint-2")
    shutil.rmtree(whole / "pipeline")
    words = [f"--output_dir={whole}", "--resume_from_checkpoint=latest"]
    with pytest.raises(ValueError, match=r"other options \(seed: 5 -> 6\): resume with the same ones"):
        cli.distil([*words, "--seed=6"])
    cli.distil(words)
    assert weights(whole / "pipeline") == before
    assert json.loads((whole / "options.json").read_text())["gradient_accumulation_steps"] == 2
    other = tmp_path / "other"
    cli.distil([f"--output_dir={other}", f"--resume_from_checkpoint={whole / 'checkpoints' / 'checkpoint-1'}"])
    assert weights(other / "pipeline") == before


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


def test_checkpoints_are_pruned_in_the_order_of_their_numbers_and_never_count_on_those_of_a_later_step(tiny, tmp_path):
    """They may be damaged, which is why one resumed before them."""
    checkpoints, folder = tiny(checkpoints_total_limit=3), tmp_path / "run" / "checkpoints"
    for step in (3, 6, 9, 10):
        checkpoints.save(step, 0.0)
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-6", "checkpoint-9"]
    assert json.loads((folder / "checkpoint-9" / "progress.json").read_text())["step"] == 9
    resumed = tiny(checkpoints_total_limit=1, resume_from_checkpoint=folder / "checkpoint-6")
    assert resumed.load() == (6, 0.0, None)
    resumed.save(7, 0.0)
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-7", "checkpoint-9"]


@pytest.mark.parametrize("name", ["checkpoint-best", "partial-best", "checkpoint-1.old", "notes"])
def test_what_is_not_ours_is_left_alone(tiny, tmp_path, name):
    folder = tmp_path / "run" / "checkpoints"
    tiny().save(1, 0.0)
    shutil.copytree(folder / "checkpoint-1", folder / name)
    tiny(checkpoints_total_limit=1).save(2, 0.0)
    assert tiny(resume_from_checkpoint="latest").load() == (2, 0.0, None)
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


# ----- teachers and baselines -----


@pytest.fixture(
    scope="module",
    params=others_slow([train_teacher, train_baseline], train_baseline),
    ids=lambda program: program.__name__,
)
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


@pytest.fixture
def saved(monkeypatch):
    """Steps after which checkpoints were written."""
    steps, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *given: save(self, *given) or steps.append(given[0]))
    return steps


@pytest.mark.parametrize("step", others_slow([2, 5], 2))
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


def test_an_earlier_training_stays_until_the_next_can_start(train, trained, tmp_path):
    before = contents(trained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        train(trained, "--overwrite_output_dir", f"--train_data={tmp_path / 'empty'}")
    assert contents(trained) == before


def test_a_new_run_never_finds_the_checkpoints_of_an_earlier_one(train, trained, tmp_path):
    """Not even where the user has linked them from elsewhere."""
    scratch = tmp_path / "scratch"
    os.replace(trained / "checkpoints", scratch)
    (trained / "checkpoints").symlink_to(scratch)
    train(trained, "--overwrite_output_dir", "--max_train_steps=1")
    assert names(trained) == ["checkpoint-1"]
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


@pytest.fixture(scope="module")
def in_two(launch, tmp_path_factory):
    """A finished run of two processes: to be read, not written to."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    assert launch(folder, **TWO)[0] == [0, 0]
    return folder


def test_a_signal_to_one_of_the_processes_saves_and_all_leave_with_the_status_try_again(
    launch, in_two, tmp_path, differences
):
    statuses, text = launch(tmp_path / "run", kill={"point": "SIGINT", "step": 3, "rank": 1}, **TWO)
    assert statuses == [PREEMPTED] * 2, text
    assert "stopped and saved after update 3: continue with --resume_from_checkpoint latest\n" in text
    command = f"accelerate launch -m hsivi_diffusers distil --output_dir {tmp_path / 'run'}"
    assert f"\ncontinue it: {command} --resume_from_checkpoint latest\n" in text
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "run" / "pipeline").exists()
    assert launch(tmp_path / "run", resume_from_checkpoint="latest", **TWO)[0] == [0, 0]
    assert differences(tmp_path / "run", in_two) == []


def test_all_processes_resume_from_the_checkpoint_that_the_first_one_chooses(launch, in_two, tmp_path, differences):
    """Though the second reads damage in the newest one."""
    run, kill = shutil.copytree(in_two, tmp_path / "run"), {"point": "see damage", "step": 5, "rank": 1}
    shutil.rmtree(run / "pipeline")
    statuses, text = launch(run, kill=kill, resume_from_checkpoint="latest", **TWO)
    assert statuses == [0, 0], text
    assert "passed over" not in text
    assert differences(run, in_two) == []


def test_a_second_ctrl_c_ends_the_run_at_once():
    pulled, before = [], signal.getsignal(signal.SIGINT)
    with signals_as_trigger(SimpleNamespace(set_trigger=lambda: pulled.append(1))):
        signal.raise_signal(signal.SIGINT)
        assert pulled == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


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
