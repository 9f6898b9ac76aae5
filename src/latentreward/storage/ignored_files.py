"""Files that operating systems and programs write into any folder, and that are no data of the user."""

import glob
from pathlib import Path

IGNORED = frozenset(
    (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", ".ipynb_checkpoints", "$recycle.bin")
)
"""Names in lower case: of macOS, Windows, Synology's file server and Jupyter."""
COMPANION = "._"
"""Start of the names of files that macOS writes beside others on foreign file systems and in archives."""


def is_ignored(path: str) -> bool:
    """Tell whether a part of a path with ``/`` is in ``IGNORED`` or begins as companions do."""
    return any(part.startswith(COMPANION) or part.lower() in IGNORED for part in path.split("/"))


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
