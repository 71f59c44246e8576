"""Frozen weights that are split over processes: the numbers of one process, and less memory in each."""

import json
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from hsivi_diffusers.distillation import sharding
from hsivi_diffusers.distillation.sharding import check_sharding, shard_base
from hsivi_diffusers.teachers.adapters import add_adapter
from hsivi_diffusers.teachers.loading import load_teacher
from slow import others_slow
from tiny_flows import FLOWS, make_flow, size_of
from tiny_text import make_text

PROMPTS = "a red cat", "a blue star", "a green dog"
SHORT = {"guidance_scale": 3.0, "lora_rank": 2, "max_train_steps": 3, "critic_updates": 1, "checkpointing_steps": 2}
MAKE = {"sdxl": partial(make_text, "sdxl")} | {kind: partial(make_flow, kind) for kind in FLOWS}
SPLIT = {"shard_base": "true", "validation_steps": 1}  # grids, for which the processes gather weights together


@pytest.fixture
def two_processes():
    """A group of two, of which only this one is there: enough to split, and not to gather."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", others_slow(MAKE, "sdxl", "zimage"))
def test_networks_keep_half_of_what_they_share_and_all_that_is_trained(kind, two_processes):
    teacher = load_teacher(MAKE[kind]())
    players = [add_adapter(teacher.network, teacher.adapter, 2) for _ in range(2)]
    before = {name: weight.numel() for name, weight in teacher.network.named_parameters()}
    adapters = [
        {name: weight.clone() for name, weight in each.named_parameters() if "lora" in name} for each in players
    ]
    shard_base([teacher.network, *players], torch.device("cpu"))
    base = dict(teacher.network.named_parameters())
    kept = {name: weight.to_local().numel() for name, weight in base.items()}
    assert sum(kept.values()) < 0.6 * sum(before.values())  # some have an odd number of rows
    places = {weight.to_local().data_ptr() for weight in base.values()}
    for player, adapter in zip(players, adapters, strict=True):
        own = dict(player.named_parameters())
        assert {name for name, weight in own.items() if weight.requires_grad} == adapter.keys()
        for name, weight in own.items():
            if name in adapter:
                assert torch.equal(weight, adapter[name])
            else:
                assert weight.to_local().data_ptr() in places


@pytest.fixture(scope="module")
def run(launch, distil, tmp_path_factory):
    """Does a run of a kind, or what is left of one, in two processes of their own, or in this one with two batches."""
    folder = tmp_path_factory.mktemp("teachers")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    @cache
    def teacher(kind):
        MAKE[kind]().save_pretrained(folder / kind)
        return folder / kind

    def do(output_dir, kind, processes=2, status=0, kill=None, **options):
        options |= {"resolution": tuple(size_of(make_flow(kind)))} if kind in FLOWS else {}
        options = {**SHORT, "pretrained_teacher_model": teacher(kind), "prompts": prompts, **options}
        options["gradient_accumulation_steps"] = 2 // processes
        if processes == 1:
            return distil(output_dir, **options)
        statuses, text = launch(output_dir, processes=processes, kill=kill, **options)
        assert statuses == [status] * 2, text
        return output_dir

    return do


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of a kind in one process."""
    folders = tmp_path_factory.mktemp("whole")
    return cache(lambda kind: run(folders / kind, kind, processes=1))


def tensors(folder):
    """The weights at the end: trained ones, averages and moments."""
    paths = [*folder.glob("checkpoints/checkpoint-3/*.safetensors"), *folder.glob("*/pytorch_lora_weights.safetensors")]
    return {f"{path.parent.name}/{path.stem}/{name}": each for path in paths for name, each in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "then"),
    [
        ("sd3", {"processes": 1, "shard_base": "false"}),
        *(pytest.param(kind, SPLIT, marks=pytest.mark.slow) for kind in MAKE),
    ],
)
def test_a_split_run_resumes_to_the_weights_of_one_process(run, whole, tmp_path, kind, then):
    """Split again or not; gathered weights have other addresses, and so may sums of convolutions."""
    folder = tmp_path / "run"
    run(folder, kind, status=75, kill={"point": "SIGTERM", "step": 2}, **SPLIT)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    run(folder, kind, resume_from_checkpoint="latest", **then)
    assert json.loads((folder / "training.json").read_text())["processes"] == then.get("processes", 2)
    found, wanted = tensors(folder), tensors(whole(kind))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_longer_split_run_stays_with_that_of_one_process(run, tmp_path):
    given = {"max_train_steps": 20, "checkpointing_steps": 20}
    one, two = run(tmp_path / "one", "sd3", processes=1, **given), run(tmp_path / "two", "sd3", **given, **SPLIT)
    found, wanted = tensors(two), tensors(one)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "processes", "refusal"),
    [
        ({"peft_config": {}}, 1, "splits weights over processes, and there is one: start several"),
        ({}, 2, "this run trains all weights: set lora_rank"),
        ({"peft_config": {}, "is_quantized": True}, 2, "cannot split quantised weights"),
    ],
)
def test_what_cannot_be_split_is_refused(network, processes, refusal):
    with pytest.raises(ValueError, match=refusal):
        check_sharding(SimpleNamespace(**network), SimpleNamespace(num_processes=processes))


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(sharding, "fully_shard", lambda module, *, mesh: None)
    with pytest.raises(ValueError, match=r"needs torch 2\.7, and .* is installed"):
        check_sharding(SimpleNamespace(peft_config={}), SimpleNamespace(num_processes=2))


def test_one_process_is_refused_before_its_folder_is_made(distil, text_teachers, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    given = {**SHORT, "pretrained_teacher_model": text_teachers("sd"), "prompts": prompts}
    with pytest.raises(ValueError, match="there is one: start several"):
        distil(tmp_path / "run", shard_base="true", **given)
    assert not (tmp_path / "run").exists()
