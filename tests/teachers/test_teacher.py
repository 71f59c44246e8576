"""A teacher of the user's own, with the parts that plain networks have."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hsivi_diffusers import HSIVIConfig, HSIVIScheduler, HSIVITrainer, Teacher
from hsivi_diffusers.teachers.loading import load_student, load_teacher
from short_run import SETTINGS, train


class Plain(nn.Module):
    """Two layers that share their weights, statistics of batches, and a config that is no mapping."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(width=8)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x, t, class_labels=None):
        return self.last(self.two(self.one(self.norm(self.first(x) + t.to(x)[:, None, None, None] / 1000)).relu()))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Teacher(Plain(), HSIVIScheduler(), (1, 8, 8))


def test_tied_weights_and_buffers_are_saved_and_resumed_to_the_same_bits(teacher, tmp_path):
    trainer = train(teacher, tmp_path / "run")
    run = shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    (run / "training.json").unlink()
    config = HSIVIConfig(**SETTINGS, output_dir=str(run))
    HSIVITrainer(teacher, config).train(resume_from_checkpoint="latest")
    whole, again = (load_student(folder / "pipeline", teacher).network for folder in (tmp_path / "run", run))
    assert trainer.pipeline.network.norm.running_mean.abs().sum() > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert whole.two.weight is whole.one.weight


def test_a_teacher_that_is_given_stays_as_it_is(teacher):
    load_teacher(teacher).to("cpu", torch.bfloat16)
    assert {each.dtype for each in teacher.network.parameters()} == {torch.float32}
