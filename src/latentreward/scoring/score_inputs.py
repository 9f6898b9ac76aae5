"""What a run of ``latentreward score`` depends on, told without opening an image or loading a model."""

from collections import Counter
from pathlib import Path

from latentreward.data.image_lists import ImageList
from latentreward.data.images import MISSING
from latentreward.data.readers import count_text
from latentreward.errors import InputError
from latentreward.storage.digests import digest


def require_some(listed: ImageList) -> None:
    """Stop before a model is loaded for nothing.

    Raises:
        InputError: If no row has a file and a prompt.
    """
    if all(row.problem or not Path(row.path).is_file() for row in listed.rows):
        reasons = Counter(row.problem or MISSING for row in listed.rows)
        first = next(row.detail or row.path for row in listed.rows)
        raise InputError(
            f"images: none of {len(listed.rows)} in {listed.source} can be scored: {count_text(reasons)} ({first})"
        )


def images_identity(listed: ImageList) -> str:
    """What tells these images and prompts from others, by names, sizes and times of the files."""
    rows = (repr((row.name, row.prompt, row.problem, _stat(Path(row.path)))) for row in listed.rows)
    return f"{len(listed.rows)} images, {digest(rows)}"


def _stat(path: Path) -> tuple[int, int] | None:
    """Bytes and time of the last change; None without such a file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
