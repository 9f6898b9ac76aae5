"""How numbers with intervals are written, above all those of few groups."""

from typing import Any

import pytest

from latentreward.core.bootstrap import Interval
from latentreward.core.reports.tables import Table, as_text, cell, grouped, interval, markdown_table, with_interval


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a | b", "a | b"),
        (12, "12"),
        (0.4, "0.4"),
        (Interval(0.5, 0.4, 0.6, 400), "50.0 [40.0, 60.0]"),
        ({"truncated": 3, "missing file": 1, "empty": 0}, "1 missing file, 3 truncated"),
        ({"empty": 0}, "0"),
    ],
)
def test_values_are_formatted_by_their_kind(value: Any, text: str) -> None:
    assert cell(value) == text


def test_a_table_shows_the_chosen_values_of_results_in_each_form() -> None:
    rows = [{"model": "a", "pairs": 9, "more": None}, {"model": "b|c", "pairs": 10}]
    table = Table.of(rows, ("name", "model"), ("twice", lambda row: str(2 * row["pairs"])), notes="Own")
    assert as_text(table) == "name  twice\na     18\nb|c   20"
    assert markdown_table(table) == "### Own\n\n| name | twice |\n| --- | --- |\n| a | 18 |\n| b\\|c | 20 |"
    assert grouped(rows, "model", "more") == {("a", None): [rows[0]], ("b|c", None): [rows[1]]}
