import pytest

from tests.marks import TURNS, in_turn


class Case:
    """What :func:`in_turn` reads of a test."""

    def __init__(self, nodeid: str, rotated: bool) -> None:
        self.nodeid, self.rotated = nodeid, rotated

    def get_closest_marker(self, name: str) -> object:
        return self if name == "rotated" and self.rotated else None


CASES = [Case(f"tests/a.py::test_grid[{i}]", True) for i in range(9)] + [Case("tests/a.py::test_trust[0]", False)]


@pytest.mark.parametrize("commit", ["8e9dbe84", "0dcf33df", ""])
def test_a_commit_runs_a_third_of_a_grid_and_all_that_is_not_rotated(commit: str) -> None:
    kept, left = in_turn(CASES, commit)  # type: ignore[arg-type]
    assert (len(kept), len(left)) == (9 // TURNS + 1, 9 - 9 // TURNS)
    assert CASES[-1] in kept


def test_all_cases_have_their_turn() -> None:
    seen = {case.nodeid for number in range(40) for case in in_turn(CASES, str(number))[0]}  # type: ignore[arg-type]
    assert seen == {case.nodeid for case in CASES}
