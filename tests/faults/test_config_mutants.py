"""A wrong leaf in a shipped configuration is refused in one line; see :mod:`tests.faults.config_mutants`."""

from pathlib import Path

import pytest

from tests.faults.config_mutants import mutants, told
from tests.marks import rotated_after


@pytest.mark.parametrize("part", rotated_after(0, range(5)))
def test_wrong_leaves(part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = told(mutants(25, seed=0)[part::5], tmp_path / "run")
    assert table.total() == 5
    assert not table["traceback"] + table["hang"] + table["nonsense"] + table["unnamed"], capsys.readouterr().out
