"""Progress: a bar on a terminal, elsewhere a line now and then and at the end."""

import io
import re
import sys

import pytest

from latentreward.core.storage.progress import Progress


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
def test_lines_elsewhere(capsys: pytest.CaptureFixture[str], interval: float, lines: list[str]) -> None:
    with Progress("score", 210, "images", 100, interval=interval, delay=interval) as line:
        for number in (11, 1, 98):
            line.add(number, loss=0.5)
    found = capsys.readouterr().err.splitlines()
    assert [LINE.fullmatch(row)[1] for row in found if "loss" in row] == lines


def test_a_bar_inside_another_goes_when_it_ends_and_lines_stay_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        Progress("train", 9, "steps", delay=0.0),
        Progress("validation", 2, "batches", interval=0.0, delay=0.0) as inside,
    ):
        inside.add(2)
    assert [row.split()[:2] for row in capsys.readouterr().err.splitlines()] == [
        ["train", "0/9"],
        ["validation", "0/2"],
        ["validation", "2/2"],
        ["validation", "2/2"],
        ["train", "0/9"],
    ]
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("train", 9, "steps"), Progress("validation", 2, "batches") as inside:
        inside.add(2)
    last = re.split(r"[\r\n]+", sys.stderr.getvalue().strip())[-1]
    assert last.startswith("train")
