"""Digest of texts and buffers, and checksums by which damage of stored files is noticed before they are used."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from hashlib import blake2b, file_digest
from pathlib import Path
from threading import Lock
from typing import IO, Any

from latentreward.errors import InputError

THREADS = min(4, os.cpu_count() or 1)
"""Threads that compute checksums; hashlib and zlib let other threads run meanwhile."""


def digest(parts: Iterable[Any], size: int = 16) -> str:
    """Compute the BLAKE2b digest of the concatenated ``parts``, as ``2 * size`` hexadecimal digits.

    Args:
        parts: Texts, encoded as UTF-8 with question marks for lone surrogates; or buffers, such as bytes and arrays.
        size: Bytes of the digest.
    """
    state = blake2b(digest_size=size)
    for part in parts:
        state.update(part.encode("utf-8", "replace") if isinstance(part, str) else part)
    return state.hexdigest()


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def check_hash(path: Path, sha256: str | None, remedy: str) -> Path:
    """Compare a file with its recorded SHA-256, and return its path; None, of a file without a record, fits no file.

    A file that does not change is read once per process.

    Raises:
        InputError: If the file was changed or damaged.
    """
    if _hash_of(path, *_state(path)) != sha256:
        raise InputError(f"{path} is damaged: its SHA-256 is not the one recorded when it was written; {remedy}")
    return path


@contextmanager
def hashed_meanwhile(paths: Iterable[Path]) -> Iterator[None]:
    """Compute the SHA-256 of files in threads while the block runs; :func:`check_hash` waits for that of its file.

    Loading a model builds its networks first, which takes longer than the checksums of its files.
    """
    pool = ThreadPoolExecutor(THREADS)
    try:
        for path in paths:
            if path.is_file():
                pool.submit(_hash_of, path, *_state(path))
        yield
    finally:
        pool.shutdown(cancel_futures=True)


def check_records(path: Path, places: Iterable[tuple[int, int]] | None = None) -> None:
    """Compare the records that ``torch.save`` wrote with their checksums, which ``torch.load`` ignores.

    A file that does not change is read once per process.

    Args:
        path: File of ``torch.save``; one without checksums, of the format before PyTorch 1.6, is accepted.
        places: Offset and bytes of each part, for a file of several; None for a file that is one.

    Raises:
        ValueError: If a record is damaged.
    """
    if name := _damaged_record(path, None if places is None else tuple(sorted(places)), *_state(path)):
        raise ValueError(f"{name} in {path.name} does not fit its checksum")


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@cache
def _lock_of(path: Path) -> Lock:
    return Lock()


def _hash_of(path: Path, modified: int, size: int) -> str:
    with _lock_of(path):  # whoever comes second finds the hash in the cache
        return _hash_once(path, modified, size)


@cache
def _hash_once(path: Path, modified: int, size: int) -> str:
    return file_hash(path)


@cache
def _damaged_record(path: Path, places: tuple[tuple[int, int], ...] | None, modified: int, size: int) -> str | None:
    if places is None:
        return _first_damaged(partial(path.open, "rb"))
    with path.open("rb") as file:
        for offset, length in places:
            file.seek(offset)
            part = partial(io.BytesIO, file.read(length))
            if name := _first_damaged(part) if zipfile.is_zipfile(part()) else f"the part at byte {offset}":
                return name
    return None


def _first_damaged(opened: Callable[[], IO[bytes]]) -> str | None:
    """Return the first record of a zip file that does not fit its checksum; None for a file of another format."""
    with opened() as file:
        if not zipfile.is_zipfile(file):
            return None
    try:
        with opened() as file, zipfile.ZipFile(file) as records:
            names = records.namelist()
        with ThreadPoolExecutor(THREADS) as pool:
            parts = pool.map(partial(_damaged, opened), [names[place::THREADS] for place in range(THREADS)])
            damaged = {name for part in parts for name in part}
        return next((name for name in names if name in damaged), None)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"a record ({error})"


def _damaged(opened: Callable[[], IO[bytes]], names: Iterable[str]) -> list[str]:
    """Return those of the records that do not fit; each thread opens the file, since a ZipFile is not for several."""
    damaged = []
    with opened() as file, zipfile.ZipFile(file) as records:
        for name in names:
            try:
                with records.open(name) as record:
                    while record.read(2**20):  # at its end the checksum is compared
                        pass
            except zipfile.BadZipFile:
                damaged.append(name)
    return damaged
