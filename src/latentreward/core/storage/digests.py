"""Digest of texts and buffers, and checksums by which damage of stored files is noticed before they are used."""

import io
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO, Any

from latentreward.core.errors import InputError

Places = tuple[tuple[int, int], ...]  # offset and bytes of each part of a file


def digest(parts: Iterable[Any], size: int = 16) -> str:
    """Compute the BLAKE2b digest of the concatenated ``parts``, as ``2 * size`` hexadecimal digits.

    Parts are texts, encoded as UTF-8 with question marks for lone surrogates; or buffers, such as bytes and arrays.
    """
    state = blake2b(digest_size=size)
    for part in parts:
        state.update(part.encode("utf-8", "replace") if isinstance(part, str) else part)
    return state.hexdigest()


def size_and_time(path: Path) -> tuple[int, int] | None:
    """Return a file's size in bytes and time of last modification in ns; None if it cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def check_hash(path: Path, sha256: str | None, remedy: str) -> Path:
    """Compare a file with its recorded SHA-256, and return its path; None, of a file without a record, fits no file.

    A file that does not change is read once per process.
    """
    if _known_hash(*_as_it_is(path)) != sha256:
        raise InputError(f"{path} is damaged: its SHA-256 is not the one recorded when it was written; {remedy}")
    return path


def check_records(path: Path, places: Places | None = None) -> None:
    """Compare the records that ``torch.save`` wrote with their checksums, which ``torch.load`` ignores.

    A file that does not change is read once per process.

    Args:
        path: File of ``torch.save``; one without checksums, of the format before PyTorch 1.6, is accepted.
        places: Offset and bytes of each part, for a file of several; None for a file that is one.

    Raises:
        ValueError: If a record is damaged.
    """
    if name := _damaged_record(*_as_it_is(path), places):
        raise ValueError(f"{name} in {path.name} does not fit its checksum")


def _as_it_is(path: Path) -> tuple[Path, tuple[int, int, int]]:
    """Return a file's path and what tells its present content from another: the key of what is known of it."""
    found = path.stat()
    return path.resolve(), (found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=512)
def _known_hash(path: Path, _: tuple[int, int, int]) -> str:
    return file_hash(path)


@lru_cache(maxsize=512)
def _damaged_record(path: Path, _: tuple[int, int, int], places: Places | None) -> str | None:
    with path.open("rb") as file:
        if places is None:
            return _first_damaged(file)
        for offset, length in places:
            file.seek(offset)
            part = io.BytesIO(file.read(length))
            if name := _first_damaged(part) if zipfile.is_zipfile(part) else f"the part at byte {offset}":
                return name
    return None


def _first_damaged(file: IO[bytes]) -> str | None:
    """Return the first record of a zip file that does not fit its checksum; None for a file of another format."""
    if not zipfile.is_zipfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as records:
            # torch.save compresses nothing, and torch.load maps compressed bytes as if they were a tensor's.
            packed = (one.filename for one in records.infolist() if one.compress_type != zipfile.ZIP_STORED)
            return next(packed, None) or records.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"a record ({error})"
