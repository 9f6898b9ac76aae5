"""Folders of small pictures of one's own, the server of their page in a thread, and steps in forked processes."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from latentreward.apps.cli import main
from latentreward.apps.serving.settings import bind
from latentreward.apps.taste.rating_page import HOST, RatingServer
from latentreward.apps.taste.ratings import Ratings
from latentreward.apps.taste.steps import Step
from tests.processes import Forked


def draw(path: Path, number: int, caption: str = "") -> Path:
    """Write a picture of which no other number has the same bytes, with a caption beside it unless that is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng([number < 0, abs(number)]).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
        path
    )
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def sorted_folder(folder: Path, pairs: int, prompts: int = 0) -> Path:
    """Write ``chosen/`` and ``rejected/`` with pictures of equal names, and captions of so many different prompts."""
    for number in range(pairs):
        caption = f"prompt {number % prompts}" if prompts else ""
        draw(folder / "chosen" / f"{number:03}.png", 2 * number, caption)
        draw(folder / "rejected" / f"{number:03}.png", 2 * number + 1)
    return folder


def unsorted_folder(folder: Path, pictures: int) -> Path:
    """Write pictures to rate."""
    for number in range(pictures):
        draw(folder / f"{number:03}.png", number)
    return folder


@contextmanager
def rating_server(folder: Path) -> Iterator[RatingServer]:
    """Serve the page for a folder inside the block, at a free port."""
    with RatingServer(Ratings(folder), bind(HOST, 0)) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


def fork_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps run in forks of this process, instead of in processes of their own."""
    monkeypatch.setattr("latentreward.apps.taste.steps.call", call)


def call(step: Step, log: IO[str]) -> int:
    running = Forked(run, [step.arguments], output=Path(log.name))
    try:
        return running.wait(600)
    finally:
        running.kill()


def run(arguments: Sequence[str]) -> None:
    sys.argv = ["latentreward", *arguments]
    main()
