"""Hidden files, and files that operating systems write into any folder: they are no data of the user."""

import glob
from pathlib import Path

IGNORED = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"))
"""Names in lower case: of macOS, Windows and Synology's file server."""


def is_ignored(path: str) -> bool:
    """Tell whether a part of a path with ``/`` is in ``IGNORED`` or hidden, as ``.git`` and macOS's ``._1.png`` are."""
    parts = (part for part in path.split("/") if part not in (".", ".."))
    return any(part.startswith(".") or part.lower() in IGNORED for part in parts)


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Return the paths below a folder that match a pattern, without ignored ones, in the order of their names."""
    return sorted(path for path in folder.glob(pattern) if not is_ignored(path.relative_to(folder).as_posix()))


def match_files(pattern: str) -> list[Path]:
    """Return the paths that a pattern (``**`` is any subfolders) matches, without ignored ones, in order.

    Parts of the pattern itself are not ignored.
    """
    named = {*Path(pattern).parts}
    found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
    return sorted(path for path in found if not any(is_ignored(part) for part in path.parts if part not in named))
