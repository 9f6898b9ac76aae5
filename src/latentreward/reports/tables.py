"""Tables and sections of a report as plain text, shared by the Markdown, HTML and terminal output."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # importing metrics loads torchmetrics and transformers, which model cards do not need
    from latentreward.metrics.bootstrap import Interval

NOTHING = "–"
"""Text of a cell whose value is not known."""
Result = TypeVar("Result", bound=Any)


@dataclass(frozen=True)
class Table:
    """A table whose cells are text.

    Attributes:
        header: Names of the columns.
        rows: Rows with one cell per column.
        caption: Heading of the table; may be empty.
        theirs: Whether the numbers were measured by others, such as the authors of a paper.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    theirs: bool = False


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        key: Name of the section in links, and key of its figures.
        title: Heading.
        text: Explanation of the section's numbers; may be empty.
        tables: Tables of the section.
    """

    key: str
    title: str
    text: str
    tables: tuple[Table, ...]


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


def grouped(results: Iterable[Result], *names: str) -> dict[tuple[Any, ...], list[Result]]:
    """Group results by the values of the attributes ``names``; groups and results keep their order."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result, name) for name in names), []).append(result)
    return groups


def as_text(table: Table) -> str:
    """Format a table for the terminal, with aligned columns and without caption."""
    lines = (table.header, *table.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
