"""Progress lines for the long loops of pretraining."""

from __future__ import annotations

import sys
import time


class Progress:
    """Print ``name step/total``, smoothed loss, speed and time left every few seconds.

    Args:
        name: First word of every line.
        total: Steps to expect.
        interval: Seconds between lines.
    """

    def __init__(self, name: str, total: int, interval: float = 15.0) -> None:
        self.name, self.total, self.interval = name, total, interval
        self.step = 0
        self.loss: float | None = None
        self.start = self.printed = time.monotonic()

    def update(self, loss: float, **extra: float) -> None:
        """Count one step; ``extra`` values are printed as they are."""
        self.step += 1
        self.loss = loss if self.loss is None else 0.99 * self.loss + 0.01 * loss
        now = time.monotonic()
        if now - self.printed < self.interval and self.step < self.total:
            return
        self.printed = now
        speed = self.step / (now - self.start)
        left = (self.total - self.step) / speed
        more = "".join(f"  {key} {value:.4g}" for key, value in extra.items())
        line = f"{self.name} {self.step}/{self.total}  loss {self.loss:.4f}{more}  {speed:.1f} steps/s"
        print(f"{line}  {int(left // 60)}:{int(left % 60):02d} left", file=sys.stderr, flush=True)
