"""Tables and sections of a report as text, which Markdown, HTML and the terminal show alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # metrics loads torchmetrics and transformers, and model cards need a table alone
    from latentreward.metrics.bootstrap import Interval

NOTHING = "–"
Result = TypeVar("Result", bound=Any)


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        header: Names of the columns.
        rows: As many cells each.
        caption: What the rows have in common.
        theirs: Whether others measured what it shows.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    theirs: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        key: Name for links and for its figures.
        title: Heading.
        text: What it shows, and how it was computed; may be empty.
        tables: Its tables.
    """

    key: str
    title: str
    text: str
    tables: tuple[Table, ...]


def percent(value: float) -> str:
    """``0.756`` as ``75.6``."""
    return NOTHING if math.isnan(value) else f"{100 * value:.1f}"


def with_interval(estimate: Interval, show: Callable[[float], str] = percent) -> str:
    """``75.6 [70.2, 80.1]``, each number as ``show`` writes it."""
    return f"{show(estimate.value)} {interval(estimate, show)}"


def interval(estimate: Interval, show: Callable[[float], str] = percent) -> str:
    """``[70.2, 80.1]``, of few groups ``[70.2, 80.1] (12 groups)``."""
    return f"[{show(estimate.low)}, {show(estimate.high)}]{few_groups(estimate)}"


def few_groups(estimate: Interval) -> str:
    """`` (12 groups)`` behind an interval of so few that it is too narrow; empty for others."""
    return f" ({estimate.groups} group{'' if estimate.groups == 1 else 's'})" if estimate.few else ""


def without_unset(identity: str) -> str:
    """A scorer's identity without settings that are None, such as ``revision None``."""
    return re.sub(r" \w+ None\b", "", identity)


def grouped(results: Iterable[Result], *names: str) -> dict[tuple[Any, ...], list[Result]]:
    """Results by values of their attributes, in their order."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result, name) for name in names), []).append(result)
    return groups


def as_text(table: Table) -> str:
    """Columns of one width each, for the terminal."""
    lines = (table.header, *table.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
