"""What `import hsivi_diffusers` brings in, seen in a fresh interpreter."""

import json
import subprocess
import sys

import hsivi_diffusers

TRAINING = ["matplotlib", "ot", "pandas", "scipy", "sklearn", "torchmetrics", "torchvision", "tqdm.auto", "yaml"]
BASE = "from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel"


def modules_after(*lines):
    code = "\n".join(["import json, sys", *lines, "print(json.dumps(sorted(sys.modules)))"])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_training_dependency():
    added = modules_after(BASE, "import hsivi_diffusers") - modules_after(BASE)
    assert {name.split(".")[0] for name in added} - set(sys.stdlib_module_names) <= {"hsivi_diffusers", "diffusers"}
    assert not added & set(TRAINING)


def test_training_dependencies_need_not_be_there():
    block = f"for name in {['matplotlib', 'ot', 'sklearn', 'torchmetrics']}: sys.modules[name] = None"
    assert "hsivi_diffusers.distillation" in modules_after(block, "import hsivi_diffusers")


def test_public_names_exist():
    for name in hsivi_diffusers.__all__:
        assert hasattr(hsivi_diffusers, name)
    for name in hsivi_diffusers.vi.__all__:
        assert hasattr(hsivi_diffusers.vi, name)
