"""What reaches the terminal of messages that are logged."""

import logging

import pytest

from latentreward.core.errors import silence_libraries


def test_a_logged_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    silence_libraries()
    assert logging.lastResort is not None
    record = logging.LogRecord("any", logging.WARNING, "", 0, "%s holds %d", ("\x1b]0;mine\x07", 2), None)
    logging.lastResort.handle(record)
    assert capsys.readouterr().err == "\\x1b]0;mine\\x07 holds 2\n"


@pytest.mark.parametrize("name", ["any", "diffusers.models.modeling_utils"])
def test_a_log_call_with_wrong_arguments_is_told_and_ends_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As without this package: logging prints the error of such a call, and goes on."""
    silence_libraries(on_import=True)
    silence_libraries()
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "propagate", False)  # not to pytest's own handlers: the last resort is left
    monkeypatch.setattr(logger, "handlers", [])
    logger.warning("loss", 3)  # noqa: PLE1205 - wrong on purpose
    assert "--- Logging error ---" in capsys.readouterr().err
