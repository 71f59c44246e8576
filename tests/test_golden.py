"""The save format: what earlier versions saved loads, and draws the same images."""

import json
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
folder = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(
    folder + "/pipeline", custom_pipeline=folder + "/pipeline", trust_remote_code=True
)
pictures = pipeline(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="np").images
wanted = load_file(folder + "/pictures.safetensors")["pictures"]
torch.testing.assert_close(torch.from_numpy(pictures), wanted, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("cls", [HSIVIPipeline, DiffusionPipeline])
def test_a_pipeline_of_an_earlier_version_draws_the_same_images(version, cls):
    pipeline = cls.from_pretrained(version / "pipeline")
    wanted = load_file(version / "pictures.safetensors")["pictures"]
    torch.testing.assert_close(draw(pipeline), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_the_code_saved_with_it_still_runs_without_the_package(version, tmp_path):
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", ALONE, str(version)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_this_version_saves_in_the_format_of_the_last_golden_folder(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    golden = VERSIONS[-1] / "pipeline"

    def files(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert files(tmp_path) == files(golden)
    for name in files(golden):
        if name.endswith(".json"):
            new, old = (json.loads((folder / name).read_text()) for folder in (tmp_path, golden))
            keys = (
                {"_diffusers_version"} if name != "unet/config.json" else set(new) ^ set(old) | {"_diffusers_version"}
            )
            # A later version may add settings, and none may go or change.
            assert {k: new.get(k) for k in old if k not in keys} == {k: v for k, v in old.items() if k not in keys}
