"""Notes of commands: lines on standard error about what a run leaves out or does otherwise than asked."""

import sys

from lightning_utilities.core.rank_zero import rank_zero_only

from latentreward.core.errors import printable


def tell(line: str) -> None:
    """Print a note on global rank 0; a file's name in it cannot steer the terminal."""
    if not getattr(rank_zero_only, "rank", 0):
        print(f"note: {printable(line)}", file=sys.stderr, flush=True)
