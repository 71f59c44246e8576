"""The save format: what earlier versions saved loads, and draws the same images."""

import json
import shutil
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file

from hsivi_diffusers import HSIVINoiseScale, HSIVIPipeline, HSIVIScheduler
from make_golden import GOLDEN, draw, make_pipeline

VERSIONS = sorted(GOLDEN.iterdir())


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """The folder that this version saves."""
    folder = tmp_path_factory.mktemp("new")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("cls", [HSIVIPipeline, DiffusionPipeline])
def test_a_pipeline_of_an_earlier_version_draws_the_same_images(version, cls):
    pipeline = cls.from_pretrained(version / "pipeline")
    wanted = load_file(version / "pictures.safetensors")["pictures"]
    torch.testing.assert_close(draw(pipeline), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_with_the_code_of_this_version_it_runs_without_the_package(version, new, tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"
    shutil.copytree(version / "pipeline", folder)
    for code in new.rglob("*.py"):
        shutil.copy(code, folder / code.relative_to(new))
    for name in [name for name in sys.modules if name.startswith("hsivi_diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hsivi_diffusers", None)
    monkeypatch.setattr(diffusers, "__class__", type(diffusers).__base__)  # which knows no class of ours
    monkeypatch.delattr(diffusers.pipelines, "hsivi_diffusers")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    ours = HSIVIPipeline | HSIVIScheduler | HSIVINoiseScale
    assert not any(isinstance(part, ours) for part in (pipeline, pipeline.scheduler, pipeline.unet_noise_scale))
    wanted = load_file(version / "pictures.safetensors")["pictures"]
    torch.testing.assert_close(draw(pipeline), wanted, rtol=1e-4, atol=1e-4)


def test_this_version_saves_in_the_format_of_the_last_golden_folder(new):
    golden = VERSIONS[-1] / "pipeline"
    assert {name for name in files(new) if not name.endswith(".py")} == files(golden)
    for name in files(golden):
        if name.endswith(".json"):
            now, then = (json.loads((folder / name).read_text()) for folder in (new, golden))
            # A later version may add settings, and none may go or change; those of the UNet are diffusers'.
            kept = {*then} & {*now} if name == "unet/config.json" else {*then}
            kept -= {"_diffusers_version"}
            assert {key: now.get(key) for key in kept} == {key: then[key] for key in kept}
