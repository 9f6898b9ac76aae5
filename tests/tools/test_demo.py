"""The demo's trainings run beside each other; what an earlier demo logged is not shown."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tools import demo
from tools.demo import Training, progress, train


class OwnCommand(Training):
    """A run of another program, whose text is its title."""

    def command(self, output: Path, options: list[str]) -> list[str]:
        return [sys.executable, "-c", self.title]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    wait: Callable[[], None] = partial(time.sleep, 0.02)
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: wait())


def test_figures_of_an_earlier_demo_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (OwnCommand(name, f"print('{name} ran')", ()) for name in ("one", "other"))
    with SummaryWriter(str(tmp_path / "one")) as log:
        log.add_scalar("train/loss", 0.5, 9)
    (tmp_path / "one" / "train.log").touch()
    assert progress(one, tmp_path, ended=False) == "one step 10, loss 0.500"
    train([one, other], tmp_path, [])
    assert progress(one, tmp_path, ended=False) == "one starting"
    assert (tmp_path / "other" / "train.log").read_text() == "other ran\n"
    assert "one done  |  other done" in capsys.readouterr().out


def test_a_failed_training_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    fails = OwnCommand("fails", "raise SystemExit('too bad')", ())
    waits = OwnCommand("waits", "import time; time.sleep(600)", ())
    with pytest.raises(SystemExit, match=r"fails failed; the end of .*train.log:\ntoo bad"):
        train([fails, waits], tmp_path, [])
