"""Pages of results: tables between markers in a text by hand, the day and the machine."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import diffusers
import torch

from ..runs.folders import write_text


def write_table(heads: Sequence[str], left: Collection[str], lines: Iterable[Sequence[object]]) -> str:
    """A table of Markdown, whose columns are flush right, but for those of the heads in `left`."""
    rule = "|".join("---" if head in left else "---:" for head in heads)
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *lines))
    return "\n".join([first, f"|{rule}|", *others])


def fill_tables(text: str, tables: dict[str, str]) -> str:
    """Replaces what is between the markers `<!-- table: name -->` and `<!-- end of table -->` by the tables.

    Raises:
        ValueError: A marker has an unknown name, or no end.
    """

    def fill(found: re.Match[str]) -> str:
        if found[1] not in tables:
            raise ValueError(f"there is no table {found[1]!r}: there are {', '.join(tables)}")
        return f"<!-- table: {found[1]} -->\n\n{tables[found[1]]}\n\n<!-- end of table -->"

    marked = r"<!-- table: ([^\n]*?) -->\n(?:(?!<!-- table: ).)*?<!-- end of table -->"
    filled, count = re.subn(marked, fill, text, flags=re.DOTALL)
    if count != (begun := text.count("<!-- table: ")):
        raise ValueError(f"{begun} tables begin and {count} end: close each by <!-- end of table -->")
    return filled


def fill_page(page: Path, title: str, tables: dict[str, str], files: Sequence[str] = ()) -> None:
    """Fills the tables of a page, which is begun if there is none, and adds those, figures and files that it lacks."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n"
    lacking = [table for table in tables if f"<!-- table: {table} -->" not in text]
    there = [file for file in files if f"({file})" not in text and (page.parent / file).exists()]
    write_text(page, fill_tables(text + new_parts(lacking, there), tables))


def new_parts(tables: list[str], files: list[str]) -> str:
    """What a page without them gets: a section with markers for every table, then figures and files beside it."""
    sections = [f"\n## {name.replace('_', ' ')}\n\n<!-- table: {name} -->\n<!-- end of table -->\n" for name in tables]
    links = (f"{'!' * name.endswith('.png')}[{name.rsplit('.', 1)[0]}]({name})" for name in files)
    return "".join([*sections, *(f"\n{link}\n" for link in links)])


def measured_on() -> str:
    """Day, machine and versions of a measurement."""
    return (
        f"{datetime.date.today()}, {platform.machine()} with {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"thread(s), torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
