"""The short version of ``python -m tests.faults.cache_kill``."""

from pathlib import Path

import pytest

from tests.faults.cache_kill import run_kills
from tests.marks import release_after


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), release_after(1, [(1, 3), (2, 2)]))
def test_killed_runs_leave_the_same_cache(tmp_path: Path, workers: int, kills: int) -> None:
    run_kills(tmp_path, kills=kills, workers=workers, seed=workers, pairs=60)
