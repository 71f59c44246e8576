import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"  # bit-identical runs are promised on one machine's CPU
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp()  # read when huggingface_hub is imported

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from hub_server import Hub, signed_in
from tiny_unet import make_unet, save_teacher

torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported stays: a collection that looks through all of it takes a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
def arguments(teacher):
    """The command line of a run with 2 layers and 4 rows; options by keyword, a tuple for a list."""
    from short_run import SETTINGS  # imports the trainer, which most tests do not need

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

    def run(output_dir, *flags, **options):
        cli.distil(arguments(output_dir, *flags, **options))
        return output_dir

    return run


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
