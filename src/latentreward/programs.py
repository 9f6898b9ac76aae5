"""The user's own modules, which Python finds in the current folder, and programs that this process may start.

Those are any, until ``--restrict-imports`` leaves those of ``--allow-programs``.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latentreward.errors import InputError

_ALLOWED: list[frozenset[str]] = []
"""The last entry holds the programs that may start; empty as long as any may."""
STARTING = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")
"""Events of Python's own auditing (PEP 578) before a program starts, whoever starts it."""


def find_modules_here(settings: Iterable[Any]) -> None:
    """Let Python find modules in the current folder, behind all others, if one of ``settings`` names one there.

    Not otherwise: libraries try to import packages that are not installed, and would find those that lie beside a
    model or data of other people's.
    """
    here = str(Path.cwd())
    for package, _, rest in {value.partition(".") for value in settings if isinstance(value, str) and len(value) < 999}:
        named = rest and package.isidentifier() and package not in sys.modules and here not in sys.path
        if named and find_spec(package) is None and PathFinder.find_spec(package, [here]):
            sys.path.append(here)


def allow_only(programs: Sequence[str]) -> None:
    """Let this process start no program but ``programs`` from now on; it cannot be undone.

    Raises:
        InputError: If one is not the absolute path of a file, or is a link: a link's name says little about what runs.
    """
    for program in programs:
        if not Path(program).is_absolute() or not Path(program).is_file():
            raise InputError(f"--allow-programs: {program} is not the absolute path of a program; give one")
        if os.path.realpath(program) != program:
            raise InputError(f"--allow-programs: {program} is a link; give {os.path.realpath(program)}")
    if not _ALLOWED:
        sys.addaudithook(_refuse_others)
    _ALLOWED.append(frozenset(programs))


def check_program(program: str | os.PathLike[str]) -> None:
    """Refuse a program that this process may not start.

    Raises:
        InputError: If it is none of those allowed.
    """
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
    """Refuse what reaches for a program by another way than ours; libraries expect an OSError."""
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


def _starts_another_rank(command: Any) -> bool:
    """Whether a command is this process's own over again, as Lightning starts the other ranks of DDP."""
    module = sys.modules["__main__"].__spec__  # of `python -m latentreward`
    start = [os.path.abspath(sys.argv[0])] if module is None else ["-m", module.name]  # noqa: PTH100 - as Lightning
    own = [sys.executable, *start, *sys.argv[1:]]
    return isinstance(command, list | tuple) and [os.fspath(part) for part in command] == own
