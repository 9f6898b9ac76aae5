"""Tables and sections of a report as plain text, for HTML, the terminal and Markdown, in which texts are escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing metrics loads torchmetrics and transformers, which model cards do not need
    from matplotlib.figure import Figure

    from latentreward.core.bootstrap import Interval


NOTHING = "–"  # Text of a cell whose value is not known
Row = Mapping[str, Any]
"""Result of an evaluation, as in ``report.json``: name → text, number, Interval, or counts by reason."""
Column = tuple[str, str | Callable[[Row], str]]
"""Heading, and the name of the value in each row or a function from the row to the text of the cell."""


@dataclass(frozen=True)
class Table:
    """A table whose cells are text."""

    columns: tuple[str, ...]  # headings of the columns
    rows: tuple[tuple[str, ...], ...]  # rows with one cell per column
    notes: str = ""  # what the table shows, written above it; may be empty
    theirs: bool = False  # whether the numbers were measured by others, such as the authors of a paper

    @classmethod
    def of(cls, rows: Iterable[Row], *columns: Column, notes: str = "", theirs: bool = False) -> Table:
        """Build a table from results; values are formatted by :func:`cell`."""
        cells = tuple(tuple(cell(row[how]) if isinstance(how, str) else how(row) for _, how in columns) for row in rows)
        return cls(tuple(heading for heading, _ in columns), cells, notes, theirs)


@dataclass(frozen=True)
class Section:
    """A section of a report."""

    title: str  # heading
    text: str  # explanation of the section's numbers; may be empty
    tables: Sequence[Table]  # tables of the section
    figures: Sequence[tuple[Figure, str]] = ()  # figures of the HTML page, each with a sentence of alternative text


def cell(value: Any) -> str:
    """Format a value: an Interval in percent, counts by reason as ``3 truncated, 1 missing file``, a float as ``0.4``.

    Counts that are all 0 become ``0``.
    """
    if isinstance(value, tuple):  # the only tuple among results is an Interval
        return with_interval(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return ", ".join(f"{number} {reason}" for reason, number in sorted(value.items()) if number) or "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """Format a fraction in percent, ``0.756`` as ``75.6``; NaN as :data:`NOTHING`."""
    return NOTHING if math.isnan(value) else f"{100 * value:.1f}"


def with_interval(estimate: Interval, show: Callable[[float], str] = percent) -> str:
    """Format an estimate and its confidence interval, as ``75.6 [70.2, 80.1]``; ``show`` formats each number."""
    return f"{show(estimate.value)} {interval(estimate, show)}"


def interval(estimate: Interval, show: Callable[[float], str] = percent) -> str:
    """Format a confidence interval, as ``[70.2, 80.1]``; one of few groups as ``[70.2, 80.1] (12 groups)``."""
    return f"[{show(estimate.low)}, {show(estimate.high)}]{few_groups(estimate)}"


def few_groups(estimate: Interval) -> str:
    """Return the text `` (12 groups)`` for an interval of too few groups, and an empty text for any other."""
    return f" ({estimate.groups} group{'' if estimate.groups == 1 else 's'})" if estimate.few else ""


def without_unset(identity: str) -> str:
    """Remove settings that are None, such as ``revision None``, from a scorer's identity."""
    return re.sub(r" \w+ None\b", "", identity)


def grouped(results: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group results by the values ``names``, None where a result lacks one; groups and results keep their order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for result in results:
        groups.setdefault(tuple(map(result.get, names)), []).append(result)
    return groups


def as_text(table: Table) -> str:
    """Format a table for the terminal, with aligned columns and without its notes."""
    lines = (table.columns, *table.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~&$])")
"""Pattern of the characters that are escaped."""


def plain(text: str) -> str:
    """Escape characters that are markup in Markdown or HTML, and put the text on one line."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """Convert a table to a Markdown pipe table, with its notes as heading."""
    lines = [[plain(cell) for cell in row] for row in (table.columns, *table.rows)]
    lines.insert(1, ["---"] * len(table.columns))
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"### {plain(table.notes)}\n\n{rows}" if table.notes else rows
