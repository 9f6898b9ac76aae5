"""A command whose parts can fail in every way, for workers; a module of its own, since workers import it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from latentreward.core.errors import InputError
from latentreward.core.workers import SharedWork

PARTS = 12


def square(trouble: str, folder: Path, base: int) -> Callable[[int], Iterator[tuple[int, int, int]]]:
    """Yield ``base`` + the square of a part's number, the process, and its number of threads."""
    print(f"from {base}")

    def work(number: int) -> Iterator[tuple[int, int, int]]:
        once = folder / f"died_{number}"
        if number == PARTS // 2 and (trouble == "always" or (trouble == "once" and not once.exists())):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == PARTS // 2 and trouble == "wrong input":
            raise InputError("the disk is on fire; put it out")
        if number == PARTS // 2 and trouble == "defect":
            (folder / f"try_{time.time_ns()}").touch()
            raise ZeroDivisionError("by zero")
        time.sleep(0.4 if trouble == "node" else 0.01)
        yield base + number**2, os.getpid(), torch.get_num_threads()

    return work


def squares(
    folder: Path, trouble: str = "", workers: int = 2, done: Callable[[int], None] | None = None
) -> dict[int, tuple[int, int, int]]:
    """Square the numbers of all parts; ``done`` is called with how many have been."""
    command = partial(squares, folder, trouble, workers)
    if SharedWork.in_worker and trouble == "absent":
        raise FileNotFoundError(2, "No such file or directory", str(folder / "model"))
    found: dict[int, tuple[int, int, int]] = {}

    def keep(part: int, result: tuple[int, int, int]) -> None:
        found[part] = result
        if done is not None:
            done(len(found))

    with SharedWork(command, workers, "cpu") as work:
        work.join(
            {"square": partial(square, trouble, folder)},
            {"model": trouble == "other files" and SharedWork.in_worker},
        )
        work.run("square", 100, range(PARTS), keep)
        work.run("square", 100, [], keep)
    return found
