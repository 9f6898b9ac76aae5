"""Memory of processes, and of the machine. Linux only."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self


def proportional(*pids: int) -> int:
    """Return the proportional set size of processes together, in bytes.

    Memory that N processes share counts 1/N in each.

    Args:
        pids: Processes, this one by default; one that has ended counts as nothing.
    """
    total = 0
    for pid in pids or (os.getpid(),):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total


def family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def available() -> int:
    """Return the bytes that programs can still take without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


class PeakMemory:
    """Context that watches this process's proportional set size, read every 20 ms in a thread.

    Attributes:
        before: Bytes at the start.
        after: Bytes at the end.
        peak: Greatest number of bytes.
    """

    def __enter__(self) -> Self:
        self.before = self.peak = proportional()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, proportional())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.after = proportional()
        self.peak = max(self.peak, self.after)
