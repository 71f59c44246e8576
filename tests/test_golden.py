"""The save format: what earlier versions saved loads, and draws the same images."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline
from make_golden import GOLDEN, draw, make_pipeline

VERSIONS = sorted(GOLDEN.iterdir())
ALONE = """
import sys
sys.modules["hsivi_diffusers"] = None
from diffusers import DiffusionPipeline
import torch
from safetensors.torch import load_file
folder, wanted = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipeline(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="np").images
torch.testing.assert_close(torch.from_numpy(images), load_file(wanted)["pictures"], rtol=1e-4, atol=1e-4)
"""


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
def test_with_the_code_of_this_version_it_runs_without_the_package(version, new, tmp_path):
    shutil.copytree(version / "pipeline", tmp_path / "pipeline")
    for code in new.rglob("*.py"):
        shutil.copy(code, tmp_path / "pipeline" / code.relative_to(new))
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "pipeline"), str(version / "pictures.safetensors")]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
