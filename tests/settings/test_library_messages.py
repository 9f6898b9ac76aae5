"""What reaches the terminal of messages that are logged."""

import logging

import pytest

from latentreward.settings.library_messages import silence_libraries


def test_a_logged_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    silence_libraries()
    assert logging.lastResort is not None
    record = logging.LogRecord("any", logging.WARNING, "", 0, "%s holds %d", ("\x1b]0;mine\x07", 2), None)
    logging.lastResort.handle(record)
    assert capsys.readouterr().err == "\\x1b]0;mine\\x07 holds 2\n"
