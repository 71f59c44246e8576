"""Who imports whom, and how long functions may be: the rules of docs/design.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hsivi_diffusers"
CORE = {"torch"}
HOST = {"torch", "diffusers", "huggingface_hub"}
# file: (imports from the package, imports from outside, standard library apart)
ALLOWED = {
    "vi/__init__": ({"vi/*"}, set()),
    "vi/distributions": (set(), CORE),
    "vi/bridges": ({"vi/distributions", "vi/targets/target"}, CORE),
    "vi/layers": ({"vi/distributions"}, CORE),
    "vi/chains": ({"vi/distributions", "vi/layers"}, CORE),
    "vi/objectives": ({"vi/distributions", "vi/bridges"}, CORE),
    "vi/curricula": (set(), CORE),
    "vi/fitting": ({"vi/bridges", "vi/chains", "vi/curricula", "vi/layers", "vi/objectives"}, CORE),
    "vi/networks": ({"vi/distributions"}, CORE),
    "vi/inference": (
        {f"vi/{noun}" for noun in ("bridges", "chains", "curricula", "diagnostics", "fitting", "layers", "networks")}
        | {"vi/objectives"},
        CORE,
    ),
    "vi/diagnostics": ({"vi/bridges", "vi/chains", "vi/distributions", "vi/layers", "vi/objectives"}, CORE),
    "vi/targets/__init__": ({f"vi/targets/{noun}" for noun in ("target", "plane", "posteriors", "whitened")}, set()),
    "vi/targets/target": (set(), CORE),
    "vi/targets/plane": ({"vi/targets/target"}, CORE),
    "vi/targets/posteriors": ({"vi/targets/target"}, CORE),
    "vi/targets/whitened": ({"vi/targets/target"}, CORE),
    "scheduling_hsivi": (set(), HOST),
    "modeling_hsivi": (set(), HOST),
    "pipeline_hsivi": (set(), HOST),
    "distillation": ({"vi/*", "scheduling_hsivi", "modeling_hsivi"}, {"torch", "diffusers"}),
    "model_card": ({"pipeline_hsivi"}, {"diffusers", "huggingface_hub", "PIL"}),
    "hub": ({"model_card", "pipeline_hsivi"}, {"torch", "diffusers", "huggingface_hub", "PIL"}),
    "__init__": ({"distillation", "hub", "scheduling_hsivi", "modeling_hsivi", "pipeline_hsivi"}, {"diffusers"}),
}
# The scripts that others may import, and the siblings they may import themselves; the rest are programs.
NOUNS = {
    "agreement": set(),
    "benchmark_targets": set(),
    "classifier": set(),
    "figures": set(),
    "folders": set(),
    "images": set(),
    "metrics": set(),
    "options": set(),
    "pages": set(),
    "solvers": set(),
    "checkpoints": {"folders", "options"},
    "recipe": {"checkpoints", "options"},
    "players": {"folders", "images", "recipe"},
    "monitor": {"classifier", "images", "metrics", "players", "recipe"},
    "plan": {"players", "recipe"},
    "target_fit": {"agreement", "benchmark_targets", "options"},
    "study": {"benchmark_targets", "folders", "target_fit"},
    "study_tables": {"study"},
    "study_figures": {"benchmark_targets", "study_tables", "target_fit"},
    "study_pages": {"folders", "pages", "study_figures", "study_tables"},
    "benchmark_pages": {"figures", "folders", "metrics", "pages"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "training").glob("*.py"))


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
    if "vi/*" in allowed_inside:
        allowed_inside = allowed_inside | {name for name in ALLOWED if name.startswith("vi/")}
    assert inside <= allowed_inside
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
    assert sorted(lengths.values())[int(0.9 * len(lengths))] < 25


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_what_the_table_allows(path):
    siblings = imports(path)[1] & {script.stem for script in SCRIPTS}
    assert siblings <= NOUNS.get(path.stem, set(NOUNS))


def test_the_package_imports_no_script():
    names = {path.stem for path in SCRIPTS}
    for path in FILES:
        assert not imports(path)[1] & names


def test_no_two_files_share_a_noun_that_says_nothing():
    assert not [path for path in [*FILES, *SCRIPTS] if path.stem in {"utils", "helpers", "common", "misc"}]
