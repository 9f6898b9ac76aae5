"""How numbers with intervals are written, above all those of few groups."""

import pytest

from latentreward.metrics.bootstrap import Interval
from latentreward.reports.tables import interval, with_interval


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (None, "50.0 [40.0, 60.0]"),
        (1, "50.0 [40.0, 60.0] (1 group)"),
        (2, "50.0 [40.0, 60.0] (2 groups)"),
        (29, "50.0 [40.0, 60.0] (29 groups)"),
        (30, "50.0 [40.0, 60.0]"),
    ],
)
def test_few_groups_are_told_beside_the_interval(groups: int | None, text: str) -> None:
    assert with_interval(Interval(0.5, 0.4, 0.6, groups)) == text


def test_numbers_are_written_as_asked_for_and_without_any_there_is_a_dash() -> None:
    assert with_interval(Interval(0.5, -0.25, 1.0, 3), "{:+.2f}".format) == "+0.50 [-0.25, +1.00] (3 groups)"
    nan = float("nan")
    assert interval(Interval(nan, nan, nan, 0)) == "[–, –]"
