"""The demo's trainings run beside each other; what an earlier demo logged is not shown."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tools import demo
from tools.demo import Training, train


class OwnCommand(Training):
    """A run of another program, whose text is its title."""

    def command(self, output: Path, options: list[str]) -> list[str]:
        return [sys.executable, "-c", self.title]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    wait: Callable[[], None] = partial(time.sleep, 0.02)
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: wait())


def test_a_failed_training_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    fails = OwnCommand("fails", "raise SystemExit('too bad')", ())
    waits = OwnCommand("waits", "import time; time.sleep(600)", ())
    with pytest.raises(SystemExit, match=r"fails failed; the end of .*train.log:\ntoo bad"):
        train([fails, waits], tmp_path, [])
