import gc
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp()  # read when huggingface_hub is imported

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from hub_server import Hub, signed_in
from tiny_unet import make_unet

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
