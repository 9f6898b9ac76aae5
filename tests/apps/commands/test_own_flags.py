"""Messages and help texts name flags of the command at hand, in plain words."""

import re

import pytest

from latentreward.apps.cli import COMMANDS, main
from tests.marks import rotated_after


@pytest.mark.parametrize("command", rotated_after(1, [name for name in COMMANDS if name != "configs"]))
def test_help_has_no_marks_of_sphinx(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert told
    assert not re.findall(r":\w+:`|``", told)
