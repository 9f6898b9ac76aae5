"""The table of results that all reports are made of: a column for each name that the rows have."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from latentreward.core.bootstrap import Interval
from latentreward.core.reports.tables import NOTHING, Row, Table, cell, percent, with_interval


def number(value: float) -> str:
    """Format a score with 2, 3 or 4 digits after the point, the more the smaller: ``21.69``, ``5.468``, ``-0.0080``."""
    if math.isnan(value):
        return NOTHING
    digits = 4 if abs(value) < 1 else 3 if abs(value) < 10 else 2
    return f"{value:.{digits}f}"


def signed(value: float) -> str:
    """Format a difference like :func:`number`, with ``+`` before a positive value."""
    return f"+{number(value)}" if value > 0 else number(value)


def temperature(value: float) -> str:
    """Format a temperature with three digits; inf means that larger gaps do not win more often."""
    return f"{value:.3g}" if math.isfinite(value) else "none (larger gaps do not win)"


def correlation(value: float) -> str:
    """Format a correlation with two digits after the point, and never as ``-0.00``."""
    return NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


def details(values: Row) -> str:
    """Format further results of a protocol that are numbers or texts."""
    parts = []
    for name, value in values.items():
        if isinstance(value, (str, int, float)):
            shown = temperature(value) if name == "temperature" else f"{value:.4g}" if value != str(value) else value
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts) or NOTHING


def numbers(show: Callable[[float], str]) -> Callable[[Interval | float | None], str]:
    """Return the format of an interval, or of a number without one, whose numbers ``show`` formats."""

    def formatted(value: Interval | float | None) -> str:
        return NOTHING if value is None else with_interval(value, show) if isinstance(value, Interval) else show(value)

    return formatted


HEADINGS = {
    "benchmark": "data",
    "scorer": "model",
    "first": "model",
    "second": "against",
    "sigma": "noise level",
    "estimate": "accuracy %",
    "value": "accuracy %",
    "win_rate": "win rate %",
    "error": "calibration error %",
    "pair": "same choice %",
    "excluded": "pairs left out",
    "details": "more",
}
"""Name of a value → heading of its column; other headings are the names."""
FORMATS: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(("mean", "mean_of_groups", "parts_sd"), numbers(number)),
    **dict.fromkeys(("spearman", "pearson"), numbers(correlation)),
    "difference": numbers(signed),
    "value": lambda value: percent(value) if isinstance(value, float) else cell(value),  # published, or a sub-group's
    "temperature": temperature,
    "details": details,
}
"""Name of a value → format; of others :func:`cell`, which shows intervals in percent."""
HIDDEN = ("curve", "headline", "remarks_of_the_reader")
"""Names of values that only ``report.json`` has."""


def result_table(
    rows: Sequence[Row], notes: str = "", *, hidden: Sequence[str] = (), theirs: bool = False, **headings: str
) -> Table:
    """Build the table of results of one kind, without ``hidden`` names, with other ``headings`` for some."""
    shown = [name for name in rows[0] if name not in (*HIDDEN, *hidden)]

    def text(row: Row, name: str) -> str:
        return FORMATS.get(name, cell)(row[name])

    heading = {name: name.replace("_", " ") for name in shown} | HEADINGS | headings
    columns = [(heading[name], partial(text, name=name)) for name in shown]
    return Table.of(rows, *columns, notes=notes, theirs=theirs)
