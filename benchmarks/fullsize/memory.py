"""Memory of processes, and of the machine. Linux only."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


def proportional(pids: Iterable[int]) -> int:
    """Return the proportional set size of processes together, in bytes; one that has ended counts as nothing."""
    total = 0
    for pid in pids:
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
