"""Another program, in its own environment, with a limit on its time and what it said on failure."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from latentreward.errors import InputError
from latentreward.programs import check_program

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables of our environment that would lead a program out of its own."""
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
DAY = 86_400.0
"""Seconds that a run may take by default."""
TAIL = 2000
"""Characters of a log that are looked through for the last line."""


def run_tool(name: str, command: Sequence[str], folder: Path, log: Path, timeout_s: float) -> None:
    """Run a program to its end; what it says goes to ``log``.

    Args:
        name: What messages call it.
        command: Program and arguments.
        folder: Where it runs.
        log: File for its output, stdout and stderr in turn.
        timeout_s: Seconds after which it is killed, and whatever it started.

    Raises:
        InputError: If it may not run, cannot be started, fails or takes too long.
    """
    check_program(command[0])
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                list(command),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"{name}: cannot run {command[0]} in {folder} ({error.strerror}); install it") from error
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{name}: no result after timeout_s={timeout_s:g}; {_said(log)}") from error
        finally:
            _stop(process)
    if status:
        raise InputError(f"{name}: {Path(command[0]).name} ended with status {status}; {_said(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started, if any of it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(log: Path) -> str:
    lines = log.read_bytes()[-TAIL:].decode(errors="replace").strip().splitlines()
    return f"last line: {lines[-1].strip()[:300]!r}, all in {log}" if lines else "it said nothing"


def interpreter(name: str, python: Path | None) -> str:
    """The Python of a program's own environment, found on PATH or as a file.

    Raises:
        InputError: If none is given, or it is not there.
    """
    found = None if python is None else shutil.which(python.expanduser())
    if found is None:
        given = "is not given" if python is None else f"{python} is no program"
        raise InputError(
            f"python of {name} {given}; give the Python of an environment of its own that has {name}, or results "
            "from there"
        )
    check_program(found)
    return str(found)


def package_versions(name: str, python: str, packages: Sequence[str]) -> str:
    """Versions of packages in another Python's environment, in one line.

    Raises:
        InputError: If one is missing.
    """
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    found = subprocess.run(
        [python, "-c", VERSIONS, *packages], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    if found.returncode:
        raise InputError(f"python of {name}: {python} lacks one of {', '.join(packages)}; install them there")
    return " ".join(f"{package} {version}" for package, version in zip(packages, found.stdout.split(), strict=True))


def commit_of(repository: Path) -> str:
    """Commit of a git work tree, ``unknown`` where there is none."""
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError:  # not installed, or not allowed
        return "unknown"
    return found.stdout.strip() if not found.returncode else "unknown"


def place_png(source: Path, target: Path) -> None:
    """``source`` as a PNG file ``target``: a link if it is one, else converted; what is there already is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix.lower() == ".png":
        try:
            target.hardlink_to(source)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
    else:
        with Image.open(source) as picture:
            picture.convert("RGB").save(target)
