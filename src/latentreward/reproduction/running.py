"""Running of rows: each step in a process of its own, steps that rows share once, results written when complete."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from threading import Lock

from latentreward.errors import InputError
from latentreward.reproduction import process
from latentreward.reproduction.measuring import measure
from latentreward.reproduction.results import Result, read_results, result_path, write_result
from latentreward.reproduction.rows import Row
from latentreward.reproduction.sources import commit, computed_with, grouped_modules, machine, source_digest
from latentreward.reproduction.steps import Task
from latentreward.storage.durable import discard, write_file

MEASURING = "latentreward.reproduction.measuring"
"""Module that turns scores into values of items: results depend on it beside the modules of their processes."""
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


@dataclass(frozen=True)
class Job:
    """Row and seed to measure."""

    row: Row
    seed: int
    quick: bool = False

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.row.name} seed {self.seed}"

    def tasks(self) -> dict[str, Task]:
        """Return all tasks of the row and seed by key, dependencies first."""
        tables = self.row.tables(self.seed, self.quick).values()
        return {task.key: task for pair in tables for last in pair if last for task in last.needed()}


def missing(rows: Iterable[Row], output: Path, stale: bool) -> list[Job]:
    """List the rows and seeds without a result; with ``stale``, also those whose source files have changed."""
    found = []
    for row in rows:
        results = read_results(output, row)
        for seed in range(row.seeds):
            if seed not in results or (stale and results[seed].stale):
                found.append(Job(row, seed))
    return found


def run_jobs(jobs: Sequence[Job], output: Path, work: Path, processes: int) -> None:
    """Run what jobs lack, in the order of the jobs as far as possible, and write the result of each.

    Args:
        jobs: Rows and seeds.
        output: Folder of the results.
        work: Folder of the tasks' outputs, which later calls use again.
        processes: Number of processes at a time.

    Raises:
        InputError: At the end, if a process failed; what does not depend on it is done all the same.
    """
    shop = Workshop(work)
    by_name = {job.name: job for job in jobs}
    tasks = {key: task for job in jobs for key, task in job.tasks().items()}
    known = {key for key, task in tasks.items() if shop.done(task)}
    graph = {key: {one.key for one in task.inputs.values()} for key, task in tasks.items()}
    ranks: dict[str, tuple[int, bool]] = {}
    for rank, job in enumerate(jobs):
        graph[job.name], ranks[job.name] = set(job.tasks()), (rank, False)
        for key in job.tasks():
            ranks.setdefault(key, (rank, True))
    print(f"{len(jobs)} to measure; {len(tasks) - len(known)} of {len(tasks)} steps to run", flush=True)

    def work_on(node: str) -> None:
        if node in by_name:
            job = by_name[node]
            write_result(result_path(output, job.row, job.seed), collect(job, shop))
            print(f"measured {node}", flush=True)
        elif node not in known:
            print(f"  {tasks[node].output(work).parent.name}", flush=True)
            shop.run(tasks[node])

    sorter = TopologicalSorter(graph)
    sorter.prepare()
    ready: list[str] = []
    running: dict[Future[None], str] = {}
    problems: list[str] = []
    with ThreadPoolExecutor(processes) as pool:
        try:
            while sorter.is_active():
                ready = sorted([*ready, *sorter.get_ready()], key=ranks.__getitem__)
                while ready and len(running) < processes:
                    node = ready.pop(0)
                    running[pool.submit(work_on, node)] = node
                if not running:
                    break  # what is left depends on a failed step
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    node = running.pop(future)
                    error = future.exception()
                    if isinstance(error, InputError):
                        problems.append(str(error))
                        print(f"  {error}", file=sys.stderr, flush=True)
                    elif error is not None:
                        raise error
                    else:
                        sorter.done(node)
        finally:
            shop.close()
    if problems:
        raise InputError(f"{len(problems)} steps failed; the first: {problems[0]}")


def collect(job: Job, shop: Workshop) -> Result:
    """Compute all values of a row and seed from the outputs of finished tasks."""
    row, tables = job.row, job.row.tables(job.seed, job.quick)
    measured: dict[str, dict[str, object]] = {arm: {} for arm in row.arms}
    for arm in row.arms:
        for name, metric in row.metrics.items():
            scores, pairs = tables[arm, metric.of]
            values = measure(metric, scores.output(shop.folder), pairs and pairs.output(shop.folder))
            measured[arm][name] = values.packed()
    records = {key: done for key, task in job.tasks().items() if (done := shop.done(task))}
    modules = {name for done in records.values() for name in done.modules} | {MEASURING}
    return Result(
        config=row.config_digest(job.seed),
        source=source_digest(modules),
        modules=grouped_modules(modules),
        commit=commit(),
        measured=measured,
        tasks={key[:16]: done.cpu_seconds for key, done in records.items()},
        machine=machine(),
        versions=computed_with(),
    )
