"""Processor time that a fast case may take."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def cpu_budget(limit: float) -> Iterator[None]:
    """Fail the test whose body spends more than ``limit`` seconds of processor time, own and of ended children."""
    start = _spent()
    yield
    spent = _spent() - start
    if spent > limit:
        pytest.fail(
            f"took {spent:.2f} s of processor time, more than --cpu-budget={limit:g}; make a fixture share what it "
            "builds, or mark it: slow, or slow_after or rotated_after of tests/marks.py",
            pytrace=False,
        )


def _spent() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
