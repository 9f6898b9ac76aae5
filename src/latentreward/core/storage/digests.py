"""Digest of texts and buffers, and checksums by which damage of stored files is noticed before they are used."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from hashlib import blake2b, file_digest
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, Any

from latentreward.core.errors import InputError

THREADS = min(4, os.cpu_count() or 1)
"""Threads that compute checksums; hashlib and zlib let other threads run meanwhile."""
Places = tuple[tuple[int, int], ...]  # offset and bytes of each part of a file


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
    if _checksum(_file_hash, path) != sha256:
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
    if name := _checksum(_damaged_record, path, places):
        raise ValueError(f"{name} in {path.name} does not fit its checksum")


@contextmanager
def checking_meanwhile(
    hashes: Iterable[Path] = (), records: Iterable[tuple[Path, Places | None]] = ()
) -> Iterator[None]:
    """Compute checksums in threads while the block runs; :func:`check_hash` and :func:`check_records` wait for theirs.

    Loading a model builds its networks first, which takes longer than the checksums of its files. A file that cannot
    be read, or that changes later, is read again by the check. What has not begun when the block ends is left out.

    Args:
        hashes: Files for :func:`check_hash`.
        records: Arguments of :func:`check_records`.
    """
    waiting: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
    for job in (*((_file_hash, path) for path in hashes), *((_damaged_record, *one) for one in records)):
        waiting.put(job)

    def work() -> None:
        with suppress(Empty):
            while True:
                job = waiting.get_nowait()
                with suppress(Exception):  # which the check raises again
                    _checksum(*job)

    for _ in range(min(THREADS, waiting.qsize())):
        Thread(target=work, daemon=True).start()  # a command that is refused ends without them
    try:
        yield
    finally:
        with suppress(Empty):
            while True:
                waiting.get_nowait()


_CHECKSUMS: dict[Any, Future[str | None]] = {}
_LOCK = Lock()


def _forget_unfinished() -> None:
    """Leave a forked process the known checksums alone: the threads that compute the others are not forked."""
    for key in [key for key, known in _CHECKSUMS.items() if not known.done()]:
        del _CHECKSUMS[key]
    _LOCK.release()


os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_forget_unfinished)


def _checksum(compute: Callable[..., str | None], path: Path, places: Places | None = None) -> str | None:
    """Return the result of ``compute`` for a file as it is now, computed once, whoever asks first."""
    found = path.stat()
    key = compute, path.resolve(), places, found.st_ino, found.st_mtime_ns, found.st_size
    with _LOCK:
        ours = key not in _CHECKSUMS
        known = _CHECKSUMS.setdefault(key, Future())
    if ours:
        try:
            known.set_result(compute(path, places))
        except BaseException as error:  # to those who wait too
            del _CHECKSUMS[key]
            known.set_exception(error)
    return known.result()


def _file_hash(path: Path, _: Places | None) -> str:
    return file_hash(path)


def _damaged_record(path: Path, places: Places | None) -> str | None:
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
            return records.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"a record ({error})"
