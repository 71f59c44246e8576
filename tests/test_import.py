"""What `import hsivi_diffusers` brings in, seen in a fresh interpreter."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDPMPipeline

import hsivi_diffusers
import hsivi_diffusers.vi
from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from tiny_unet import make_unet

TRAINING = ["matplotlib", "ot", "pandas", "scipy", "sklearn", "torchmetrics", "torchvision", "tqdm.auto", "yaml"]
BASE = "from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel"
STAR = "from hsivi_diffusers import *"


def run(*lines):
    code = "\n".join(["import json, sys", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def modules_after(*lines):
    return set(run(*lines, "print(json.dumps(sorted(sys.modules)))"))


def test_importing_all_names_imports_no_training_dependency():
    added = modules_after(BASE, STAR) - modules_after(BASE)
    assert {name.split(".")[0] for name in added} - set(sys.stdlib_module_names) <= {"hsivi_diffusers", "diffusers"}
    assert not added & set(TRAINING)


def test_training_dependencies_need_not_be_there():
    block = f"for name in {['matplotlib', 'ot', 'sklearn', 'torchmetrics']}: sys.modules[name] = None"
    assert "hsivi_diffusers.distillation" in modules_after(block, STAR)


def test_the_core_loads_no_diffusers_and_the_package_not_even_torch():
    assert "torch" not in modules_after("import hsivi_diffusers")
    loaded = modules_after("import hsivi_diffusers", "hsivi_diffusers.vi.Inference")
    assert "torch" in loaded
    assert not {"diffusers", "huggingface_hub", "hsivi_diffusers.distillation"} & loaded


def test_public_names_exist():
    assert set(hsivi_diffusers.__all__) < set(dir(hsivi_diffusers))
    for name in hsivi_diffusers.__all__:
        assert getattr(hsivi_diffusers, name).__name__ == name
    for name in hsivi_diffusers.vi.__all__:
        assert hasattr(hsivi_diffusers.vi, name)
    with pytest.raises(AttributeError, match="module 'hsivi_diffusers' has no attribute 'nothing'"):
        hsivi_diffusers.nothing  # noqa: B018


def test_type_checkers_see_the_names():
    tree = ast.parse(Path(hsivi_diffusers.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname for line in block.body for alias in line.names} == {*hsivi_diffusers._MODULES}


ORDERS = {
    "package first": ["import hsivi_diffusers", "from diffusers import DiffusionPipeline"],
    "diffusers first": ["from diffusers import DiffusionPipeline", "import hsivi_diffusers"],
    "a module first": ["import hsivi_diffusers.pipeline_hsivi", "from diffusers import DiffusionPipeline"],
    "after a look": [
        "import importlib.util, hsivi_diffusers.vi",
        "assert importlib.util.find_spec('diffusers').loader.get_filename()",
        "from diffusers import DiffusionPipeline",
    ],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    teacher = DDPMPipeline(make_unet(), HSIVIScheduler(layer_timesteps=[440, 0]))
    HSIVIPipeline(unet=teacher.unet, scheduler=teacher.scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_diffusers_loads_a_saved_pipeline_in_either_order(saved, order):
    """With the code of the package, not with that of the repo."""
    seen = run(
        *order,
        f"pipeline = DiffusionPipeline.from_pretrained({str(saved)!r})",
        "import diffusers, hsivi_diffusers",
        "assert type(pipeline) is diffusers.HSIVIPipeline is hsivi_diffusers.HSIVIPipeline",
        "assert type(pipeline.scheduler) is hsivi_diffusers.HSIVIScheduler",
        "left = [finder for finder in sys.meta_path if type(finder).__module__.startswith('hsivi')]",
        "print(json.dumps(len(left)))",
    )
    assert seen == 0
