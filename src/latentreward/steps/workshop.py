"""Running of steps: each in a process of its own, its output kept as long as what it depends on has not changed."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from latentreward.errors import InputError
from latentreward.steps import process
from latentreward.steps.sources import source_digest
from latentreward.steps.tasks import Task
from latentreward.storage.durable import discard, write_file

RECORD, LOG = "record.json", "log.txt"
START = "$ "
"""Beginning of the line that a log gets at each start of a process."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Done:
    """Record of a finished task.

    Attributes:
        cpu_seconds: Processor time of its process.
        modules: Modules of this package that its process imported.
        source: Digest of their source files at that time.
        inputs: Key of an input → its ``source``.
        seconds: Time of its last process by the clock.
        gpu_bytes: Peak memory that PyTorch allocated on a GPU in its last process.
    """

    cpu_seconds: float
    modules: tuple[str, ...]
    source: str
    inputs: dict[str, str]
    seconds: float = 0.0
    gpu_bytes: int = 0


@dataclass
class Workshop:
    """Folder of tasks' outputs, each computed once, and the processes that compute them.

    Args:
        folder: Folder of all outputs.
        resumes: Whether a command that was stopped goes on in the output that it left, and an output stays finished
            when source files change. Otherwise, the output is discarded and the command starts again.
        environment: Variables of the processes beyond those here.
    """

    folder: Path
    resumes: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: ONE_THREAD)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False

    def done(self, task: Task) -> Done | None:
        """Return a task's record; None if it has not finished, or it or an input ran with other source files."""
        path = task.output(self.folder).parent / RECORD
        if not path.is_file():
            return None
        try:
            found = Done(**json.loads(path.read_text()))
        except (TypeError, ValueError):  # damaged
            return None
        if not self.resumes and source_digest(found.modules) != found.source:
            return None
        inputs = {one.key: self.done(one) for one in task.inputs.values()}
        current = {key: None if one is None else one.source for key, one in inputs.items()}
        return found if current == found.inputs else None

    def run(self, task: Task) -> None:
        """Run a task's process; what it prints is in ``log.txt`` beside the task's output.

        Raises:
            InputError: If the process fails.
        """
        folder = task.output(self.folder).parent
        if not self.resumes:
            discard(folder)
        task.output(self.folder).mkdir(parents=True, exist_ok=True)
        arguments = task.command(self.folder)
        inputs = {one.key: found.source for one in task.inputs.values() if (found := self.done(one))}
        with (folder / LOG).open("a") as log:
            log.write(f"{START}{task.module or 'latentreward'} {' '.join(arguments)}\n")
            log.flush()
            command = [sys.executable, "-m", process.__name__, str(folder / "process.json"), task.module, *arguments]
            code = self._call(command, log.fileno())
        if code:
            last = (folder / LOG).read_text(errors="replace").strip().splitlines()[-1]
            raise InputError(f"{task.name} failed: {last} (all of it is in {folder / LOG})")
        told = json.loads((folder / "process.json").read_text())
        found = Done(**told, source=source_digest(told["modules"]), inputs=inputs)
        write_file(folder / RECORD, json.dumps(vars(found)))

    def _call(self, command: Sequence[str], log: int) -> int:
        environment = {**os.environ, **self.environment}
        with self._lock:
            if self._closed:
                raise KeyboardInterrupt
            running = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            self._running.add(running)
        try:
            return running.wait()
        finally:
            with self._lock:
                self._running.discard(running)

    def close(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._closed = True
            for running in self._running:
                running.terminate()
