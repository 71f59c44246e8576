"""docs/distil.ipynb runs from its first cell to its last."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parents[2] / "docs"
SETTINGS = 'TEACHER = "../assets/digits_ddpm"\nOUTPUT_DIR = {folder!r}\nUPDATES = 2'


def test_the_notebook_distils_and_shows_images(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = nbformat.read(DOCS / "distil.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    settings, training, *shown = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert settings.source.startswith('TEACHER = "../assets/digits_ddpm"')
    settings.source = SETTINGS.format(folder=str(tmp_path / "run"))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    assert "network calls" in training.outputs[-1]["data"]["text/plain"]
    for cell in shown:
        assert "image/png" in cell.outputs[-1]["data"]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
