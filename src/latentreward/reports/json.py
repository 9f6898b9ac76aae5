"""Writing of reports as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from latentreward.metrics.bootstrap import Interval

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DIGITS = 10
"""Number of significant digits to which numbers are rounded."""


def json_report(report: "DataclassInstance") -> str:
    """Convert a report to JSON text, with an entry for each field."""
    return json.dumps(plain_values(asdict(report)), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def plain_values(value: Any) -> Any:
    """Convert ``value`` to types of JSON; NaN and infinity become None.

    Other floats are rounded to ``DIGITS`` significant digits.
    """
    if isinstance(value, Interval):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None
