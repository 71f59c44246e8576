"""Who may import whom: the four rules of docs/design.md."""

import ast
from pathlib import Path
from sys import stdlib_module_names

import pytest

from hsivi_diffusers.teachers.loading import KINDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hsivi_diffusers"
FILES = sorted(PACKAGE.rglob("*.py"))
HOSTS = {"scheduling_hsivi", "modeling_hsivi", "pipeline_hsivi"}


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path):
    """Names of the package's files and of outside packages that a file imports, anywhere in it."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                modules = (base / alias.name, base, base / "__init__")
                inside.add(name_of(next(each for each in modules if each.with_suffix(".py").is_file())))
        elif isinstance(node, ast.ImportFrom):
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside - stdlib_module_names


GRAPH = {name_of(path): imports(path) for path in FILES}


def test_the_method_needs_torch_alone():
    for name, (inside, outside) in GRAPH.items():
        if name.startswith("vi/"):
            assert outside <= {"torch"}, name
            assert {each for each in inside if not each.startswith("vi/")} == set(), name


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_a_file_that_travels_with_the_weights_imports_no_sibling(name):
    inside, outside = GRAPH[name]
    assert inside == set()
    assert outside <= {"torch", "diffusers"}


def test_the_package_imports_no_program_of_a_clone():
    assert [name for name, (_, outside) in GRAPH.items() if "training" in outside] == []


def test_there_is_no_cycle():
    done = set()
    while ready := {name for name, (needs, _) in GRAPH.items() if name not in done and needs <= done}:
        done |= ready
    assert done == set(GRAPH)


def words(path):
    """Names, attributes and texts of a file's code, without its docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_only_a_teacher_knows_its_kind():
    """Only the folder `teachers` distinguishes kinds of models and of noise schedules."""
    kinds = {name for kind in KINDS for name in (kind.__name__, kind.network_class.__name__, *kind.pipelines)}
    asked = kinds | {"is_flow", "vae"}
    for path in FILES:
        if name_of(path).split("/")[0] not in {"teachers", "vi", *HOSTS}:
            assert asked.isdisjoint(words(path)), path
