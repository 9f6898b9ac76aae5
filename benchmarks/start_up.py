"""Measure the start-up of subcommands against the imports that they cannot do without; prints a Markdown table.

    python benchmarks/start_up.py [--rounds 7]

Every round starts each process once, one after the other: ``score --help`` and ``import torch``, ``fit --help`` and
``import lightning.pytorch.cli``. Files are in the page cache, and all modules compiled, as pip leaves them. CPU seconds
do not depend on what else runs, wall seconds do.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from measuring import Goal, Spread, ratio, table

PROCESSES = {
    "score --help": ["-m", "latentreward", "score", "--help"],
    "import torch": ["-c", "import torch"],
    "fit --help": ["-m", "latentreward", "fit", "--help"],
    "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
}
PAIRS = {("score --help", "import torch"): 1.5, ("fit --help", "import lightning.pytorch.cli"): 1.15}
"""Process and the one to compare with → goal of the ratio."""


def seconds(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run Python with arguments; return CPU and wall seconds."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system, wall


def main() -> None:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory(prefix="start_up_") as compiled:
        environment |= {"PYTHONPYCACHEPREFIX": compiled, "OMP_NUM_THREADS": "1"}
        for arguments in PROCESSES.values():  # compiles the modules, reads their files
            seconds(arguments, environment)
        rounds = [
            {name: seconds(arguments, environment) for name, arguments in PROCESSES.items()}
            for _ in range(options.rounds)
        ]
    rows = []
    for (ours, theirs), goal in PAIRS.items():
        cells: list[Spread] = []
        for kind in (0, 1):
            both = [Spread([one[name][kind] for one in rounds]) for name in (ours, theirs)]
            cells += [*both, ratio(*both)]
        rows.append([f"{ours} / {theirs}", *cells, Goal(cells[2].median, most=goal)])
    columns = ("processes", "CPU s", "CPU s", "ratio", "wall s", "wall s", "ratio", "goal of CPU s")
    table(f"Start-up, {options.rounds} rounds, one thread", columns, rows)


if __name__ == "__main__":
    main()
