"""Command lines run one after the other in children of one process that has imported everything."""

import gc
import importlib
import json
import os
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from latentreward.apps.cli import COMMANDS, main, module_of
from latentreward.core.public_names import import_all
from tests.processes import Forked

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What became of one command line: exit status (None: it was stopped at the limit), stderr, seconds."""

    status: int | None
    stderr: str
    seconds: float

    @property
    def line(self) -> str:
        """The program's own line of error, empty if there is none."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("latentreward: error: ")]
        return lines[-1].removeprefix("latentreward: error: ") if lines else ""


def run_forked(arguments: Sequence[str], folder: Path, limit_s: float = 600.0) -> Outcome:
    """Run one command line in a child whose current folder is ``folder``; kill it and its children at the limit."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile("w+") as modules:
        child = os.fork()
        if not child:
            _become(arguments, folder, errors.fileno(), modules.fileno())
        status = None
        while time.monotonic() - begin < limit_s:
            pid, status_bits = os.waitpid(child, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(status_bits)
                break
            time.sleep(0.01)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        seconds = time.monotonic() - begin
        errors.seek(0)
        modules.seek(0)
        _import_installed(modules.read().split())
        return Outcome(status, errors.read().decode(errors="replace"), seconds)


def _import_installed(names: Sequence[str]) -> None:
    """Import what a child imported from packages that are installed, so that the next one finds it."""
    for name in names:
        with suppress(Exception):  # some import only beside others
            importlib.import_module(name)


def _become(arguments: Sequence[str], folder: Path, errors: int, modules: int) -> None:
    """Run the command line in this process, and end it."""
    os.setpgid(0, 0)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    status, known = 0, set(sys.modules)
    try:
        main(arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    installed = sysconfig.get_paths()["purelib"]
    found = [
        name for name, module in [*sys.modules.items()] if str(getattr(module, "__file__", "")).startswith(installed)
    ]
    os.write(modules, "\n".join(set(found) - known).encode())
    os._exit(status)


def import_everything() -> None:
    """Import what the subcommands need, so that children find it."""
    import_all()
    for command in COMMANDS:
        importlib.import_module(module_of(command))


def outcomes(
    cases: Sequence[tuple[Sequence[str], Path]], limit_s: float = 600.0, **environment: str
) -> Iterator[Outcome]:
    """What becomes of command lines, each in its folder."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        process = Forked(_run_all, [cases, limit_s, results], cwd=ROOT, environment=environment)
        with results.open() as lines:
            for _ in cases:
                line = ""
                while not line.endswith("\n"):
                    ended = process.poll() is not None  # asked first: what it wrote before its end is still to be read
                    line += lines.readline()
                    assert line.endswith("\n") or not ended, process.stderr[-2000:]
                    time.sleep(0 if line else 0.02)
                yield Outcome(**json.loads(line))
        process.wait(limit_s)


def _run_all(cases: Sequence[tuple[Sequence[str], Path]], limit_s: float, results: Path) -> None:
    import_everything()
    gc.freeze()  # pages that children do not write to stay shared
    with results.open("a") as lines:
        for arguments, folder in cases:
            print(json.dumps(asdict(run_forked(arguments, folder, limit_s))), file=lines, flush=True)
