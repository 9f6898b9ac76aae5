"""Import paths that configs, docs or an ``__all__`` named in an earlier release."""

from importlib import import_module
from pathlib import Path

import pytest

from latentreward.moved import MOVED

PATHS = (Path(__file__).parent / "import_paths.txt").read_text().split()


def found(path: str) -> object:
    """The module or the name in a module that ``path`` stands for."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, name = path.rsplit(".", 1)
        return getattr(import_module(module), name)


@pytest.mark.parametrize("path", PATHS)
def test_it_still_resolves(path: str) -> None:
    found(path)


@pytest.mark.parametrize("old", MOVED)
def test_an_earlier_module_is_todays(old: str) -> None:
    assert import_module(old) is import_module(MOVED[old])


@pytest.mark.parametrize("old", MOVED)
def test_no_earlier_path_is_taken_again(old: str) -> None:
    place = Path(import_module("latentreward").__path__[0], *old.split(".")[1:])
    assert not place.with_suffix(".py").exists()
    assert not place.is_dir() or not list(place.rglob("*.py"))
