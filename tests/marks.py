"""Which cases of a test run always, which in `.ci/run` as well, and which for a release and on pushes to main alone."""

from collections import Counter
from collections.abc import Iterable
from typing import Any
from zlib import crc32

import pytest
from _pytest.mark import MarkDecorator, ParameterSet

RELEASE = (pytest.mark.slow, pytest.mark.release)
ROTATED = (pytest.mark.slow, pytest.mark.rotated)
TURNS = 8
"""A run for one commit has every eighth of a test's rotated cases."""
WITH_ITS_FILE = [pytest.mark.slow, pytest.mark.rotated(by="file")]
"""Marks of slow tests of a file that share what takes minutes: they all run for every eighth commit."""


def slow_after(count: int, cases: Iterable[Any]) -> list[ParameterSet]:
    """Mark cases of ``pytest.mark.parametrize`` after the first ``count`` as slow; a tuple holds a case's values.

    For what every run should try: trust, resuming, durability, and formulas that no other test has.
    """
    return _marked_after(count, cases, (pytest.mark.slow,))


def rotated_after(count: int, cases: Iterable[Any], *, release: int | None = None) -> list[ParameterSet]:
    """Mark cases after the first ``count`` as slow ones of which `.ci/run` takes an eighth, another one per commit.

    For grids over families, configs, layouts and rows, whose cases repeat one promise. Those after the first
    ``release``, where given, are for a release.
    """
    marked = _marked_after(count, cases, ROTATED)
    return marked if release is None else release_after(release, marked)


def release_after(count: int, cases: Iterable[Any]) -> list[ParameterSet]:
    """Mark cases of ``pytest.mark.parametrize`` after the first ``count`` as slow ones for a release."""
    return _marked_after(count, cases, RELEASE)


def in_turn(items: Iterable[pytest.Item], commit: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests that a run for ``commit`` has, and the rotated ones that are left out."""
    kept, left, places = list[pytest.Item](), list[pytest.Item](), Counter[str]()
    for item in items:
        mark, test = item.get_closest_marker("rotated"), item.nodeid.partition("[")[0]
        if mark is None:
            kept.append(item)
            continue
        by_file = mark.kwargs.get("by") == "file"
        name = test.partition("::")[0] if by_file else test
        place = places[test] + crc32(f"{commit} {name}".encode())
        (left if place % TURNS else kept).append(item)
        places[test] += not by_file
    return kept, left


def _marked_after(count: int, cases: Iterable[Any], marks: tuple[MarkDecorator, ...]) -> list[ParameterSet]:
    sets = [case if isinstance(case, ParameterSet) else pytest.param(*_values(case)) for case in cases]
    return [
        case if place < count else pytest.param(*case.values, id=case.id, marks=[*case.marks, *marks])
        for place, case in enumerate(sets)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
