"""Which cases of a test run always, and which in `.ci/run` alone."""

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow_after(count: int, cases: Iterable[Any]) -> list[ParameterSet]:
    """Mark cases of ``pytest.mark.parametrize`` after the first ``count`` as slow; a tuple holds a case's values."""
    sets = [case if isinstance(case, ParameterSet) else pytest.param(*_values(case)) for case in cases]
    return [
        case if place < count else pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for place, case in enumerate(sets)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
