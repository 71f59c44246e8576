"""State dicts on the disk: bit for bit, without pickles, and a full disk or a damaged file is named."""

import json
import random
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hsivi_diffusers.runs.folders import write_text
from hsivi_diffusers.runs.state_dicts import (
    load_state_dict,
    load_tensors,
    random_state,
    save_state_dict,
    save_tensors,
    set_random_state,
)


def test_a_state_dict_is_read_bit_for_bit(tmp_path):
    tensors = [torch.rand(2, 3).T, torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0), torch.tensor([True])]
    state = {"state": {0: {"step": tensors[0]}, 1: {}}, "a/b": tensors[1], "list": [tensors[2:], 0.1, None, "x", True]}
    save_state_dict(state, tmp_path / "file")
    read = load_state_dict(tmp_path / "file")
    found = [read["state"][0]["step"], read["a/b"], *read["list"][0]]
    assert all(one.equal(other) and one.dtype == other.dtype for one, other in zip(found, tensors, strict=True))
    assert read["state"].keys() == {0, 1}
    assert read["list"][1:] == [0.1, None, "x", True]


def test_tensors_that_share_their_memory_are_each_written(tmp_path):
    base = torch.arange(6.0)
    tensors = {"base": base, "again": base, "end": base[2:], "turned": base.reshape(2, 3).t()}
    save_tensors(tensors, tmp_path / "state.safetensors")
    for name, tensor in load_tensors(tmp_path / "state.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
    assert tensors["again"] is base


def test_something_else_is_not_written_as_state(tmp_path):
    with pytest.raises(TypeError):
        save_state_dict({"a": object()}, tmp_path / "file")


@contextmanager
def full_disk():
    """Within it, no file can grow beyond 100 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "save", [save_tensors, save_state_dict, lambda tensors, path: write_text(path, str(tensors["a"].tolist()))]
)
def test_a_full_disk_is_told_with_the_file(tmp_path, save):
    with full_disk(), pytest.raises(OSError, match=r"(?i)file too large") as full:
        save({"a": torch.zeros(1000)}, tmp_path / "file")
    assert str(tmp_path / "file") in str(full.value)
    assert not (tmp_path / "file").exists() or save is not write_text


@pytest.mark.parametrize("load", [load_tensors, load_state_dict])
@pytest.mark.parametrize("content", [b"", b"\x89PNG", "half"])
def test_a_damaged_file_is_told_with_its_name(tmp_path, load, content):
    save_state_dict({"a": torch.zeros(1000)}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match="file is damaged .*: make it again, or remove it"):
        load(tmp_path / "file")


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
