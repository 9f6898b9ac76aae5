"""Digest of texts and buffers, and checksums by which damage of stored files is noticed before they are used."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b, file_digest, sha256
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

from latentreward.core.errors import InputError

THREADS = min(4, os.cpu_count() or 1)
"""Threads that compute checksums; hashlib and zlib let other threads run meanwhile."""
CHUNK = 2**22
"""Bytes read at a time: large, for a thread waits for Python's lock after each, and small enough to stop soon."""

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
    if _checksum(_stoppable_hash, path) != sha256:
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
    be read, or that changes later, is read again by the check. No thread outlives the block.

    Args:
        hashes: Files for :func:`check_hash`.
        records: Arguments of :func:`check_records`.
    """
    stop, pool = Event(), ThreadPoolExecutor(THREADS)
    for path in hashes:
        pool.submit(_checksum, _stoppable_hash, path, None, stop)
    for path, places in records:
        pool.submit(_checksum, _damaged_record, path, places, stop)
    pool.shutdown(wait=False)  # the block may last for days: a thread ends when there is nothing more to compute
    try:
        yield
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_CHECKSUMS: dict[Any, Future[str | None]] = {}
_LOCK = Lock()


def _forget_unfinished() -> None:
    """Leave a forked process the known checksums alone: the threads that compute the others are not forked."""
    for key in [key for key, known in _CHECKSUMS.items() if not known.done()]:
        del _CHECKSUMS[key]
    _LOCK.release()


os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_forget_unfinished)


def _checksum(
    compute: Callable[[Path, Places | None, Event | None], str | None],
    path: Path,
    places: Places | None = None,
    stop: Event | None = None,
) -> str | None:
    """Return the result of ``compute`` for a file as it is now, computed once, whoever asks first.

    Setting ``stop`` raises CancelledError in the thread that computes; another thread that waits for it goes on.
    """
    while True:
        found = path.stat()
        key = compute, path.resolve(), places, found.st_ino, found.st_mtime_ns, found.st_size
        with _LOCK:
            ours = key not in _CHECKSUMS
            known = _CHECKSUMS.setdefault(key, Future())
        if ours:
            try:
                known.set_result(compute(path, places, stop))
            except BaseException as error:  # to those who wait too
                del _CHECKSUMS[key]
                known.set_exception(error)
                raise
        try:
            return known.result()
        except CancelledError:
            _stop_if(stop)


def _stoppable_hash(path: Path, places: Places | None, stop: Event | None) -> str:
    state, buffer = sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            _stop_if(stop)
    return state.hexdigest()


def _stop_if(stop: Event | None) -> None:
    if stop is not None and stop.is_set():
        raise CancelledError


def _damaged_record(path: Path, places: Places | None, stop: Event | None) -> str | None:
    if places is None:
        return _first_damaged(partial(path.open, "rb"), stop)
    with path.open("rb") as file:
        for offset, length in places:
            file.seek(offset)
            part = partial(io.BytesIO, file.read(length))
            if name := _first_damaged(part, stop) if zipfile.is_zipfile(part()) else f"the part at byte {offset}":
                return name
    return None


def _first_damaged(opened: Callable[[], IO[bytes]], stop: Event | None) -> str | None:
    """Return the first record of a zip file that does not fit its checksum; None for a file of another format."""
    with opened() as file:
        if not zipfile.is_zipfile(file):
            return None
    try:
        with opened() as file, zipfile.ZipFile(file) as records:
            names = records.namelist()
        threads = THREADS if stop is None else 1  # beside other work, which needs the other cores
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(partial(_damaged, opened, stop), [names[place::threads] for place in range(threads)])
            damaged = {name for part in parts for name in part}
        return next((name for name in names if name in damaged), None)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"a record ({error})"


def _damaged(opened: Callable[[], IO[bytes]], stop: Event | None, names: Iterable[str]) -> list[str]:
    """Return those of the records that do not fit; each thread opens the file, since a ZipFile is not for several."""
    damaged = []
    with opened() as file, zipfile.ZipFile(file) as records:
        for name in names:
            try:
                with records.open(name) as record:
                    while record.read(CHUNK):  # at its end the checksum is compared
                        _stop_if(stop)
            except zipfile.BadZipFile:
                damaged.append(name)
    return damaged
