"""Reports as Markdown; texts of others cannot become markup in it."""

import re
from collections.abc import Iterable

from latentreward.reports.tables import Section, Table

MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~&$])")


def markdown_report(title: str, notes: Iterable[str], introduction: str, sections: Iterable[Section]) -> str:
    """Write a report; notes stand out before the introduction."""
    parts = [f"# {plain(title)}", *(f"> **{plain(note)}**" for note in notes), introduction]
    for section in sections:
        parts += [f"## {plain(section.title)}", section.text, *map(markdown_table, section.tables)]
    return "\n\n".join(filter(None, parts)) + "\n"


def plain(text: str) -> str:
    """On one line, with what Markdown or HTML would take as markup escaped."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """A pipe table, under its caption."""
    lines = [[plain(cell) for cell in row] for row in (table.header, *table.rows)]
    lines.insert(1, ["---"] * len(table.header))
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"### {plain(table.caption)}\n\n{rows}" if table.caption else rows
