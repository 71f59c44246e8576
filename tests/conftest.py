import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import constants

from hub_server import Hub
from tiny_unet import make_unet

torch.set_num_threads(1)


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
def logged_in(hub, monkeypatch, tmp_path):
    """The client of this process talks to the Hub on the loopback, as alice; the processes of test_hub.py do so too."""
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return hub
