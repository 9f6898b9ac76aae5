"""``~`` and environment variables in paths of settings."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest

from latentreward.alignment import PolicySource
from latentreward.apps.serving.settings import RewardToServe
from latentreward.core.contracts import PathText
from latentreward.core.public_names import public_names
from latentreward.core.registry import backbone_names
from latentreward.core.settings.functions import parse_function, prepare_parsing
from latentreward.reward import ModelSource, RemoteServer
from tests.small_user import run


@dataclass
class Place:
    """A place.

    Attributes:
        folder: A path.
        title: A text.
    """

    folder: PathText | None = None
    title: str = ""


def command(
    output: Path,
    source: PathText = "",
    files: list[PathText] | None = None,
    tables: Mapping[str, PathText] | None = None,
    text: str = "",
    either: str | Path | None = None,
    place: Place | None = None,
    places: Sequence[Place] = (),
) -> None:
    """A command.

    Args:
        output: A path.
        source: A path or a name.
        files: Paths.
        tables: Paths.
        text: A text.
        either: A path, as Lightning's classes annotate it.
        place: A place.
        places: Places.
    """


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OUT", "~/out")
    monkeypatch.setenv("DAY", "monday")
    return tmp_path / "home"


def parsed(arguments: list[str]) -> dict[str, Any]:
    prepare_parsing(arguments)
    return parse_function(command, "command", arguments)


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
        (["o", "--source=https://host/$NIGHT?$DAY"], "source", "https://host/$NIGHT?monday"),
        (["o", "--text=~/a $DAY and $NIGHT/day"], "text", "~/a $DAY and $NIGHT/day"),
        (["o", "--either=~/a"], "either", "HOME/a"),
        (["o", "--files=[~/a, b, $HOME/c]"], "files", ["HOME/a", "b", "HOME/c"]),
        (["o", "--place.folder=~/a"], "place", Place("HOME/a")),
        (["o", "--places=[{folder: ~/a}]"], "places", [Place("HOME/a")]),
        (["o", "--config=~/own_$DAY.yaml"], "tables", {"k": "HOME/d", "j": "HOME/out"}),
        (["o", "--config=~/own_$DAY.yaml"], "place", Place("HOME/d", "~ a $5 bill")),
        (["o", "--config=~/own_$DAY.yaml"], "places", [Place("HOME/out", "$5/a")]),
        (["o", "--config=~/own_$DAY.yaml"], "files", ["monday/a", "monday/b", "HOME/c", "d"]),
    ],
)
def test_paths_are_expanded(given: list[str], name: str, expected: object, home: Path) -> None:
    home.mkdir()
    (home / "own_monday.yaml").write_text(
        "tables: {k: ~/d, j: '${oc.env:OUT}'}\nplace: {folder: ~/d, title: '~ a $5 bill'}\n"
        "places: [{folder: '${oc.env:OUT}', title: $5/a}]\n"
        "files: ['${DAY}/a', '$DAY/b', '${HOME}/c', '${text}']\ntext: d"
    )
    found = parsed(given)[name]
    assert repr(str(found)) == repr(str(expected).replace("HOME", str(home)))


def test_a_runs_folder_and_its_checkpoints_are_expanded(home: Path, tmp_path: Path) -> None:
    keeper = ("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.dirpath=$HOME/kept")
    run("fit", Path("~/root"), "--trainer.max_steps=1", *keeper)
    assert (home / "root/run/config.yaml").is_file()
    assert (home / "kept/last.ckpt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


NAMES = {"base", "cache", "dirpath", "file", "folder", "model", "path", "processor", "results", "root"}
NAMES |= {"run_config", "source"}
NO_PATHS = {"PlainJSON.path", "ServedImages.path", "UniRL.path"}


def test_settings_of_shipped_classes_that_are_paths_say_so() -> None:
    """A parameter of such a name that takes a text has the type PathText, or a type with Path."""
    prepare_parsing([], classes=True)
    shipped = [found for found in public() if configured(found)]
    factories = [locate(path) for path in backbone_names().values() if path.startswith("latentreward.")]
    plain = {
        f"{owner.__name__}.{name}"
        for owner in (*shipped, *factories, ModelSource, PolicySource, RewardToServe, RemoteServer)
        for name, parameter in inspect.signature(owner).parameters.items()
        if name in NAMES and re.search(r"\bstr\b", kind := str(parameter.annotation)) and "ath" not in kind
    }
    assert plain == NO_PATHS


def public() -> list[Any]:
    named = (getattr(import_module(module), name) for name, module in public_names().items())
    return [found for found in named if str(getattr(found, "__module__", "")).startswith("latentreward.")]


def configured(found: Any) -> bool:
    return inspect.isclass(found) and not issubclass(found, BaseException)
