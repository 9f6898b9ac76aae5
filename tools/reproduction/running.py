"""Running of steps several at a time, of which some may fail; outputs of other source files are made again."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Lock

from latentreward.apps.taste.steps import TOLD_EVERY_S, Task, TaskRunner, progress
from latentreward.core.errors import InputError
from tools.source_digests import source_digest


@dataclass
class StepRunner(TaskRunner):
    """Runner whose outputs are those of today's source files; a command that was stopped starts again."""

    environment: Mapping[str, str] = field(default_factory=dict)  # variables of the processes beyond those here
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False
    goes_on = False

    def source(self, modules: Iterable[str]) -> str:
        """Return the digest of the source files of modules."""
        return source_digest(modules)

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
