"""Which cases of a test run always, which in `.ci/run` as well, and which for a release and on pushes to main alone."""

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import MarkDecorator, ParameterSet

RELEASE = (pytest.mark.slow, pytest.mark.release)


def slow_after(count: int, cases: Iterable[Any], *, release: int | None = None) -> list[ParameterSet]:
    """Mark cases of ``pytest.mark.parametrize`` after the first ``count`` as slow; a tuple holds a case's values.

    Those after the first ``release``, where given, are for a release.
    """
    marked = _marked_after(count, cases, (pytest.mark.slow,))
    return marked if release is None else release_after(release, marked)


def release_after(count: int, cases: Iterable[Any]) -> list[ParameterSet]:
    """Mark cases of ``pytest.mark.parametrize`` after the first ``count`` as slow ones for a release."""
    return _marked_after(count, cases, RELEASE)


def _marked_after(count: int, cases: Iterable[Any], marks: tuple[MarkDecorator, ...]) -> list[ParameterSet]:
    sets = [case if isinstance(case, ParameterSet) else pytest.param(*_values(case)) for case in cases]
    return [
        case if place < count else pytest.param(*case.values, id=case.id, marks=[*case.marks, *marks])
        for place, case in enumerate(sets)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
