"""Running of rows: steps that rows share run once, and results are written when complete."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from latentreward.apps.steps.running import TaskRunner, run_tasks
from latentreward.apps.steps.sources import CLONE, commit, computed_with, machine
from latentreward.apps.steps.tasks import Task
from latentreward.errors import InputError
from tools.reproduction.measuring import measure
from tools.reproduction.results import Result, read_results, result_path, write_result
from tools.reproduction.rows import Row
from tools.source_digests import grouped_modules, source_digest

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MEASURING = "tools.reproduction.measuring"
"""Module that turns scores into values of items: results depend on it beside the modules of their processes."""


def missing(rows: Iterable[Row], output: Path, stale: bool) -> list[tuple[Row, int]]:
    """List the rows and seeds without a result; with ``stale``, also those whose source files have changed."""
    results = [(row, read_results(output, row)) for row in rows]
    return [
        (row, seed)
        for row, found in results
        for seed in range(row.seeds)
        if seed not in found or (stale and found[seed].stale)
    ]


def measure_rows(
    wanted: Sequence[tuple[Row, int]], output: Path, work: Path, processes: int, quick: bool = False
) -> None:
    """Run the steps that rows and seeds lack, in their order where possible, and write each result to ``output``.

    ``work`` holds the outputs of the steps, which later calls use again; ``quick`` tries all steps.

    Raises:
        InputError: At the end, if a process failed; what does not depend on it is done all the same.
    """
    path = os.pathsep.join([str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])  # steps run modules of tools
    runner = TaskRunner(work, source_digest, environment={**ONE_THREAD, "PYTHONPATH": path})
    needs = [(row, seed, row.tasks(seed, quick)) for row, seed in wanted]
    tasks = {key: task for *_, needed in needs for key, task in needed.items()}
    left = {key: task for key, task in tasks.items() if not runner.done(task)}
    print(f"{len(wanted)} to measure; {len(left)} of {len(tasks)} steps to run", flush=True)
    problems = list[str]()

    def write_complete(finished: Task | None = None) -> None:
        """Write the results whose steps have all finished."""
        if finished is not None:
            del left[finished.key]
        complete = [one for one in needs if not one[2].keys() & left.keys()]
        needs[:] = [one for one in needs if one[2].keys() & left.keys()]
        for row, seed, needed in complete:
            try:
                write_result(result_path(output, row, seed), collect(row, seed, quick, needed, runner))
                print(f"measured {row.name} seed {seed}", flush=True)
            except InputError as error:
                problems.append(str(error))
                print(error, file=sys.stderr, flush=True)

    write_complete()
    problems += run_tasks([*left.values()], runner, processes, write_complete, keep_going=True)
    if problems:
        raise InputError(f"{len(problems)} steps failed; the first: {problems[0]}")


def collect(row: Row, seed: int, quick: bool, tasks: Mapping[str, Task], runner: TaskRunner) -> Result:
    """Compute all values of a row and seed from the outputs of finished tasks."""
    tables = row.tables(seed, quick)
    measured: dict[str, dict[str, object]] = {arm: {} for arm in row.arms}
    for arm in row.arms:
        for name, metric in row.metrics.items():
            scores, pairs = tables[arm, metric.of]
            values = measure(metric, scores.output(runner.folder), pairs and pairs.output(runner.folder))
            measured[arm][name] = values.packed()
    records = {key: done for key, task in tasks.items() if (done := runner.done(task))}
    modules = {name for done in records.values() for name in done.modules} | {MEASURING}
    return Result(
        config=row.config_digest(seed),
        source=source_digest(modules),
        modules=grouped_modules(modules),
        commit=commit(),
        measured=measured,
        tasks={key[:16]: done.cpu_seconds for key, done in records.items()},
        machine=machine(),
        versions=computed_with(),
    )
