"""Running of other programs in their own environments, with a time limit and a log."""

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
"""Environment variables that are not passed on, since they would make a program use latentreward's environment."""
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
"""Python program that prints the versions of the packages given as arguments."""
DAY = 86_400.0  # default time limit of a run, in seconds
ANSWER_S = 120.0  # seconds to wait for the versions of packages, or for git


def run_tool(name: str, command: Sequence[str], folder: Path, log: Path, timeout_s: float) -> None:
    """Run a program to its end in the working directory ``folder``, and write its stdout and stderr to ``log``.

    The program and all processes that it started are killed after ``timeout_s`` seconds. Error messages name ``name``.

    Raises:
        InputError: If the program is not allowed (``--restrict-imports``), cannot be started, fails or takes too long.
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
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status:
        raise InputError(f"{name}: {Path(command[0]).name} ended with status {status}; {_said(log)}")


def _said(log: Path) -> str:
    lines = log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
    return f"last line: {lines[-1].strip()[:300]!r}, all in {log}" if lines else "it said nothing"


def interpreter(name: str, python: Path | None) -> str:
    """Find the Python of the scorer ``name``, on PATH or as a file; raise InputError if there is none."""
    found = None if python is None else shutil.which(python.expanduser())
    if found is None:
        given = "is not given" if python is None else f"{python} is no program"
        remedy = f"give the Python of an environment of its own that has {name}, or results from there"
        raise InputError(f"python of {name} {given}; {remedy}")
    check_program(found)
    return str(found)


def package_versions(name: str, python: str, packages: Sequence[str]) -> str:
    """Return the versions of packages of another Python, in one line.

    Raises:
        InputError: If one is missing there, or the Python does not answer.
    """
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    command = [python, "-c", VERSIONS, *packages]
    try:
        found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=ANSWER_S)
    except subprocess.TimeoutExpired as error:
        late = f"{python} does not tell its packages within {ANSWER_S:g} s"
        raise InputError(f"python of {name}: {late}; try again, or give another one") from error
    if found.returncode:
        raise InputError(f"python of {name}: {python} lacks one of {', '.join(packages)}; install them there")
    return " ".join(f"{package} {version}" for package, version in zip(packages, found.stdout.split(), strict=True))


def commit_of(repository: Path) -> str:
    """Return the commit of a git work tree, or ``unknown``."""
    if not (repository / ".git").exists():  # git would tell the commit of a work tree around it
        return "unknown"
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        # Git is not installed or slow, or --restrict-imports forbids running it.
        return "unknown"
    return found.stdout.strip() if not found.returncode else "unknown"


def place_png(source: Path, target: Path) -> None:
    """Provide the image ``source`` as the PNG file ``target``, which is replaced if it exists.

    A PNG is hard-linked, or copied where links are not possible; another format is converted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix.lower() == ".png":
        try:
            target.hardlink_to(source)
        except OSError:  # source and target on different file systems, or a file system without hard links
            shutil.copyfile(source, target)
    else:
        with Image.open(source) as picture:
            picture.convert("RGB").save(target)
