import subprocess
import sys
import time

import pytest

from tests.budget import cpu_budget


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_case_over_its_budget_fails_with_its_seconds_and_the_remedy() -> None:
    message = r"took 0\.\d\d s of processor time, more than --cpu-budget=0\.05; make a fixture share .* mark it: slow"
    with pytest.raises(pytest.fail.Exception, match=message), cpu_budget(0.05):
        work(0.1)


def test_processes_that_a_case_starts_count() -> None:
    with pytest.raises(pytest.fail.Exception), cpu_budget(0.05):
        subprocess.run([sys.executable, "-c", "for _ in range(3_000_000): pass"], check=True)


def test_waiting_is_free_and_a_failure_stays_what_it_is() -> None:
    with cpu_budget(0.05):
        time.sleep(0.1)
    with pytest.raises(ZeroDivisionError), cpu_budget(0.0):
        1 / 0  # noqa: B018
