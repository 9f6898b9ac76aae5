"""``latentreward reproduce``: measure claims and ablations of the papers in the tiny world."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from latentreward.errors import check_at_least_one
from latentreward.interrupts import interrupts_told
from latentreward.settings.functions import run_function
from latentreward.storage.locks import locked
from tools.reproduction.page import status_table, write_page
from tools.reproduction.rows import all_rows, choose_rows
from tools.reproduction.running import measure_rows, missing


def run(command: str, arguments: Sequence[str]) -> None:
    """Run ``latentreward reproduce [NAME ...]``.

    Raises:
        InputError: If an argument is wrong, or a step fails.
    """
    names = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    given = [f"--names={json.dumps(names)}"] if names else []
    run_function(reproduce, command, [*given, *arguments[len(names) :]], bare=0, classes=False)


def reproduce(
    names: list[str] | None = None,
    *,
    jobs: int = 1,
    stale: bool = False,
    status: bool = False,
    quick: bool = False,
    page: Path | None = None,
    output: Path = Path("reproduction"),
    work: Path = Path("runs/reproduce"),
) -> None:
    """Train and evaluate what the rows compare, for several seeds, and write each row's values to small JSON files.

    ``latentreward configs reproduce`` lists the rows. A row and seed that is measured already is skipped. If source
    files that it imported have changed since, it is shown with the commit at which it was measured. Ctrl-C loses only
    the steps that are running: the same command goes on after those that finished.

    Args:
        names: Rows to measure, in this order; all by default. Write them before the options: ``reproduce ROW ROW``.
        jobs: Number of processes at a time, with one thread each.
        stale: Whether to measure again what was measured with other source files.
        status: Whether to print only what is measured, without running anything. The expected processor time of a row
            leaves out steps that other rows share; they are run once, for the first row that needs them.
        quick: Whether to only try all steps, with two training steps each; results go to the work folder.
        page: Markdown page to write from all results, with plots in the folder ``images`` beside it.
        output: Folder of the results.
        work: Folder of trained models and scores; rows share what they have in common.

    Raises:
        InputError: If a row does not exist, a step fails, or another run writes to the work folder.
    """
    check_at_least_one(jobs=jobs)
    rows = choose_rows(names or [])
    output = work / "quick" / "reproduction" if quick else output
    wanted = [(row, 0) for row in rows] if quick else missing(rows, output, stale)
    if not quick:
        print(status_table(rows, output))
    if wanted and not status:
        folder = work.resolve() / ("quick" if quick else "")
        with (
            locked(folder, "work"),
            interrupts_told(lambda: f"what is done is kept in {work} and {output}: the same command goes on"),
        ):
            measure_rows(wanted, output, folder, jobs, quick)
    if page is not None:
        write_page(page, list(all_rows().values()), output)
        print(f"{page} is written")
