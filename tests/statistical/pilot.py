"""Derive the thresholds of the statistical tests from pilot runs, and try them on new seeds and broken trainers.

``python -m tests.statistical.pilot`` runs what ``--lines`` does not hold yet, one line per run, and then writes
``pilot.json``, from which the tests read their thresholds. A threshold is

    mean − SAFETY · t · sd · sqrt(1 + 1/n)

of the n pilot values, where t is the quantile of Student's distribution with n − 1 degrees of freedom that a new value
falls short of with probability FALSE_ALARMS / number of statistics, if values are normally distributed.
"""

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mpmath
import numpy as np
import torch

from tests.statistical.broken import FAULTS
from tests.statistical.trainings import TRAININGS

FALSE_ALARMS = 1e-3
"""Probability that any statistic of a working trainer is below its threshold."""
SAFETY = 1.5
"""Factor for tails heavier than the normal distribution's."""
SEEDS = {"pilot": range(1000, 1030), "new": range(2000, 2020), "broken": range(3000, 3020)}
PILOT = Path(__file__).parent / "pilot.json"
Groups = dict[str, dict[str, list[float]]]


def student_quantile(probability: float, degrees: int) -> float:
    """Find t such that a value of Student's distribution is above t with ``probability`` (below ½)."""

    def above(t: Any) -> Any:
        return mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t**2), regularized=True) / 2

    return float(mpmath.findroot(lambda t: mpmath.log(above(t) / probability), (3, 4)))


def reach(runs: int, statistics: int) -> float:
    """Compute how many standard deviations of the pilot's ``runs`` a threshold lies below their mean."""
    return SAFETY * student_quantile(FALSE_ALARMS / statistics, runs - 1) * (1 + 1 / runs) ** 0.5


def threshold(values: Sequence[float], statistics: int) -> float:
    """Compute the threshold of one of ``statistics`` statistics from its pilot values."""
    return float(np.mean(values) - reach(len(values), statistics) * np.std(values, ddof=1))


def caught(statistics: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    """Name the statistics that are not above their threshold; not-a-number is not."""
    return [name for name, value in statistics.items() if not value > thresholds[name]]


def planned() -> Iterator[tuple[str, str, int]]:
    """Yield the runs: group (``pilot``, ``new`` or a fault), training, seed."""
    for group in ("pilot", "new"):
        yield from ((group, training, seed) for seed in SEEDS[group] for training in TRAININGS)
    yield from ((fault, training, seed) for fault, (training, _) in FAULTS.items() for seed in SEEDS["broken"])


def measured(lines: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Run what is missing in ``lines``, and return the statistics of all planned runs."""
    records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(record["group"], record["training"], record["seed"]): record["statistics"] for record in records}
    for group, training, seed in planned():
        if (group, training, seed) in done:
            continue
        started = time.process_time()
        trained = TRAININGS[training](seed, FAULTS[group][1]) if group in FAULTS else TRAININGS[training](seed)
        values = {name: round(value, 4) for name, value in trained.statistics.items()}
        done[group, training, seed] = values
        seconds = round(time.process_time() - started, 1)
        record = {"group": group, "training": training, "seed": seed, "statistics": values, "cpu_seconds": seconds}
        with lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)
    return done


def by_group(runs: Mapping[tuple[str, str, int], Mapping[str, float]]) -> Groups:
    """Put the values of all planned runs together: group → statistic → values in the order of the seeds."""
    groups: Groups = {}
    for group, training, seed in planned():
        for name, value in runs[group, training, seed].items():
            groups.setdefault(group, {}).setdefault(name, []).append(value)
    return groups


def caught_seeds(columns: Mapping[str, Sequence[float]], thresholds: Mapping[str, float]) -> int:
    """Count the seeds of a group that have a statistic below its threshold."""
    runs = zip(*columns.values(), strict=True)
    return sum(bool(caught(dict(zip(columns, values, strict=True)), thresholds)) for values in runs)


def tables(groups: Groups, thresholds: Mapping[str, float]) -> str:
    """Show pilot, thresholds, new seeds and broken trainers as Markdown."""
    lines = ["| statistic | pilot: mean ± sd | lowest | threshold | new seeds: lowest |", "|---|---|---|---|---|"]
    for name, values in groups["pilot"].items():
        spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} | {min(values):.3f}"
        lines.append(f"| `{name}` | {spread} | {thresholds[name]:.3f} | {min(groups['new'][name]):.3f} |")
    lines += ["", "| trainer | values of its statistics | caught |", "|---|---|---|"]
    for group in ("new", *FAULTS):
        columns = groups[group]
        ranges = ", ".join(f"`{name}` {min(values):.3f} to {max(values):.3f}" for name, values in columns.items())
        count = f"{caught_seeds(columns, thresholds)} of {len(next(iter(columns.values())))}"
        lines.append(f"| {'working' if group == 'new' else group} | {ranges} | {count} |")
    return "\n".join(lines)


def main() -> None:
    """Run the pilot."""
    parser = argparse.ArgumentParser(prog="python -m tests.statistical.pilot", description=main.__doc__)
    parser.add_argument("--lines", type=Path, default=Path("runs/pilot.jsonl"), help="file of the runs done so far")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    arguments.lines.parent.mkdir(parents=True, exist_ok=True)
    groups = by_group(measured(arguments.lines))
    thresholds = {name: round(threshold(v, len(groups["pilot"])), 4) for name, v in groups["pilot"].items()}
    rows = ",\n".join(f'  "{name}": {json.dumps(columns)}' for name, columns in groups.items())
    head = f' "torch": "{torch.__version__}",\n "thresholds": {json.dumps(thresholds)}'
    PILOT.write_text(f'{{\n{head},\n "values": {{\n{rows}\n }}\n}}\n')
    print(tables(groups, thresholds))


if __name__ == "__main__":
    main()
