"""How far a long loop is, on standard error."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from typing_extensions import override

INTERVAL = 10.0
"""Seconds between lines where there is no terminal."""
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc} {n_fmt}/{total_fmt}{unit}  {rate_noinv_fmt}{postfix}  {left} left"


class Progress:
    """Count, rate and time left: a bar on a terminal; elsewhere a line every few seconds, and a last one after these.

    Args:
        name: What is being done.
        total: Number of items; None if it is unknown.
        unit: Plural of an item.
        done: Items that an earlier run did.
        interval: Seconds between lines.
        delay: Seconds before the first line; 0 prints a line at the start, and one at the end of any work.
        limit: Returns the seconds until the work ends, however many items are left then.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        done: int = 0,
        *,
        interval: float = INTERVAL,
        delay: float = INTERVAL,
        limit: Callable[[], float] | None = None,
    ) -> None:
        shown: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "bar_format": BAR}
        if not sys.stderr.isatty():
            shown = {"file": _Lines(), "bar_format": LINE, "delay": delay, "mininterval": interval, "miniters": 1}
            shown["position"] = 0  # for a bar inside another, tqdm would move the cursor
        nothing = total is not None and done >= total
        counts: dict[str, Any] = {"total": total, "initial": done, "unit": f" {unit}", "smoothing": 0}
        self._bar = _Bar(limit, desc=name, leave=None, disable=nothing, **counts, **shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def add(self, number: int = 1, **values: float) -> None:
        """Count ``number`` items as done; ``values``, such as a loss, are shown beside the rate."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(number)

    def expect(self, total: int | None) -> None:
        """Set another number of items."""
        self._bar.total = total

    def close(self) -> None:
        """Draw no more; a bar stays as it is, unless it is inside another."""
        self._bar.close()


class _Bar(tqdm):
    """A bar whose field ``left`` is the time until all items are done or ``limit`` ends the work."""

    def __init__(self, limit: Callable[[], float] | None, **settings: Any) -> None:
        self.limit = limit
        super().__init__(**settings)

    @property
    @override
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        done, seconds = self.n - self.initial, []
        if done and self.total is not None:
            seconds.append((self.total - self.n) * values["elapsed"] / done)
        if self.limit is not None:
            seconds.append(self.limit())
        return {**values, "left": self.format_interval(max(0, min(seconds))) if seconds else "?"}


class _Lines:
    """A stream for tqdm that prints a line where tqdm would draw over the last one."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each line is flushed."""
