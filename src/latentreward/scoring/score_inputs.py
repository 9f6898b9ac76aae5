"""Check and identity of the images of ``latentreward score``, without opening an image or loading a model."""

from collections import Counter
from pathlib import Path

from latentreward.data.image_lists import ImageList
from latentreward.data.images import MISSING
from latentreward.data.readers import count_text
from latentreward.errors import InputError
from latentreward.storage.digests import digest


def require_some(listed: ImageList) -> None:
    """Check, before a model is loaded, that at least one image of the list can be scored.

    Raises:
        InputError: If every row has a problem or lacks its file.
    """
    if all(row.problem or not Path(row.path).is_file() for row in listed.rows):
        reasons = Counter(row.problem or MISSING for row in listed.rows)
        first = next(row.detail or row.path for row in listed.rows)
        raise InputError(
            f"images: none of {len(listed.rows)} in {listed.source} can be scored: {count_text(reasons)} ({first})"
        )


def images_identity(listed: ImageList) -> str:
    """Return a text with a hash of names, prompts, file sizes and modification times.

    ``latentreward score`` compares it with that of an interrupted run, which continues only with the same inputs.
    """
    rows = (repr((row.name, row.prompt, row.problem, _stat(Path(row.path)))) for row in listed.rows)
    return f"{len(listed.rows)} images, {digest(rows)}"


def listing_identity(listed: ImageList) -> str:
    """Return a text with a hash of names and prompts alone, which is equal for copies on several machines."""
    rows = (repr((row.name, row.prompt, row.problem)) for row in listed.rows)
    return f"{len(listed.rows)} images, {digest(rows)}"


def _stat(path: Path) -> tuple[int, int] | None:
    """Return a file's size in bytes and time of last modification in ns; None if it cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
