"""Running of steps: each in a process of its own, its output kept as long as what it depends on has not changed."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from uuid import uuid4

from latentreward.errors import InputError
from latentreward.steps import process
from latentreward.steps.sources import source_digest
from latentreward.steps.tasks import Task
from latentreward.storage.durable import discard, write_file
from latentreward.storage.json_files import read_config

RECORD, LOG, INPUTS = "record.json", "log.txt", "inputs.json"
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
        inputs: Key of an input → its ``identity``.
        seconds: Time of its last process by the clock.
        gpu_bytes: Peak memory that PyTorch allocated on a GPU in its last process.
        identity: Random name of this output, by which other tasks' records tell it from one that was made again.
    """

    cpu_seconds: float
    modules: tuple[str, ...]
    source: str
    inputs: dict[str, str | None]
    seconds: float
    gpu_bytes: int
    identity: str


@dataclass
class Workshop:
    """Folder of tasks' outputs, each computed once, and the processes that compute them.

    Args:
        folder: Folder of all outputs.
        resumes: Whether a command that was stopped goes on in the output that it left, unless an input was made again
            since; and an output stays finished when source files change. Otherwise, the output is discarded and the
            command starts again.
        environment: Variables of the processes beyond those here.
    """

    folder: Path
    resumes: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: ONE_THREAD)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False

    def done(self, task: Task) -> Done | None:
        """Return a task's record; None if it is unfinished, ran with other source files, or an input was made again."""
        found, current = self._record(task), self._inputs(task)
        if found is None or (not self.resumes and source_digest(found.modules) != found.source):
            return None
        return found if current == found.inputs and None not in current.values() else None

    def goes_on(self, task: Task) -> bool:
        """Tell whether :meth:`run` goes on in the output that an earlier process left; otherwise it starts anew."""
        folder = task.output(self.folder).parent
        if not self.resumes or not folder.exists():
            return False
        inputs = folder / INPUTS
        if not inputs.is_file():
            return True
        return bool(read_config(inputs, remedy=f"remove {folder} to start anew") == self._inputs(task))

    def _record(self, task: Task) -> Done | None:
        path = task.output(self.folder).parent / RECORD
        if not path.is_file():
            return None
        try:
            return Done(**json.loads(path.read_text()))
        except (TypeError, ValueError, RecursionError):  # damaged
            return None

    def _inputs(self, task: Task) -> dict[str, str | None]:
        """Return key of an input → its identity; None if it has not finished."""
        return {one.key: found.identity if (found := self.done(one)) else None for one in task.inputs.values()}

    def run(self, task: Task) -> None:
        """Run a task's process; what it prints is in ``log.txt`` beside the task's output.

        Raises:
            InputError: If the process fails.
        """
        folder = task.output(self.folder).parent
        if not self.goes_on(task):
            discard(task.output(self.folder))  # before the files by which a later start sees what a stop here left
            discard(folder)
        task.output(self.folder).mkdir(parents=True, exist_ok=True)
        arguments = task.command(self.folder)
        inputs = self._inputs(task)
        write_file(folder / INPUTS, json.dumps(inputs))
        with (folder / LOG).open("a") as log:
            log.write(f"{START}{task.module or 'latentreward'} {' '.join(arguments)}\n")
            log.flush()
            command = [sys.executable, "-m", process.__name__, str(folder / "process.json"), task.module, *arguments]
            code = self._call(command, log.fileno())
        if code:
            last = (folder / LOG).read_text(errors="replace").strip().splitlines()[-1]
            raise InputError(f"{task.name} failed: {last} (all of it is in {folder / LOG})")
        told = json.loads((folder / "process.json").read_text())
        found = Done(**told, source=source_digest(told["modules"]), inputs=inputs, identity=uuid4().hex)
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
