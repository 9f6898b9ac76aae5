"""``~`` and environment variables in paths of settings."""

from pathlib import Path

import pytest

from latentreward.errors import InputError
from latentreward.settings.functions import parse_function, prepare_parsing
from tests.small_user import run


def command(output: Path, source: str = "", files: list[str] | None = None, text: dict[str, str] | None = None) -> None:
    """A command.

    Args:
        output: A path.
        source: A path or a name.
        files: Paths.
        text: Texts.
    """


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OUT", "~/out")
    monkeypatch.setenv("DAY", "monday")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        (["~/a.csv"], "output", "HOME/a.csv"),
        (["--output=~"], "output", "HOME"),
        (["--output=${HOME}/b", "--source=x"], "output", "HOME/b"),
        (["--output=${oc.env:OUT}"], "output", "HOME/out"),
        (["--output=runs/$DAY/x_$DAY"], "output", "runs/monday/x_monday"),
        (["o", "--source=$DAY"], "source", "monday"),
        (["o", "--source=org/model~1"], "source", "org/model~1"),
        (["o", "--source=~no-such-user/x"], "source", "~no-such-user/x"),
        (["o", "--source=either $DAY or $NIGHT/day"], "source", "either monday or $NIGHT/day"),
        (["o", "--source=costs $DAY"], "source", "costs $DAY"),
        (["o", "--files=[~/a, b, $HOME/c]"], "files", ["HOME/a", "b", "HOME/c"]),
        (["o", "--config=~/own_$DAY.yaml"], "text", {"k": "HOME/d", "prompt": "~ a $5 bill"}),
    ],
)
def test_paths_are_expanded(given: list[str], name: str, expected: object, home: Path) -> None:
    home.mkdir()
    (home / "own_monday.yaml").write_text("text: {k: ~/d, prompt: '~ a $5 bill'}")
    found = parse_function(command, "command", prepare_parsing(given))[name]
    assert repr(str(found)) == repr(str(expected).replace("HOME", str(home)))


def test_a_variable_that_is_not_set_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^runs/\$NIGHT: the environment variable NIGHT is not set; set it, or write"):
        parse_function(command, "command", prepare_parsing(["runs/$NIGHT"]))


def test_a_runs_folder_and_its_checkpoints_are_expanded(home: Path, tmp_path: Path) -> None:
    keeper = ("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.dirpath=$HOME/kept")
    run("fit", Path("~/root"), "--trainer.max_steps=1", *keeper)
    assert (home / "root/run/config.yaml").is_file()
    assert (home / "kept/last.ckpt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
