"""The short version of ``python -m tests.faults.cache_kill``."""

from pathlib import Path

import pytest

from tests.faults.cache_kill import run_kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_leave_the_same_cache(tmp_path: Path, processes: int) -> None:
    run_kills(tmp_path, kills=3, processes=processes, seed=processes, pairs=100)
