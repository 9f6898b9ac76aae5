"""``python -m tools.reproduce``: measure claims and ablations of the papers in the tiny world.

Steps that rows share run once, and a row's results are written when its steps are complete.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from latentreward.apps.cli import failures_told
from latentreward.core.errors import InputError, check_at_least_one, check_range
from latentreward.core.interrupts import interrupts_told, sigterm_interrupts
from latentreward.core.storage.durable import locked
from tools.measured import CLONE, commit, computed_with, machine
from tools.reproduction.measuring import measure
from tools.reproduction.page import status_table, write_page
from tools.reproduction.planning import Planner, further_seeds
from tools.reproduction.results import Result, read_results, result_path, write_result
from tools.reproduction.rows import FOLDER, WHOLE, Row, all_rows, choose_rows
from tools.reproduction.running import StepRunner, run_tasks
from tools.reproduction.tasks import Task
from tools.source_digests import grouped_modules, source_digest

MEASURING = "tools.reproduction.measuring"
"""Module that turns scores into values of items: results depend on it beside the modules of their processes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure rows; None takes the arguments of the process."""
    parser = ArgumentParser(prog="python -m tools.reproduce", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"rows to measure, in this order; by default all of {FOLDER}")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes at a time, with one thread each")
    parser.add_argument("--stale", action="store_true", help="measure again what other source files measured")
    parser.add_argument("--status", action="store_true", help="print only what is measured, and what rows may take")
    parser.add_argument("--quick", action="store_true", help="try all steps, with two training steps each")
    parser.add_argument("--budget", type=float, help="hours of processor time for further seeds where they decide most")
    parser.add_argument("--page", type=Path, help="page to write from all results, with plots in `images` beside it")
    parser.add_argument("--output", type=Path, default=Path("reproduction"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="folder of trained models and scores")
    given = vars(parser.parse_args(arguments))
    with failures_told(), sigterm_interrupts():
        page = given.pop("page")
        reproduce(**given)
        if page is not None:
            write_page(page, list(all_rows().values()), given["output"])
            print(f"{page} is written")


def reproduce(
    names: Sequence[str] = (),
    *,
    jobs: int = 1,
    stale: bool = False,
    status: bool = False,
    quick: bool = False,
    budget: float | None = None,
    output: Path = Path("reproduction"),
    work: Path = Path("runs/reproduce"),
) -> None:
    """Train and evaluate what the rows compare, for several seeds, and write each row's values to small JSON files.

    A row and seed that is measured already is skipped. If source files that it imported have changed since, it is shown
    with the commit at which it was measured. Ctrl-C loses only the steps that are running: the same command goes on
    after those that finished. For the arguments see :func:`main`.

    Raises:
        InputError: If a row does not exist, a step fails, or another run writes to the work folder.
    """
    check_at_least_one(jobs=jobs)
    if budget is not None:
        check_range("(0, inf)", "it is hours of processor time", budget=budget)
        if quick or stale:
            raise InputError("budget: it is for further seeds alone; leave quick and stale out, or the budget")
    rows = choose_rows(names)
    output = work / "quick" / "reproduction" if quick else output
    able = [row for row in rows if not row.lacks]
    wanted = [(row, WHOLE) for row in able] if quick else missing(able, output, stale)
    if not quick:
        print(status_table(rows, output))
    if left := [row for row in rows if row.lacks]:
        print(f"skipped {', '.join(row.name for row in left)}: {left[0].lacks}")
    if (wanted or budget is not None) and not status:
        folder = work.resolve() / ("quick" if quick else "")
        with (
            locked(folder, "work"),
            interrupts_told(lambda: f"what is done is kept in {work} and {output}: the same command goes on"),
        ):
            if budget is None:
                measure_rows(wanted, output, folder, jobs, quick)
            else:
                spend(able, output, folder, jobs, 3600 * budget)


def missing(rows: Iterable[Row], output: Path, stale: bool) -> list[tuple[Row, int]]:
    """List the seeds that rows lack, whole repetitions; with ``stale``, also those whose source files have changed."""
    results = [(row, read_results(output, row)) for row in rows]
    changed = [(row, seed) for row, found in results for seed in found if stale and found[seed].stale]
    return changed + [
        (row, seed) for row, found in results for seed in further_seeds(found, max(0, row.seeds - len(found)))
    ]


def spend(rows: Sequence[Row], output: Path, work: Path, processes: int, seconds: float) -> None:
    """Measure further seeds of rows, the most promising first, while their expected processor time fits.

    See :func:`measure_rows` for the other arguments.
    """
    planner = Planner(rows, output, task_runner(work).done)
    while chosen := planner.chosen(processes, seconds):
        for one in chosen:
            print(f"{one.row.name} seed {one.seed}: {one.seconds:.0f} s, {3600 * one.rate:.2g} decisions an hour")
        seconds -= measure_rows([(one.row, one.seed) for one in chosen], output, work, processes)
        print(f"{seconds / 3600:.2f} hours left", flush=True)


def measure_rows(
    wanted: Sequence[tuple[Row, int]], output: Path, work: Path, processes: int, quick: bool = False
) -> float:
    """Run the steps that rows and seeds lack, in their order where possible, and write each result to ``output``.

    ``work`` holds the outputs of the steps, which later calls use again; ``quick`` tries all steps.

    Returns:
        Processor time of the steps that ran.

    Raises:
        InputError: At the end, if a process failed; what does not depend on it is done all the same.
    """
    runner = task_runner(work)
    needs = [(row, seed, row.tasks(seed, quick)) for row, seed in wanted]
    tasks = {key: task for *_, needed in needs for key, task in needed.items()}
    left = {key: task for key, task in tasks.items() if not runner.done(task)}
    ran = [*left.values()]
    print(f"{len(wanted)} to measure; {len(left)} of {len(tasks)} steps to run", flush=True)
    problems = list[str]()

    def write_complete(finished: Task | None = None) -> None:
        """Write the results whose steps have all finished."""
        if finished is not None:
            del left[finished.key]
        for one in [one for one in needs if not one[2].keys() & left.keys()]:
            needs.remove(one)
            row, seed, needed = one
            try:
                write_result(result_path(output, row, seed), collect(row, seed, quick, needed, runner))
                print(f"measured {row.name} seed {seed}", flush=True)
            except InputError as error:
                problems.append(str(error))
                print(error, file=sys.stderr, flush=True)

    write_complete()
    problems += run_tasks([*left.values()], runner, processes, write_complete)
    if problems:
        raise InputError(f"{len(problems)} steps failed; the first: {problems[0]}")
    return sum(done.cpu_seconds for task in ran if (done := runner.done(task)))


def task_runner(work: Path) -> StepRunner:
    """Return a runner of steps, whose processes may run modules of ``tools``."""
    path = os.pathsep.join(filter(None, [str(CLONE), os.environ.get("PYTHONPATH")]))
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return StepRunner(work, environment={**one_thread, "PYTHONPATH": path})


def collect(row: Row, seed: int, quick: bool, tasks: Mapping[str, Task], runner: StepRunner) -> Result:
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


if __name__ == "__main__":
    main()
