"""Writing of reports as Markdown; texts such as prompts are escaped, so that they cannot become markup."""

import re
from collections.abc import Iterable

from latentreward.reports.tables import Section, Table

MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~&$])")
"""Pattern of the characters that are escaped."""


def markdown_report(title: str, notes: Iterable[str], introduction: str, sections: Iterable[Section]) -> str:
    """Convert a report to Markdown text.

    ``notes`` are shown in bold before the introduction. Introduction and texts of sections are Markdown and are not
    escaped; titles and tables are.
    """
    parts = [f"# {plain(title)}", *(f"> **{plain(note)}**" for note in notes), introduction]
    for section in sections:
        parts += [f"## {plain(section.title)}", section.text, *map(markdown_table, section.tables)]
    return "\n\n".join(filter(None, parts)) + "\n"


def plain(text: str) -> str:
    """Escape characters that are markup in Markdown or HTML, and put the text on one line."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """Convert a table to a Markdown pipe table, with its notes as heading."""
    lines = [[plain(cell) for cell in row] for row in (table.columns, *table.rows)]
    lines.insert(1, ["---"] * len(table.columns))
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"### {plain(table.notes)}\n\n{rows}" if table.notes else rows
