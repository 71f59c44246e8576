"""What `import hsivi_diffusers` brings in, seen in a fresh interpreter."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

import hsivi_diffusers
import hsivi_diffusers.vi
from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from hsivi_diffusers.commands.options import EXTRAS
from hsivi_diffusers.share.registration import register
from tiny_unet import make_unet

TRAINING = ["matplotlib", "ot", "pandas", "scipy", "sklearn", "torchmetrics", "torchvision", "tqdm.auto", "yaml"]
EVALUATION = ["efficientnet_lite_pytorch", "fontTools", "matplotlib", "ot", "prdc", "sklearn", "torchmetrics"]


def run(*lines):
    code = "\n".join(["import json, sys", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tell(value):
    return f"print(json.dumps({value}))"


def test_public_names_exist():
    assert set(hsivi_diffusers.__all__) < set(dir(hsivi_diffusers))
    for name in hsivi_diffusers.__all__:
        assert getattr(hsivi_diffusers, name).__name__ == name
    for name in hsivi_diffusers.vi.__all__:
        assert hasattr(hsivi_diffusers.vi, name)
    with pytest.raises(AttributeError, match="module 'hsivi_diffusers' has no attribute 'nothing'"):
        hsivi_diffusers.nothing  # noqa: B018


def test_a_name_that_needs_an_extra_says_which(monkeypatch):
    monkeypatch.delitem(hsivi_diffusers.__dict__, "HSIVITrainer", raising=False)
    for module in [name for name in sys.modules if name.startswith("hsivi_diffusers.distillation")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    message = 'HSIVITrainer needs accelerate, which is missing: pip install "hsivi-diffusers[train]"'
    with pytest.raises(ImportError, match=re.escape(message)):
        from hsivi_diffusers import HSIVITrainer  # noqa: F401


def test_type_checkers_see_the_names():
    tree = ast.parse(Path(hsivi_diffusers.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname for line in block.body for alias in line.names} == {*hsivi_diffusers._MODULES}


# ----- what a process imports, and in which order: each costs seconds, so each tells several things -----


def test_what_a_command_refuses_by_its_options_alone_costs_no_import_of_torch():
    asked = [["--help"], ["distil", "--help"], ["plan", "--num_inference_steps", "x"], ["sample", "--num_samples", "0"]]
    asked += [["push"], ["export"], ["distil", "--num_inference_steps", "0"]]
    lines = ["import contextlib", "from hsivi_diffusers.commands import cli"]
    for words in asked:
        lines += ["with contextlib.suppress(SystemExit):", f"    cli.main({words})"]
    assert run(*lines, tell("[name for name in ('torch', 'diffusers') if name in sys.modules]")) == []


@pytest.fixture
def load(tmp_path):
    """Lines that load a saved pipeline with diffusers: with the code of the package, not with that of the repo."""
    HSIVIPipeline(unet=make_unet(), scheduler=HSIVIScheduler(layer_timesteps=[440, 0])).save_pretrained(tmp_path)
    return [
        f"pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r})",
        "import diffusers, hsivi_diffusers",
        "assert type(pipeline) is diffusers.HSIVIPipeline is hsivi_diffusers.HSIVIPipeline",
        "assert type(pipeline.scheduler) is hsivi_diffusers.HSIVIScheduler",
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('hsivi')]",
    ]


@pytest.mark.slow
def test_a_module_first_and_distillation_imports_no_package_of_evaluation(load):
    order = ["import hsivi_diffusers.pipeline_hsivi", "from diffusers import DiffusionPipeline"]
    programs = "import hsivi_diffusers.distillation.trainer, hsivi_diffusers.commands.evaluate"
    imported = run(*order, *load, programs, tell("[*sys.modules]"))
    assert "hsivi_diffusers.distillation.trainer" in imported
    brought = {"sklearn"} if version("transformers") < "5" else set()  # by transformers itself
    assert not {*imported} & ({*EVALUATION} - brought)


def packages(modules):
    return {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_the_core_loads_torch_alone_and_all_names_no_training_dependency(load):
    """Diffusers may be looked for before it is imported, and what only training needs may be missing."""
    core, added = run(
        "import torch",
        f"for name in {['matplotlib', 'ot', 'sklearn', 'torchmetrics']}: sys.modules[name] = None",
        "before = {*sys.modules}",
        "import hsivi_diffusers",
        "hsivi_diffusers.vi.Inference",
        "core = [*{*sys.modules} - before]",
        "import importlib.util",
        "assert importlib.util.find_spec('diffusers').loader.get_filename()",
        "from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel",
        "before = {*sys.modules}",
        *load,
        "from hsivi_diffusers import *",
        tell("[core, [*{*sys.modules} - before]]"),
    )
    assert packages(core) <= {"hsivi_diffusers", "torch"}
    assert "hsivi_diffusers.distillation" not in core
    assert "hsivi_diffusers.distillation" in added
    assert packages(added) <= {"hsivi_diffusers", "diffusers", "huggingface_hub"}
    assert not {*added} & {*TRAINING}


@pytest.mark.slow
def test_a_student_is_drawn_and_measured_without_the_packages_that_train(tmp_path):
    """Those of the extra train, and transformers, which one of them brings; huggingface_hub brings filelock."""
    student = Path(__file__).parents[1] / "assets" / "students" / "digits_t4" / "pipeline"
    words = ["sample", f"--pipeline={student}", "--num_samples=1", f"--output_dir={tmp_path / 'drawn'}", "--device=cpu"]
    missing = run(
        f"missing = {[*{*EXTRAS['train'], 'transformers'} - {'filelock'}]}",
        "for name in missing: sys.modules[name] = None",
        "from hsivi_diffusers.commands import cli",
        f"cli.main({words})",
        "import hsivi_diffusers.commands.evaluate, hsivi_diffusers.share.push",
        "print()",
        tell("[name for name in missing if sys.modules[name] is not None]"),
    )
    assert missing == []
    assert len([*(tmp_path / "drawn").rglob("*.png")]) > 0


def test_a_diffusers_that_is_imported_later_knows_the_pipeline(tmp_path, monkeypatch):
    """Here one that stands for it, in this process."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("class pipelines:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "diffusers")
    package = SimpleNamespace(HSIVIPipeline=object())
    monkeypatch.setitem(sys.modules, "a_package", package)
    before = [*sys.meta_path]
    register("a_package")
    assert importlib.util.find_spec("no_such_module") is None
    assert importlib.util.find_spec("diffusers").origin.startswith(str(tmp_path))
    assert len(sys.meta_path) == len(before) + 1
    diffusers = importlib.import_module("diffusers")
    assert diffusers.HSIVIPipeline is package.HSIVIPipeline
    assert diffusers.pipelines.a_package is package
    assert sys.meta_path == before


def test_a_folder_of_its_name_does_not_hide_the_package(tmp_path):
    """Python runs in the folder above a clone."""
    (tmp_path / "hsivi_diffusers").mkdir()
    code = "from hsivi_diffusers import __version__"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True)
