"""What the benchmarks share: interleaved rounds, medians with their range, tables, goals.

Tables are printed as Markdown and kept in :data:`TABLES`, from which ``run.py`` and ``gpu.py`` write JSON. Cells are
texts, numbers, :class:`Spread` or :class:`Goal`; each is printed by ``str``.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counting import WorkCounter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.measured import commit, computed_with, machine

TERA = 1e12
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """Values of several rounds, shown as median and range."""

    values: list[float]
    digits: str = ".2f"

    @property
    def median(self) -> float:
        """Median of the values."""
        return median(self.values)

    def __str__(self) -> str:
        low, middle, high = (f"{n:{self.digits}}" for n in (min(self.values), self.median, max(self.values)))
        return f"{middle} ({low}–{high})" if len(self.values) > 1 else middle

    def entries(self) -> dict[str, Any]:
        """Return the entries for JSON."""
        return {"median": self.median, "range": [min(self.values), max(self.values)], "rounds": len(self.values)}


@dataclass(frozen=True)
class Goal:
    """Bounds of a measured value: at least ``least``, at most ``most``."""

    value: float
    least: float | None = None
    most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the value keeps the bound."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        bounds = (("≥", self.least), ("≤", self.most))
        bound = " and ".join(f"{sign} {one:.3g}" for sign, one in bounds if one is not None)
        return f"{bound}, {'reached' if self.reached else '**missed**'}"

    def entries(self) -> dict[str, Any]:
        """Return the entries for JSON."""
        return {"goal": str(self), "reached": self.reached}


@dataclass(frozen=True)
class Table:
    """Table of results."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]]

    def lines(self) -> Iterable[str]:
        """Yield the lines of the table in Markdown, one at a time as rows are added."""
        yield f"\n**{self.title}**\n\n| {' | '.join(self.columns)} |\n{'|---' * len(self.columns)}|"
        for row in self.rows:
            yield f"| {' | '.join(map(str, row))} |"

    def entries(self) -> dict[str, Any]:
        """Return the entries for JSON; numbers stay numbers."""
        rows = [[getattr(cell, "entries", lambda cell=cell: cell)() for cell in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "markdown": "\n".join(self.lines())}


TABLES: list[Table] = []
"""Tables that this process has printed."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table, each row as soon as it is measured, and keep it; the first one below a line on the machine."""
    if not TABLES:
        print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    kept = Table(title, columns, [])
    TABLES.append(kept)
    print(*kept.lines(), sep="\n", flush=True)
    for row in rows:
        kept.rows.append(row)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def circumstances() -> dict[str, Any]:
    """Return machine, load, versions, commit and date."""
    cuda = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    now = {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "commit": commit()}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return {**cuda, **machine(), **computed_with(), **now, "date": date}


# --- time ----------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    """Measure one call: processor time of this process, which other jobs hardly change; wall time with a GPU."""
    if not torch.cuda.is_initialized():
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Spread]:
    """Measure functions that are run in turn, so that load on the machine affects all alike; see :func:`seconds`.

    The first round is a warm-up and left out.
    """
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats + 1)][1:]
    return {name: Spread([times[name] for times in rounds], ".3f") for name in works}


def ratio(above: Spread | list[float], below: Spread | list[float], digits: str = ".2f") -> Spread:
    """Divide the values of two measurements, round by round."""
    first, second = (one.values if isinstance(one, Spread) else one for one in (above, below))
    return Spread([a / b for a, b in zip(first, second, strict=True)], digits)


def flops(work: Callable[[], Any]) -> float:
    """Count the FLOPs of one call, two for each multiply-accumulate operation."""
    with WorkCounter() as counter:
        work()
    return float(counter.flops)
