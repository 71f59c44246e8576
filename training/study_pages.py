"""The page of a study: its tables between their markers, and its figures beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from folders import write_text
from study_figures import FIGURES, save
from study_tables import TABLES


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
    text = _fill(page.read_text(encoding="utf-8") if page.exists() else _new_page(folder), tables)
    for name, draw in FIGURES.items():
        save(draw(rows), folder / name)
    write_text(page, text)


def _fill(text: str, tables: dict[str, str]) -> str:
    """Replaces what is between the markers by the tables."""
    names = re.findall(r"<!-- table: (.*?) -->", text)
    for name in names:
        if name not in tables:
            raise ValueError(f"there is no table {name!r}: there are {', '.join(tables)}")
    filled, count = re.subn(
        r"<!-- table: (\w+) -->\n(?:(?!<!-- table: ).)*?<!-- end of table -->",
        lambda found: f"<!-- table: {found[1]} -->\n\n{tables[found[1]]}\n\n<!-- end of table -->",
        text,
        flags=re.DOTALL,
    )
    if count != len(names):
        raise ValueError(f"{len(names)} tables begin and {count} end: close each by <!-- end of table -->")
    return filled


def _new_page(folder: Path) -> str:
    figures = dict.fromkeys([*FIGURES, *sorted(path.name for path in folder.glob("*.png"))])
    tables = [f"## {name.replace('_', ' ')}\n\n<!-- table: {name} -->\n<!-- end of table -->\n" for name in TABLES]
    return "\n".join(["# Results\n", *tables, *(f"![{Path(name).stem}]({name})\n" for name in figures)])
