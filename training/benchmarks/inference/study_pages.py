"""The page of a study: its tables between their markers, and its figures beside it."""

from __future__ import annotations

import json
from pathlib import Path

from hsivi_diffusers.evaluation.pages import fill_tables, new_parts
from hsivi_diffusers.folders import write_text

from .study_figures import FIGURES, save
from .study_tables import TABLES


def write_pages(folder: Path) -> None:
    """Makes the figures of a folder's results.json, and the tables of its index.md, between their markers.

    A page that does not exist is begun, with all tables and figures.

    Raises:
        ValueError: There are no results, or the page has a marker of an unknown name, or one without an end.
    """
    path, page = folder / "results.json", folder / "index.md"
    if not path.exists():
        raise ValueError(f"{path} is missing: do a study first, with --study")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    tables = {name: make(rows) for name, make in TABLES.items()}
    figures = [*dict.fromkeys([*FIGURES, *sorted(each.name for each in folder.glob("*.png"))])]
    old = page.read_text(encoding="utf-8") if page.exists() else "# Results\n" + new_parts([*TABLES], figures)
    text = fill_tables(old, tables)
    for name, draw in FIGURES.items():
        save(draw(rows), folder / name)
    write_text(page, text)
