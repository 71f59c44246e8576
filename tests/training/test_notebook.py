"""The notebooks of docs run from their first cell to their last."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[2] / "docs"
SETTINGS = 'TEACHER = "../assets/digits_ddpm"\nOUTPUT_DIR = {folder!r}\nUPDATES = 2'


@pytest.fixture
def notebook(tmp_path):
    """With two updates, into tmp_path / "run"."""
    notebook = nbformat.read(DOCS / "distil.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert settings.source.startswith('TEACHER = "../assets/digits_ddpm"')
    settings.source = SETTINGS.format(folder=str(tmp_path / "run"))
    return notebook


def run_cell(source, names):
    """Runs a cell and returns the value of its last line, which a notebook shows."""
    *lines, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        return exec(source, names)
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_distils_and_shows_images(notebook, tmp_path, monkeypatch):
    """Without Jupyter, which needs a process that imports everything again."""
    monkeypatch.chdir(DOCS)
    names = {}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    _, trained, *shown = [run_cell(source, names) for source in code]
    assert "network calls" in trained
    assert len(shown) == 2
    for image in shown:
        assert image._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(notebook, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    _, training, *shown = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "network calls" in training.outputs[-1]["data"]["text/plain"]
    for cell in shown:
        assert "image/png" in cell.outputs[-1]["data"]


@pytest.mark.slow
def test_the_notebook_of_inference_finds_the_posterior(monkeypatch):
    """With what it prints last: the largest error of a mean and ratios of standard deviations."""
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    infer = nbformat.read(DOCS / "infer.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in infer.cells)
    notebook = NotebookClient(infer, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    *_, compared, figure = (cell for cell in notebook.cells if cell.cell_type == "code")
    errors, ratios = (
        [float(number) for number in re.findall(r"\d+\.\d+", line)] for line in compared.outputs[0]["text"].splitlines()
    )
    assert max(errors) < 0.1
    assert 0.9 < min(ratios) <= max(ratios) < 1.1
    assert "image/png" in figure.outputs[-1]["data"]
