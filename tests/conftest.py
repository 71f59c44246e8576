"""Fixtures: random teachers of each kind, and what `hsivi distil` makes of them in a few updates.

Modules that take long to import are imported by the fixtures that need them.
"""

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JOBLIB_MULTIPROCESSING"] = "0"  # prdc would start eight threads for each matrix of distances
os.environ["ACCELERATE_USE_CPU"] = "true"  # bit-identical runs are promised on one machine's CPU
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp()  # read when huggingface_hub is imported

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import settings

from hub_server import Hub, signed_in
from short_run import SETTINGS
from tiny_unet import make_unet, save_teacher

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy one is slow
settings.load_profile("any machine")


def pytest_collection_finish():
    """What was imported stays: a collection that looks through all of it takes a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps the stack for each kind of device


@pytest.fixture
def unet():
    return make_unet().eval()


@pytest.fixture
def teacher_folder(tmp_path, unet):
    path = tmp_path / "teacher"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def hub():
    """A Hub on the loopback, of this test alone."""
    with Hub() as server:
        yield server


@pytest.fixture
def logged_in(hub, tmp_path):
    """The client of this process talks to the Hub on the loopback, as alice."""
    with signed_in(hub, tmp_path / "home"):
        yield hub


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def class_teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("class_teacher"), num_class_embeds=3)


@pytest.fixture(scope="session")
def flow_teacher(tmp_path_factory):
    folder = save_teacher(tmp_path_factory.mktemp("flow_teacher"))
    DDPMPipeline.from_pretrained(folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_teacher(tmp_path_factory):
    """A DiTPipeline of three classes, whose latents of 2 x 8 x 8 are images of 16x16."""
    from tiny_dit import make_dit

    folder = tmp_path_factory.mktemp("dit_teacher")
    make_dit().save_pretrained(folder)
    index = folder / "model_index.json"  # where facebook/DiT-XL-2-256 names its classes, and diffusers saves none
    index.write_text(
        json.dumps({**json.loads(index.read_text()), "id2label": {"0": "cat, tiger", "1": "dog", "2": "owl"}})
    )
    return folder


@pytest.fixture(scope="session")
def text_teachers(tmp_path_factory):
    """Makes the folder of a text-to-image pipeline, "sd", "sdxl" or "pixart", whose latents are images of 16x16."""
    from tiny_text import make_text

    @cache
    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        make_text(kind).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def arguments(teacher):
    """The command line of a run with 2 layers and 4 rows; options by keyword, a tuple for a list."""

    def make(output_dir, *flags, **options):
        settings = {"pretrained_teacher_model": teacher, **SETTINGS, **options}
        line = []
        for name, value in settings.items():
            line += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
        return [*line, f"--output_dir={output_dir}", *flags]

    return make


@pytest.fixture(scope="session")
def distil(arguments):
    """Runs `hsivi distil` with 2 layers and 4 rows, and returns the output folder; options by keyword."""
    from hsivi_diffusers.commands import cli
    from hsivi_diffusers.distillation import updates

    def run(output_dir, *flags, **options):
        cli.distil(arguments(output_dir, *flags, **options))
        return output_dir

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(updates, "PAIR_STEPS", 3)
        yield run


@pytest.fixture(scope="session")
def make_config(arguments, tmp_path_factory):
    """Returns the HSIVIConfig that `hsivi distil` reads; options by keyword."""
    from hsivi_diffusers.commands import cli

    def make(*flags, **options):
        folder = tmp_path_factory.mktemp("state")  # which keeps pairs, if they are made
        return cli.read_distillation(arguments(folder, *flags, **options), "hsivi distil", "")[1]

    return make


@pytest.fixture
def make_state(teacher, fresh_accelerator):
    """Makes the TrainingState of a run of `arguments` that has made no update yet, of a teacher; options by keyword."""
    from accelerate import Accelerator

    from hsivi_diffusers import HSIVIConfig
    from hsivi_diffusers.distillation.networks import load_networks
    from hsivi_diffusers.distillation.state import TrainingState
    from hsivi_diffusers.teachers.loading import load_teacher

    def make(source=teacher, **options):
        config, accelerator = HSIVIConfig(**{**SETTINGS, **options}), Accelerator(cpu=True)
        networks, identity = load_networks(load_teacher(source), config, accelerator)
        return TrainingState(networks, config, accelerator, identity)

    return make


@pytest.fixture(scope="session")
def launch(arguments):
    """The same in processes of their own, which a request may have killed (see worker.py).

    Returns their exit statuses and what they printed.
    """
    script = Path(__file__).with_name("worker.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as worker:

        def run(output_dir, *flags, processes=1, environment=None, kill=None, **options):
            request = {"processes": processes, "environment": environment or {}, "kill": kill}
            request["arguments"] = arguments(output_dir, *flags, **options)
            worker.stdin.write(json.dumps(request) + "\n")
            answer = json.loads(worker.stdout.readline())
            return answer["statuses"], "\n".join(answer["texts"])

        yield run
        worker.stdin.close()


@pytest.fixture(scope="session")
def differences():
    """Tells in which files two runs differ: those of pipeline and critic, and the weights and chains at the end."""

    def files(folder):
        patterns = ("pipeline/**/*", "critic/**/*")
        last = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        found = [*(path for pattern in patterns for path in folder.glob(pattern)), *last.glob("*.safetensors")]
        return {path.relative_to(folder): path.read_bytes() for path in found if path.is_file()}

    def compare(one, other):
        one, other = files(one), files(other)
        return sorted(str(name) for name in one.keys() | other.keys() if one.get(name) != other.get(name))

    return compare


@pytest.fixture(scope="session")
def fast_run(distil, tmp_path_factory):
    """A finished run of the preset `fast`: to be read, not written to."""
    return distil(tmp_path_factory.mktemp("runs") / "fast", preset="fast")


@pytest.fixture(scope="session")
def paper_run(distil, tmp_path_factory):
    return distil(tmp_path_factory.mktemp("runs") / "paper", preset="paper")


@pytest.fixture(scope="session")
def several_run(distil, tmp_path_factory):
    """A finished run of one student for 1, 2 and 4 steps."""
    return distil(tmp_path_factory.mktemp("runs") / "several", preset="fast", num_inference_steps=(4, 1, 2))


@pytest.fixture(scope="session")
def class_run(distil, class_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "classes"
    return distil(folder, pretrained_teacher_model=class_teacher, max_train_steps=3)


@pytest.fixture(scope="session")
def extractor(tmp_path_factory):
    """Folder of an ImageClassifier of random weights, with 8 features."""
    from hsivi_diffusers.evaluation.classifier import ImageClassifier

    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ImageClassifier(channels=1, num_classes=10, num_features=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def printed():
    """Calls a function and returns what it printed; for fixtures, where capsys is not to be had."""

    def call(function, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            function(*arguments)
        return stream.getvalue()

    return call


@pytest.fixture(scope="session")
def same_tensors():
    """Tells whether two dictionaries hold bit-identical tensors under the same names."""

    def compare(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return compare


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the precision of a process; a plan is one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def check_help(capsys):
    """Asks a program for --help: exit status 0, and the headings."""

    def check(main, *headings):
        with pytest.raises(SystemExit) as exit:
            main(["--help_all"])
        text = capsys.readouterr().out
        assert exit.value.code == 0
        for heading in headings:
            assert f"\n{heading}:\n" in text
        assert "--config" in text

    return check
