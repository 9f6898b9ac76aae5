import pytest

from tests.marks import TURNS, in_turn


class Case:
    """What :func:`in_turn` reads of a test."""

    def __init__(self, nodeid: str, rotated: bool, **kwargs: str) -> None:
        self.nodeid, self.rotated, self.kwargs = nodeid, rotated, kwargs

    def get_closest_marker(self, name: str) -> object:
        return self if name == "rotated" and self.rotated else None


CASES = [Case(f"tests/a.py::test_grid[{i}]", True) for i in range(2 * TURNS)] + [
    Case("tests/a.py::test_trust[0]", False)
]


@pytest.mark.parametrize("commit", ["8e9dbe84", "0dcf33df", ""])
def test_a_commit_runs_a_part_of_a_grid_and_all_that_is_not_rotated(commit: str) -> None:
    kept, left = in_turn(CASES, commit)  # type: ignore[arg-type]
    assert (len(kept), len(left)) == (2 + 1, 2 * TURNS - 2)
    assert CASES[-1] in kept


def test_all_cases_have_their_turn() -> None:
    seen = {case.nodeid for number in range(40) for case in in_turn(CASES, str(number))[0]}  # type: ignore[arg-type]
    assert seen == {case.nodeid for case in CASES}


def test_the_cases_of_a_file_that_share_a_fixture_run_together() -> None:
    cases = [Case(f"tests/b.py::test_{name}[{i}]", True, by="file") for name in "ab" for i in range(3)]
    kept = [len(in_turn(cases, str(number))[0]) for number in range(40)]  # type: ignore[arg-type]
    assert {*kept} == {0, 6} and 0 < kept.count(6) < 20
