"""Progress of a long loop, on standard error."""

import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

INTERVAL = 10.0  # seconds between progress lines when standard error is not a terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc} {n_fmt}/{total_fmt}{unit}  {rate_noinv_fmt}{postfix}  {remaining} left"


class Progress:
    """Display of count, rate and time left: a bar on a terminal, a line every ``interval`` seconds elsewhere.

    Args:
        name: Label of the work, shown first.
        total: Number of items; None if it is unknown.
        unit: Plural name of the items.
        done: Number of items that an earlier run finished.
        interval: Seconds between lines. A last line follows at the end if any line was printed.
        delay: Seconds before the first line; 0 prints a line at the start, and always one at the end.
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
    ) -> None:
        shown: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "bar_format": BAR}
        if not sys.stderr.isatty():
            shown = {"file": _Lines(), "bar_format": LINE, "delay": delay, "mininterval": interval, "miniters": 1}
            shown["position"] = 0  # in nested bars, tqdm would move the cursor
        nothing = total is not None and done >= total
        counts: dict[str, Any] = {"total": total, "initial": done, "unit": f" {unit}", "smoothing": 0}
        self._bar = tqdm(desc=name, leave=None, disable=nothing, **counts, **shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def add(self, number: int = 1, **values: float) -> None:
        """Count ``number`` more items as done; show ``values``, such as a loss, beside the rate."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(number)

    def expect(self, total: int | None) -> None:
        """Change the total number of items."""
        self._bar.total = total

    def close(self) -> None:
        """Stop the display; the bar stays on screen, except a nested bar, which is cleared."""
        self._bar.close()


class _Lines:
    """An output stream for tqdm that prints each update as a new line instead of overwriting the last one."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each line is flushed."""
