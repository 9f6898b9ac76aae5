"""Messages and help texts name flags of the command at hand, in plain words."""

import re
import socket
from pathlib import Path

import pytest
from PIL import Image

from latentreward.apps.cli import COMMANDS, main
from latentreward.apps.commands.publish import Reference
from latentreward.apps.serving import bind
from latentreward.core.errors import InputError
from tests.marks import rotated_after


def test_publish_names_its_own_settings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^reference\.images: none of 1 pictures .* with --reference\.prompt$"):
        Reference(str(tmp_path)).listed()
    (tmp_path / "list.csv").write_text("image\na.png\n")
    with pytest.raises(InputError, match=r"rename it so, or give one prompt for all images with --reference\.prompt$"):
        Reference(str(tmp_path / "list.csv")).listed()


def test_a_port_in_use_names_the_host_only_where_it_may_be_wrong() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"choose another --port$"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match=r"^cannot serve at a\.\.b:0 .*; choose another --port or --host$"):
        bind("a..b", 0)  # which is no name, so that it is not looked up


@pytest.mark.parametrize("command", rotated_after(1, [name for name in COMMANDS if name != "configs"]))
def test_help_has_no_marks_of_sphinx(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert told
    assert not re.findall(r":\w+:`|``", told)
