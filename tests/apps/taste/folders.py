"""Folders of small pictures of one's own."""

from pathlib import Path

import numpy as np
from PIL import Image


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
