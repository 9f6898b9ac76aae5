"""Import of classes that settings name by their paths, and which paths are this package's own."""

import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import isabstract
from pathlib import Path
from typing import Any, TypeVar

from latentreward.core.errors import SEARCHED, InputError, first_line, lacks, where

Kind = TypeVar("Kind")

MODULE_FOLDERS: list[str] = []
"""The folder of the call and those of its ``--config`` files, in which modules that settings name are searched."""


@cache
def of_this_package(path: str | None) -> bool:
    """Tell whether an import path, such as ``latentreward.reward.DRMHead``, or a module's name is of this package."""
    return within(path, ["latentreward"])


def of_framework(path: str | None) -> bool:
    """Tell whether an import path is of this package or of Lightning, and so none of the user's own code."""
    return within(path, ["latentreward", "lightning"])


def within(path: str | None, modules: Iterable[str]) -> bool:
    """Tell whether an import path is that of one of the modules, or of something inside one."""
    return f"{path}.".startswith(tuple(f"{module}." for module in modules))


def find_modules_here(settings: Iterable[Any]) -> None:
    """Append the current folder, or that of a ``--config`` file, to ``sys.path`` if a class path names a module in it.

    Otherwise ``sys.path`` stays unchanged. Libraries try to import optional packages, and would otherwise import a
    file of that name that somebody put beside a downloaded model or data set.
    """
    for package, _, rest in {value.partition(".") for value in settings if isinstance(value, str) and len(value) < 999}:
        if rest and package.isidentifier() and package not in sys.modules and find_spec(package) is None:
            folders = (folder for folder in (*MODULE_FOLDERS, str(Path.cwd())) if folder not in sys.path)
            sys.path += [folder for folder in folders if PathFinder.find_spec(package, [folder])][:1]


def import_class(setting: str, path: str, base: type[Kind]) -> type[Kind]:
    """Import a class by the path that a setting gives, such as ``my_module.MyClass``.

    The module may lie in the current folder or beside a ``--config`` file. Only a path that the user gave may be
    passed: importing runs the module.

    Raises:
        InputError: If there is no such class, or it is abstract or not derived from ``base``.
    """
    if "." in path and not of_this_package(path):
        find_modules_here([path])
    module, _, name = path.rpartition(".")
    if module.startswith("."):
        raise InputError(f"{setting}={path!r} is relative; give the whole path of a class")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"{setting}={path!r} cannot be imported ({first_line(error)}){where(error)}; give the path of a class "
            f"{SEARCHED}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        wanted = f"{base.__module__}.{base.__name__}"
        raise InputError(f"{setting}={path!r} is not a subclass of {wanted}; give the path of a class derived from it")
    if isabstract(kind):
        raise InputError(f"{setting}={path!r}: {lacks(kind)}")
    return kind
