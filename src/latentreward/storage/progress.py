"""How far a long loop is, on standard error."""

import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

INTERVAL = 10.0
"""Seconds between lines where there is no terminal."""
LINE = "{desc} {n_fmt}/{total_fmt}{unit}  {rate_noinv_fmt}{postfix}  {remaining} left"


class Progress:
    """Count, rate and time left: a bar on a terminal; elsewhere a line every ten seconds, and a last one after these.

    Args:
        name: What is being done.
        total: Number of items.
        unit: Plural of an item.
        done: Items that an earlier run did.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        shown: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
        if not sys.stderr.isatty():
            shown = {"file": _Lines(), "bar_format": LINE, "delay": INTERVAL, "mininterval": INTERVAL, "miniters": 1}
        nothing = done >= total
        self._bar = tqdm(desc=name, total=total, initial=done, unit=f" {unit}", smoothing=0, disable=nothing, **shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def add(self, number: int = 1, **values: float) -> None:
        """Count ``number`` items as done; ``values``, such as a loss, are shown beside the rate."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(number)

    def close(self) -> None:
        """Draw no more; a bar stays as it is."""
        self._bar.close()


class _Lines:
    """A stream for tqdm that prints a line where tqdm would draw over the last one."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each line is flushed."""
