"""Reports as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from latentreward.metrics.bootstrap import Interval

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DIGITS = 10
"""Significant digits of numbers."""


def json_report(report: "DataclassInstance") -> str:
    """Write a report's fields by their names."""
    return json.dumps(plain_values(asdict(report)), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def plain_values(value: Any) -> Any:
    """In what JSON knows; NaN and infinity become null, other numbers are rounded to ``DIGITS`` digits."""
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
