"""Imports of modules that settings name, and programs that this process may start.

Any module may be imported and any program may start until ``--restrict-imports`` is given; then only the modules that
it names, and the programs of ``--allow-programs``.
"""

import os
import shutil
import site
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import isabstract
from pathlib import Path
from typing import Any, TypeVar

from latentreward.errors import SEARCHED, InputError, first_line, lacks, where

Kind = TypeVar("Kind")

RESTRICTED: list[tuple[str, ...]] = []
"""Modules named in ``--restrict-imports``, in the last entry; the list is empty without the option."""
_ALLOWED: list[frozenset[str]] = []
"""Absolute paths of the programs that may start, in the last entry; an empty list allows any program."""
STARTING = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")
"""Names of Python's audit events (PEP 578) that announce the start of a program, by whatever library."""
CODE_FILE = {"ctypes.dlopen": 0, "import": 1, "exec": 0}
"""Audit event of code that is loaded from a file -> index of the argument that has the file's path."""
MODULE_FOLDERS: list[str] = []
"""The folder of the call and those of its ``--config`` files, in which modules that settings name are searched."""
_CONSTRUCTING: list[bool] = []
"""Not empty while the classes that settings name are instantiated."""
_INSTALLED: list[str] = []
"""Folders, with a slash at the end, whose code the classes that settings name may load."""


@cache
def of_this_package(path: str | None) -> bool:
    """Tell whether an import path, such as ``latentreward.heads.DRMHead``, or a module's name is of this package."""
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
        InputError: If there is no such class, it is abstract or not derived from ``base``, or ``--restrict-imports``
            does not allow it.
    """
    if "." in path and not of_this_package(path):
        if RESTRICTED and not within(path, RESTRICTED[-1]):
            raise InputError(
                f"{setting}: --restrict-imports does not allow {path!r}; if you trust it, say "
                f"--restrict-imports={path.partition('.')[0]}"
            )
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
        wanted = f"{base.__module__.rpartition('.')[0]}.{base.__name__}"
        raise InputError(f"{setting}={path!r} is not a subclass of {wanted}; give the path of a class derived from it")
    if isabstract(kind):
        raise InputError(f"{setting}={path!r}: {lacks(kind)}")
    return kind


def allow_only(programs: Sequence[str]) -> None:
    """Let this process start only ``programs`` from now on; this cannot be undone within the process.

    Raises:
        InputError: If a program is not the absolute path of a file, or is a link, whose target could change.
    """
    for program in programs:
        if not Path(program).is_absolute() or not Path(program).is_file():
            raise InputError(f"--allow-programs: {program} is not the absolute path of a program; give one")
        if os.path.realpath(program) != program:
            raise InputError(f"--allow-programs: {program} is a link; give {os.path.realpath(program)}")
    if not _ALLOWED:
        places = [sys.prefix, sys.base_prefix, *sys.path, *site.getsitepackages(), str(Path(__file__).parents[1])]
        places = [os.path.realpath(place) for place in places if place]
        _INSTALLED.extend(f"{place}/" for place in places if place != str(Path.cwd()))
        sys.addaudithook(_refuse_others)
    _ALLOWED.append(frozenset(programs))


@contextmanager
def constructing() -> Iterator[None]:
    """Mark that classes that settings name are instantiated: after :func:`allow_only`, they load no code of others.

    Refused are unpickling, and code in other files than those of the Python installation. Libraries of the system may
    be loaded by their names.
    """
    _CONSTRUCTING.append(True)
    try:
        yield
    finally:
        _CONSTRUCTING.pop()


def check_program(program: str | os.PathLike[str]) -> None:
    """Raise InputError if this process may not start ``program``, a path or a name to look up in ``PATH``."""
    if not _ALLOWED:
        return
    name = os.fspath(program)
    found = shutil.which(name) if Path(name).is_absolute() or "/" not in name else None
    if found is None or os.path.realpath(found) not in _ALLOWED[-1]:
        given = os.path.realpath(found) if found else "its absolute path"
        raise InputError(
            f"--restrict-imports does not let {name} run; if you trust it with everything that it can do, say "
            f"--allow-programs={given}"
        )


def _refuse_others(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: raise PermissionError for a program that may not start, whichever library starts it.

    PermissionError is an OSError, which libraries expect when a program cannot start. While classes are instantiated,
    code of others is refused in the same way, see :func:`constructing`.
    """
    if _CONSTRUCTING and (event in CODE_FILE or event == "pickle.find_class"):
        _refuse_code(event, arguments)
    if event not in STARTING:
        return
    program = arguments[1 if event == "os.spawn" else 0]
    if event == "subprocess.Popen" and _starts_another_rank(arguments[1]):
        return
    if event in ("os.system", "pty.spawn"):
        program = "/bin/sh"
    try:
        check_program(os.fsdecode(program))
    except InputError as error:
        raise PermissionError(str(error)) from error


def _refuse_code(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        raise PermissionError(f"--restrict-imports does not let a setting's class unpickle {'.'.join(arguments)}")
    path = arguments[CODE_FILE[event]]
    path = getattr(path, "co_filename", path)
    if not isinstance(path, str | bytes) or not Path(os.fsdecode(path)).is_file():  # text, or a library of the system
        return
    path = os.path.realpath(os.fsdecode(path))
    own = any(RESTRICTED[-1:]) and event != "ctypes.dlopen" and path.startswith(f"{Path.cwd()}/")
    if not path.startswith(tuple(_INSTALLED)) and not own:
        raise PermissionError(f"--restrict-imports does not let a setting's class load {path}")


def _starts_another_rank(command: Any) -> bool:
    """Tell whether ``command`` is this process's own command line, which Lightning uses to start DDP's other ranks."""
    module = sys.modules["__main__"].__spec__  # set for `python -m latentreward`
    start = [os.path.abspath(sys.argv[0])] if module is None else ["-m", module.name]  # noqa: PTH100 - as Lightning
    own = [sys.executable, *start, *sys.argv[1:]]
    return isinstance(command, list | tuple) and [os.fspath(part) for part in command] == own
