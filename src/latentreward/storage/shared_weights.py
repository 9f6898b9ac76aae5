"""Converted weights in one file that all processes of a machine map, so that the machine holds them once.

Processes that have no way yet to talk to each other agree by the file's name, a hash of what it holds, and by a lock.
"""

from __future__ import annotations

import atexit
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from latentreward.storage.digests import digest
from latentreward.storage.durable import disk_full
from latentreward.storage.weight_files import ALIGNMENT, StoredTensor

logger = logging.getLogger(__name__)

LEFT_OVER_S = 3600.0
"""Age in seconds from which a file counts as left by a killed process; a file is needed while a run's ranks load."""
_processes: ContextVar[int] = ContextVar("processes", default=1)
_mapped: set[Path] = set()
"""Files that this process has mapped and not yet released."""


@contextmanager
def sharing_between(processes: int) -> Iterator[None]:
    """State, inside the block, how many processes of this machine load the same weights."""
    token = _processes.set(processes)
    try:
        yield
    finally:
        _processes.reset(token)


def processes_here() -> int:
    """Return the number of processes of this machine that load the same weights."""
    return max(_processes.get(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1))  # set by torchrun


def shared(wanted: Sequence[tuple[StoredTensor, torch.dtype]]) -> list[Tensor] | None:
    """Convert stored tensors once per machine, and map them.

    The first process to come writes the file, to the folder for temporary files, and the others wait for it.
    :func:`release_shared` removes the file, at the latest at the end of the process; what is mapped stays.

    Args:
        wanted: Tensors, each with the type that it needs.

    Returns:
        The converted tensors; None if the disk has no room for them.
    """
    offsets, size = [], 0
    for place, dtype in wanted:
        offsets.append(size)
        size += -(-place.shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    stats = {place.path: place.path.stat() for place, _ in wanted}
    files = (f"{path} {found.st_ino} {found.st_size} {found.st_mtime_ns}" for path, found in stats.items())
    key = digest([*files, *(f"{place.path} {place.offset} {tuple(place.shape)} {dtype}" for place, dtype in wanted)])
    path = own_folder() / key
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            _remove_left_over(path.parent)
            partial = path.with_suffix(".partial")
            try:
                _write(partial, wanted, offsets, size)
            except OSError as error:
                partial.unlink(missing_ok=True)
                if not (reason := disk_full(error)):
                    raise
                logger.warning("%s: %s; each process holds %.1f GB of its own instead", path, reason, size / 1e9)
                return None
            partial.rename(path)
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    atexit.unregister(release_shared)
    atexit.register(release_shared, remove=True)  # for programs without a trainer, and for runs that fail before it
    _mapped.add(path)
    values = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    return [
        values[offset : offset + place.shape.numel() * dtype.itemsize].view(dtype).view(place.shape)
        for offset, (place, dtype) in zip(offsets, wanted, strict=True)
    ]


def _write(path: Path, wanted: Sequence[tuple[StoredTensor, torch.dtype]], offsets: Sequence[int], size: int) -> None:
    with path.open("wb") as file:
        for offset, (place, dtype) in zip(offsets, wanted, strict=True):
            file.seek(offset)
            file.write(memoryview(place.read().to(dtype).view(-1).view(torch.uint8).numpy()))
        file.truncate(size)


def own_folder() -> Path:
    """Return the folder for shared files, which no other user of the machine can write to.

    Raises:
        PermissionError: If the folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"latentreward-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by others; remove it, or set TMPDIR to another folder")
    return folder


def release_shared(remove: bool) -> None:
    """Forget the shared files of this process, once all processes of the machine have mapped them.

    Args:
        remove: Whether to remove the files; one process of the machine should.
    """
    while _mapped:
        path = _mapped.pop()
        if remove:
            lock = path.with_suffix(".lock")
            with FileLock(lock):  # another run may be writing the same file
                path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)  # before the release: filelock takes no lock on a deleted file


def _remove_left_over(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            if path.suffix != ".lock" and time.time() - path.stat().st_mtime > LEFT_OVER_S:
                path.unlink()
        except FileNotFoundError:  # another process has removed it
            continue
