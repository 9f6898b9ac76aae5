"""Modules that lie in the current folder."""

import sys
from pathlib import Path

import pytest

from latentreward.core.registry import find_modules_here


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
