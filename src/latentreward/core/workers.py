"""Work of one command that several processes do: workers on this machine, or on a Ray cluster."""

from __future__ import annotations

import io
import os
import pickle
import secrets
import signal
import socket
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from latentreward.core.errors import InputError, check_at_least_one, check_range, one_line
from latentreward.core.running import find_device

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType, TracebackType

ATTEMPTS = 3  # Times that a part, or the start of a worker, may fail before it ends the run
WAIT_S = 60.0  # Seconds without a working worker after which the first process says what it waits for

Part = Any  # What one call of the work does, such as a list of pictures to sample; it can be pickled
Result = Any  # What a part gives, such as the bytes of a picture; it can be pickled
Task = Callable[[Any], Callable[[Part], Iterable[Result]]]
"""Function that takes what all parts need, loads models, and returns the function that yields the results of a part."""


class Joined(BaseException):
    """End of a command in a worker: from here on, the first process sends the worker its parts."""

    def __init__(self, work: SharedWork) -> None:
        super().__init__()
        self.work = work


class SharedWork:
    """Work of one command, cut into parts which this process or several workers do; a context manager around it.

    The first process runs the command. It calls :meth:`join`, checks its input, calls :meth:`run` for each list of
    parts, and writes what comes back, so that workers need no folder in common with it. A worker runs the same command
    until :meth:`join`: it reads the command's input files, which should be there under the same path, and says if its
    settings, files or packages differ from those of the first process.

    Args:
        command: The command with all of its arguments, which can be pickled.
        workers: Number of workers. 1 is this process, without Ray.
        device: Name of the device: with several workers ``auto`` or ``cpu``.
        gpus_per_worker: GPUs of a worker, or the share of one; by default 1 if the workers' machines have any.
    """

    in_worker = False
    """Whether this process is a worker."""

    def __init__(
        self, command: Callable[[], Any], workers: int, device: str, gpus_per_worker: float | None = None
    ) -> None:
        self.workers, self._device, self._gpus, self._command = workers, device, gpus_per_worker, command
        self._tasks: Mapping[str, Task] = {}
        self._settings: Mapping[str, Any] = {}
        self._ray: ModuleType | None = None
        self._pool: list[Any] = []  # workers that have joined, or are about to
        self._started = False  # whether this process started Ray
        check_at_least_one(workers=workers)
        check_range("[0, inf)", gpus_per_worker=gpus_per_worker)
        if workers > 1 and device not in ("auto", "cpu"):
            raise InputError(f"device is {device!r}, and workers is {workers}; leave device out: each gets its own")

    @cached_property
    def device(self) -> torch.device:
        """Device of this process."""
        return find_device(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._ray is not None:
            for worker in self._pool:
                self._ray.kill(worker)
            if self._started:
                with _own_sigterm():
                    self._ray.shutdown()

    def join(self, tasks: Mapping[str, Task], settings: Mapping[str, Any]) -> None:
        """Set the tasks by name, and settings and fingerprints on which results depend; in a worker raise Joined."""
        self._tasks, self._settings = tasks, settings
        if SharedWork.in_worker:
            raise Joined(self)

    def run(
        self,
        task: str,
        given: Any,
        parts: Sequence[Any],
        keep: Callable[[Any, Result], None],
        send: Callable[[Any], Part] = lambda part: part,
    ) -> None:
        """Do all parts by the task of a name, and return when they are done; for the first process.

        A part whose worker dies is done again by another one; one that fails for the third time ends the run.

        Args:
            task: Name of the task.
            given: What the task takes; workers get it too.
            parts: Parts to do.
            keep: Function that takes each part with each of its results, in the order in which they come.
            send: Function that turns a part, when its turn comes, into what the task's function takes.
        """
        if self.workers > 1 and parts:
            for part, result in self._shared(task, given, parts, send):
                keep(part, result)
        elif parts:
            work = self._tasks[task](given)
            for part in parts:
                for result in work(send(part)):
                    keep(part, result)

    def _shared(self, task: str, given: Any, parts: Sequence[Any], send: Callable[[Any], Part]) -> Iterator[Any]:
        """Give each worker that has joined one part after another, and yield parts with their results."""
        ray = self._ray or self._start()
        shared, left, failed = ray.put(given), deque(range(len(parts))), Counter[int | None]()
        calls: dict[Any, tuple[Any, int | None]] = {}  # running calls → worker, and part, which is None while it joins
        idle = [*self._pool]
        while left or any(number is not None for _, number in calls.values()):
            for _ in range(min(self.workers, len(parts)) - len(self._pool)):
                self._pool.append(worker := self._new_worker())
                calls[worker.join.remote(*self._joining)] = worker, None
            while left and idle:
                worker, next_one = idle.pop(), left.popleft()
                calls[worker.do.remote(task, shared, send(parts[next_one]))] = worker, next_one
            ready, _ = ray.wait([*calls], num_returns=1, timeout=WAIT_S)
            if not ready:
                if all(number is None for _, number in calls.values()):
                    found = ray.cluster_resources()
                    has = f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"
                    print(f"waiting for workers; the cluster has {has}", file=sys.stderr, flush=True)
                continue
            worker, number = calls.pop(ready[0])
            try:
                problem, fatal, results = ray.get(ready[0])
            except ray.exceptions.RayError as error:  # the worker, or its node, is gone
                self._pool.remove(worker)
                problem, fatal, results = one_line(error)[:300], False, ()
                print("a worker has ended: another one does its part", file=sys.stderr, flush=True)
            else:
                idle.append(worker)
                fatal = fatal or (number is None and bool(problem))  # wrong files or packages stay wrong
            if problem:
                failed[number] += 1
                if fatal or failed[number] == ATTEMPTS:
                    times = "" if fatal else f"{'a worker' if number is None else 'a part'} failed {ATTEMPTS} times: "
                    raise InputError(f"{times}{problem}")
                left.extendleft([] if number is None else [number])
                continue
            failed[None] = 0  # starts of workers count until one has joined
            for result in results:
                yield parts[number or 0], result
        self._pool = idle  # a worker that has not joined by now is not needed
        for worker in [worker for worker, _ in calls.values()]:
            ray.kill(worker)

    def _start(self) -> ModuleType:
        """Start Ray on this machine, or connect to the cluster of ``RAY_ADDRESS``."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers about each cluster
        os.environ.setdefault("RAY_worker_niceness", "0")  # else anything else on this machine goes before them
        address = os.environ.get("RAY_ADDRESS")
        if not address and "RAY_AUTH_MODE" not in os.environ:  # else other users of this machine could run code here
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            import ray
            from ray import cloudpickle
        except ImportError as error:
            raise InputError(f"workers={self.workers} needs Ray: pip install 'latentreward[cluster]'") from error
        local: dict[str, Any] = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        local["num_cpus"] = max(self.workers, os.cpu_count() or 1)
        if not ray.is_initialized():
            with _own_sigterm():
                try:
                    options = {"address": address} if address else local
                    ray.init(**options, log_to_driver=False, logging_level="ERROR")
                except (OSError, RuntimeError, ValueError) as error:
                    at = f"RAY_ADDRESS={address}" if address else f"workers={self.workers}"
                    raise InputError(f"{at}: Ray did not start ({one_line(error)[:300]})") from error
            self._started = True
        found = ray.cluster_resources().get("GPU", 0)
        if self._gpus is None:
            self._gpus = 1.0 if found and self._device != "cpu" else 0.0
        if not address and self._gpus * self.workers > found:
            raise InputError(
                f"workers={self.workers} with gpus_per_worker={self._gpus:g}: this machine has {found:g} GPUs; set "
                "fewer, or a share such as gpus_per_worker=0.5"
            )
        self._ray = ray
        from latentreward.core.reports.page import versions

        settings = pickle.dumps({**self._settings, "versions": versions()})
        command = cloudpickle.dumps(self._command)
        # Another number of threads would change the last bits of results.
        self._joining = str(Path.cwd()), sys.path, torch.get_num_threads(), settings, command
        return ray

    def _new_worker(self) -> Any:
        assert self._ray is not None
        # A new worker takes the place of one that is gone: Ray's own restart would keep its part waiting for a node.
        kind = self._ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=0, max_task_retries=0)(Worker)
        return kind.remote()


Answer = tuple[str, bool, list[Result]]  # Problem or an empty text, whether it ends the run, and results


class Worker:
    """Process of Ray that does parts of a command's work."""

    def join(self, folder: str, path: Sequence[str], threads: int, settings: bytes, command: bytes) -> Answer:
        """Run the pickled command until it joins, and compare its settings with those of the first process."""
        from latentreward.core.reports.page import versions

        SharedWork.in_worker = True
        torch.set_num_threads(threads)
        try:
            os.chdir(folder)
            sys.path += [one for one in path if one not in sys.path]
            first = pickle.loads(settings)  # of the process that may run any code here
            own = {"versions": versions()}
            self._compare({"versions": first["versions"]}, own)
            pickle.loads(command)()
        except Joined as joined:
            self._work, self._task = joined.work, ""
            return self._guarded(lambda: self._compare(first, {**self._work._settings, **own}))
        except Exception as error:
            return _told(error)
        raise AssertionError("a command that shares work joins")

    def do(self, task: str, given: Any, part: Part) -> Answer:
        """Do one part by the task of a name."""

        def work() -> list[Result]:
            if task != self._task:
                self.__dict__.pop("_do", None)  # else the models of two tasks would be in memory
                self._do, self._task = self._work._tasks[task](given), task
            return list(self._do(part))

        return self._guarded(work)

    def _compare(self, first: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        from latentreward.core.storage.run_folder import first_difference

        if difference := first_difference(first, own):
            before, _, now = difference.partition(", now it is ")
            raise InputError(f"{before} in the first process{now and f', {now} in this worker'}; make both the same")

    def _guarded(self, work: Callable[[], list[Result] | None]) -> Answer:
        with redirect_stdout(io.StringIO()):  # the first process prints what there is to say
            try:
                return "", False, work() or []
            except Exception as error:
                return _told(error)


def _told(error: Exception) -> Answer:
    """Return what the first process says about an error; one that is not the user's may pass, so it is tried again."""
    known = isinstance(error, InputError | OSError)
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = one_line(error) if known else f"{type(error).__name__}: {one_line(error)} ({last.filename}:{last.lineno})"
    return f"{line} (worker {os.getpid()} on {socket.gethostname()})", isinstance(error, InputError), []


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handling of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
