"""Running of rows: steps that rows share run once, and results are written when complete."""

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from latentreward.errors import InputError
from latentreward.steps.sources import CLONE, commit, computed_with, grouped_modules, machine, source_digest
from latentreward.steps.tasks import Task
from latentreward.steps.workshop import ONE_THREAD, Workshop
from tools.reproduction.measuring import measure
from tools.reproduction.results import Result, read_results, result_path, write_result
from tools.reproduction.rows import Row

MEASURING = "tools.reproduction.measuring"
"""Module that turns scores into values of items: results depend on it beside the modules of their processes."""


def workshop(folder: Path) -> Workshop:
    """Return the folder of all outputs, whose processes also find the modules of ``tools``, wherever they start."""
    path = os.pathsep.join([str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return Workshop(folder, environment={**ONE_THREAD, "PYTHONPATH": path})


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
    """Run what jobs lack, in the order of the jobs as far as possible, and write the result of each to ``output``.

    ``work`` holds the tasks' outputs, which later calls use again.

    Raises:
        InputError: At the end, if a process failed; what does not depend on it is done all the same.
    """
    shop = workshop(work)
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
