"""Progress: a bar on a terminal, elsewhere a line now and then and at the end."""

import io
import re
import sys

import pytest

from latentreward.storage import progress
from latentreward.storage.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("score", 10, "images", 3) as bar:
        bar.add(7)
    assert "10/10" in sys.stderr.getvalue()
    assert "images" in sys.stderr.getvalue()


LINE = re.compile(r"score (\d+)/210 images  +[\d.]+ images/s, loss=0.5  \d\d:\d\d left")


@pytest.mark.parametrize(("interval", "lines"), [(0.0, ["111", "112", "210", "210"]), (1000.0, [])])
def test_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interval: float, lines: list[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", interval)
    with Progress("score", 210, "images", 100) as line:
        for number in (11, 1, 98):
            line.add(number, loss=0.5)
    found = capsys.readouterr().err.splitlines()
    assert [LINE.fullmatch(row)[1] for row in found if "loss" in row] == lines


def test_nothing_where_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("score", 9, "images", 9) as line:
        line.add(0)
    assert capsys.readouterr().err == ""
