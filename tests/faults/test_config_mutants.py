"""A wrong leaf in a shipped configuration is refused in one line; see :mod:`tests.faults.config_mutants`."""

from pathlib import Path

import pytest

from tests.faults.config_mutants import mutants, told


@pytest.mark.slow
def test_wrong_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = told(mutants(25, seed=0), tmp_path / "run")
    assert table.total() == 25
    assert not table["traceback"] + table["hang"] + table["nonsense"] + table["unnamed"], capsys.readouterr().out
