"""Fixtures of the script tests: a random teacher of two levels, and what the scripts make of it in a few steps."""

import contextlib
import io
import json
from functools import cache

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation.networks import load_networks
from hsivi_diffusers.distillation.state import TrainingState
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.teachers.teacher import load_parts
from tiny_dit import make_dit
from tiny_text import make_text
from tiny_unet import save_teacher
from training.benchmarks.images import train_baseline as train_program


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

    @cache
    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        make_text(kind).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def make_config(arguments):
    """Returns the HSIVIConfig that `hsivi distil` reads; options by keyword."""

    def make(*flags, **options):
        return cli.read_distillation(arguments("nowhere", *flags, **options), "hsivi distil", "")[1]

    return make


@pytest.fixture
def make_state(make_config, teacher, fresh_accelerator):
    """Makes the TrainingState of a run that has made no update yet, of a teacher; options by keyword."""

    def make(source=teacher, **options):
        config, accelerator = make_config(**options), Accelerator(cpu=True)
        return TrainingState(load_networks(load_parts(source), config, accelerator), config, accelerator)

    return make


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
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
