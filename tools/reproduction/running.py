"""Running of steps several at a time, of which some may fail; outputs of other source files are made again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from uuid import uuid4

from latentreward.apps.taste.steps import TOLD_EVERY_S, progress
from latentreward.core.errors import InputError
from latentreward.core.storage.durable import discard, write_file
from latentreward.core.storage.json_files import read_config
from tools.reproduction import process
from tools.reproduction.tasks import Task
from tools.source_digests import source_digest

RECORD, LOG, TOLD = "record.json", "log.txt", "process.json"


@dataclass(frozen=True)
class Done:
    """Record of a finished task."""

    cpu_seconds: float  # processor time of its process
    modules: tuple[str, ...]  # modules of this package that its process imported
    source: str  # digest of their source files at that time
    inputs: dict[str, str | None]  # key of an input → its ``identity``
    identity: str  # random name of this output, by which other tasks' records tell it from one that was made again


@dataclass
class StepRunner:
    """Runner of tasks in processes; each output in its folder is computed once, and again where source files differ.

    A command that was stopped starts again.
    """

    folder: Path  # folder of all outputs
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of the processes beyond those here
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False

    def source(self, modules: Iterable[str]) -> str:
        """Return the digest of the source files of modules."""
        return source_digest(modules)

    def done(self, task: Task) -> Done | None:
        """Return a task's record; None if it is unfinished, ran with other source files, or an input was made again."""
        folder = task.output(self.folder).parent
        if not (folder / RECORD).is_file():
            return None
        found = Done(**read_config(folder / RECORD, remedy=f"remove {folder} to run {task.name} again"))
        if self.source(found.modules) != found.source:
            return None
        current = self._inputs(task)
        return found if current == found.inputs and None not in current.values() else None

    def log(self, task: Task) -> Path:
        """Return the file beside a task's output to which its processes print."""
        return task.output(self.folder).parent / LOG

    def _inputs(self, task: Task) -> dict[str, str | None]:
        """Return key of an input → its identity; None if it has not finished."""
        return {one.key: found.identity if (found := self.done(one)) else None for one in task.inputs.values()}

    def run(self, task: Task) -> None:
        """Run a task's process, which prints to :meth:`log`."""
        folder, log, inputs = task.output(self.folder).parent, self.log(task), self._inputs(task)
        print(f"{task.name}: starts; its log is {log}", flush=True)
        discard(task.output(self.folder))  # before the files by which a later start sees what a stop here left
        discard(folder)
        task.output(self.folder).mkdir(parents=True)
        arguments = task.command(self.folder)
        with log.open("a") as stream:
            stream.write(f"$ {task.module or 'latentreward'} {' '.join(arguments)}\n")
            stream.flush()
            told = str(folder / TOLD)
            command = [sys.executable, "-m", process.__name__, str(os.getpid()), told, task.module, *arguments]
            code = self._call(task, command, stream.fileno())
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1]
            raise InputError(f"{task.name} failed: {last} (all of it is in {log})")
        told = json.loads((folder / TOLD).read_text())
        found = Done(**told, source=self.source(told["modules"]), inputs=inputs, identity=uuid4().hex)
        write_file(folder / RECORD, json.dumps(vars(found)))

    def _call(self, task: Task, command: Sequence[str], log: int) -> int:
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


def run_tasks(
    tasks: Iterable[Task],
    runner: StepRunner,
    processes: int,
    finished: Callable[[Task], None],
) -> list[str]:
    """Run the tasks that have not finished, each after its inputs, otherwise in their order.

    Ctrl-C and SIGTERM end the running processes by SIGTERM and wait for them, so that a training saves a checkpoint.

    Args:
        tasks: Tasks; an input that is not among them has finished.
        runner: Runner, which is closed at the end.
        processes: Most processes at a time.
        finished: Called with each task that this call has run.

    Returns:
        A line for each task that failed; tasks that do not depend on one still run.
    """
    waiting = {task.key: task for task in tasks}
    unfinished, failures = {*waiting}, list[str]()
    running, shown = dict[Future[None], Task](), dict[str, str]()
    with ThreadPoolExecutor(processes) as pool:  # an interrupt reaches the main thread and leaves processes to others
        try:
            while True:
                for task in ready(waiting, unfinished, runner):
                    if len(running) < processes:
                        del waiting[task.key]
                        shown[task.key] = progress(runner.log(task))
                        running[pool.submit(runner.run, task)] = task
                if not running:
                    return failures
                ended = wait(running, TOLD_EVERY_S, FIRST_COMPLETED).done
                for task in running.values():
                    if (line := progress(runner.log(task))) != shown[task.key]:
                        print(f"{task.name}: {line}", flush=True)
                        shown[task.key] = line
                for task, error in [(running.pop(future), future.exception()) for future in ended]:
                    if error is None:
                        unfinished.remove(task.key)
                        finished(task)
                    elif isinstance(error, InputError):
                        failures.append(str(error))
                        print(error, file=sys.stderr, flush=True)
                    else:
                        raise error
        finally:
            runner.close()


def ready(waiting: dict[str, Task], unfinished: set[str], runner: StepRunner) -> Iterator[Task]:
    """Yield the waiting tasks whose inputs have finished; take out those that have finished themselves before."""
    for key, task in [*waiting.items()]:
        if unfinished & {one.key for one in task.inputs.values()}:
            continue
        if runner.done(task) is None:
            yield task
        else:
            print(f"{task.name}: done before", flush=True)
            del waiting[key]
            unfinished.remove(key)
