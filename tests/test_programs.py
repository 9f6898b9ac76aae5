"""Modules that lie in the current folder, and programs that this process may start."""

import _ctypes
import ctypes
import importlib
import os
import pickle
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from latentreward.programs import _starts_another_rank, allow_only, constructing, find_modules_here
from tests.processes import Forked


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (["own_plugin.Note"], True),
        (["own_plugins.notes.Note", 7, None], True),
        (["own_plugin", "x/own_plugin.png", "own_plug.in"], False),
        (["yaml.safe_load", "__main__.run"], False),
        ([], False),
    ],
)
def test_the_current_folder_is_searched_for_what_settings_name_in_it(
    settings: list[object], found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_plugins").mkdir()
    for name in ("own_plugin.py", "yaml.py", "brotli.py", "own_plugins/notes.py"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    find_modules_here(settings)
    assert (str(tmp_path) in sys.path) == found
    assert str(tmp_path) not in sys.path[:-1]  # behind all others


@pytest.mark.parametrize("by_module", [False, True])
def test_lightning_may_start_this_command_over_again(by_module: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", type("Spec", (), {"name": "latentreward.__main__"}) if by_module else None)
    monkeypatch.setattr(sys, "argv", ["bin/../latentreward", "fit", "--trainer.devices=2"])
    command = _basic_subprocess_cmd()
    assert _starts_another_rank(list(command))
    assert not _starts_another_rank([*command, "--more"])


def try_to_load(folder: Path) -> None:
    """Load code from a folder, with and without classes of settings being instantiated."""
    sys.path.append(str(folder))
    allow_only([])
    pickle.loads(pickle.dumps(os.getpid))
    ctypes.CDLL(str(folder / "first.so"))
    with constructing():
        ctypes.CDLL("libc.so.6")
        importlib.import_module("turtledemo")  # of the Python installation
        namedtuple("Pair", "a b")
        for load in (
            lambda: ctypes.CDLL(str(folder / "second.so")),
            lambda: pickle.loads(pickle.dumps(os.getpid)),
            lambda: importlib.import_module("beside"),
            lambda: os.system("true"),
        ):
            with pytest.raises(PermissionError, match="--restrict-imports does not let"):
                load()
    importlib.import_module("beside")


def test_classes_of_settings_load_no_code_of_others(tmp_path: Path) -> None:
    for name in ("first.so", "second.so"):
        shutil.copy(_ctypes.__file__, tmp_path / name)
    (tmp_path / "beside.py").write_text("")
    process = Forked(try_to_load, [tmp_path], cwd=tmp_path)
    assert process.wait(100) == 0, process.stderr
