"""Lines of a server about refused requests."""

import pytest

from latentreward.apps.serving import refusals
from latentreward.apps.serving.refusals import RefusalLog


def test_a_kind_of_refusal_is_told_once_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    now, log = [0.0], RefusalLog()
    monkeypatch.setattr(refusals.time, "monotonic", lambda: now[0])
    for number in range(3):
        log.tell(400, f"prompts: {number} are given")
    log.tell(422, "image 3: no image\x1b[2J")
    now[0] = 61.0
    log.tell(400, "prompts: 9 are given")
    assert capsys.readouterr().err.splitlines() == [
        "refused with 400: prompts: 0 are given",
        "refused with 422: image 3: no image\\x1b[2J",
        "refused with 400 (and 2 like it before): prompts: 9 are given",
    ]


def test_a_flood_of_kinds_takes_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    log = RefusalLog()
    for number in range(5000):
        log.tell(404, f"/{number}: Not Found")
    assert len(capsys.readouterr().err.splitlines()) == refusals.MOST_KINDS + 1
