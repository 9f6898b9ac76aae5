"""Files of a user's folders: which of them count, and which file a text or a link may name.

``docs/data.md`` tells the rules. Whatever lists files uses :func:`find_files`. Whatever opens a file that a row names
uses :func:`~latentreward.data.images.file_image`, which is made of the functions below.
"""

import glob
import os
import unicodedata
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import takewhile
from pathlib import Path, PurePosixPath

from latentreward.core.errors import InputError

IGNORED = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"))
"""Names in lower case: of macOS, Windows and Synology's file server."""
POINTER = b"version https://git-lfs"
"""First bytes of a git-lfs pointer, which stands in place of a large file that was not downloaded."""
IS_POINTER, PULL = "a git-lfs pointer, not the file", "run `git lfs pull` there, or download it again"
MOST_LINKS = 10_000
"""Largest number of links to folders that are followed below a folder; a few that lead to each other have no end."""
resolve_once = lru_cache(Path.resolve)


def is_ignored(path: str) -> bool:
    """Tell whether a part of a path with ``/`` is in ``IGNORED`` or hidden, as ``.git`` and macOS's ``._1.png`` are."""
    parts = (part for part in path.split("/") if part not in (".", ".."))
    return any(part.startswith(".") or part.lower() in IGNORED for part in parts)


def find_files(folder: Path, pattern: str, unread: list[str] | None = None) -> list[Path]:
    """Return the paths below a folder that match a pattern, in order, without ignored ones that it does not name.

    ``**`` is any subfolders. Links to folders are followed, but for those that lead to a folder above them. A message
    about each folder that cannot be read is added to ``unread``.
    """
    places, parts = [folder], PurePosixPath(pattern).parts
    for part in (*parts, "*") if parts[-1:] == ("**",) else parts:
        if part == "**":
            places = [below for place in places for below in _folders(place)]
        elif glob.has_magic(part):
            found = (path for place in places for path in _entries(place, [] if unread is None else unread))
            places = [path for path in found if fnmatchcase(path.name, part) and not is_ignored(path.name)]
        else:
            places = [place / part for place in places if os.path.lexists(place / part)]
    return sorted({*places})


def split_pattern(pattern: str) -> tuple[Path, str]:
    """Split a pattern into the folder that it begins with, whose name may have brackets, and the rest."""
    parts = Path(pattern).parts
    begins = (Path(*parts[:number]) for number in range(1, len(parts)))
    fixed = sum(1 for _ in takewhile(lambda place: not glob.has_magic(place.name) or os.path.lexists(place), begins))
    return Path(*parts[:fixed]), "/".join(parts[fixed:])


def _entries(folder: Path, unread: list[str]) -> list[Path]:
    try:
        return [*folder.iterdir()]
    except (NotADirectoryError, FileNotFoundError):
        return []
    except OSError as error:
        unread.append(f"{folder}: {error.strerror}")
        return []


def _folders(top: Path) -> Iterator[Path]:
    links = 0
    for place, names, _ in os.walk(top, followlinks=True):
        linked = {name for name in names if Path(place, name).is_symlink()}
        back = {name for name in linked if _leads_back(Path(place, name))}
        names[:] = [name for name in names if not is_ignored(name) and name not in back]
        links += len(linked - back)
        if links > MOST_LINKS:
            raise InputError(f"{top} has over {MOST_LINKS} links to folders, which may lead to each other; remove some")
        yield Path(place)


def _leads_back(folder: Path) -> bool:
    """Tell whether a link leads to a folder above it, in which it would be found again without end."""
    target = os.path.realpath(folder)
    return any(Path(os.path.realpath(above)).is_relative_to(target) for above in folder.absolute().parents)


def one_form(text: str) -> str:
    """Return a name in the Unicode form NFC: macOS writes an accent as a character of its own, other systems do not."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def find_file(path: Path) -> Path:
    """Return a path; where nothing has its name, that of the entry whose name differs only in its Unicode form."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not os.path.lexists(found / part):
            try:
                part = _by_form(found, found.stat().st_mtime_ns).get(one_form(part), part)  # noqa: PLW2901
            except (OSError, ValueError):
                return path
        found /= part
    return found


@lru_cache(maxsize=16)
def _by_form(folder: Path, changed: int) -> dict[str, str]:
    return {one_form(path.name): path.name for path in folder.iterdir() if not path.name.isascii()}


def resolve_inside(root: Path, path: Path) -> Path | None:
    """Return the real path of ``path`` with symbolic links followed, or None if it lies outside ``root``.

    The files of a snapshot in the hub's cache are links to the folder ``blobs`` of the same repository, which counts as
    inside.
    """
    try:
        resolved = path.resolve()
        # The root is resolved once for all its images; one that is moved meanwhile is resolved anew.
        inside = _holds(resolve_once(root), resolved) or _holds(root.resolve(), resolved)
        return resolved if inside else None
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that is too long or has a null byte
        return None


def _holds(root: Path, file: Path) -> bool:
    snapshots = (place.parent for place in (root, *root.parents) if place.parent.name == "snapshots")
    return file.is_relative_to(root) or any(file.parent == one.parent / "blobs" for one in snapshots)


def relative_path(path: str, folder: Path) -> str:
    """Return an absolute path inside ``folder``, if need be by links, as one relative to it; other paths unchanged."""
    if not path.startswith("/") or "\0" in path:
        return path
    for follow in (os.path.normpath, os.path.realpath):
        found = PurePosixPath(follow(path))
        for follow_root in (os.path.normpath, os.path.realpath):
            root = follow_root(folder.absolute())
            if found.is_relative_to(root):
                return str(found.relative_to(root))
    return path


def escapes(path: str) -> bool:
    """Tell whether a path is absolute or leads out of its folder by ``..``; links are not followed."""
    return path.startswith("/") or (".." in path and Path(os.path.normpath(path)).parts[:1] == ("..",))


def whole_file(file: Path) -> Path:
    """Return a file's absolute path, since pyarrow takes ``a:b`` for an address; InputError for a git-lfs pointer."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise InputError(f"{file} is {IS_POINTER}; {PULL}")
    return file.absolute()
