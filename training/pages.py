"""Pages with tables that are made from results, between markers; the text around them is written by hand."""

from __future__ import annotations

import re


def fill_tables(text: str, tables: dict[str, str]) -> str:
    """Replaces what is between the markers `<!-- table: name -->` and `<!-- end of table -->` by the tables.

    Raises:
        ValueError: A marker has an unknown name, or no end.
    """
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


def new_page(title: str, tables: list[str], figures: list[str]) -> str:
    """A page with every table between markers, and every figure."""
    return "\n".join([f"# {title}\n", *map(table_section, tables), *map(figure_line, figures)])


def table_section(name: str) -> str:
    """A heading, and the markers of a table."""
    return f"## {name.replace('_', ' ')}\n\n<!-- table: {name} -->\n<!-- end of table -->\n"


def figure_line(name: str) -> str:
    """A figure that lies beside the page."""
    return f"![{name.rsplit('.', 1)[0]}]({name})\n"
