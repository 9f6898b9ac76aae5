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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import LOCK, disk_full
from latentreward.core.storage.weight_files import ALIGNMENT, StoredTensor

logger = logging.getLogger(__name__)

ABANDONED_S = 3600.0
"""Seconds after which a file is taken for one that a killed process left; a run needs it while its ranks load."""
_processes: ContextVar[int] = ContextVar("processes", default=1)
_mapped: set[Path] = set()  # files that this process has mapped and not yet released


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
    :func:`release_shared` removes the file; what is mapped stays. The result is None if the disk has no room.
    """
    offsets, size = [], 0
    for place, dtype in wanted:
        offsets.append(size)
        size += -(-place.shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    stats = {place.path: place.path.stat() for place, _ in wanted}
    files = (  # the time of change too: a tool that writes a file in place may set its time of modification back
        f"{path} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        for path, found in stats.items()
    )
    key = digest([*files, *(f"{place.path} {place.offset} {tuple(place.shape)} {dtype}" for place, dtype in wanted)])
    path = own_folder() / key
    try:
        with FileLock(path.with_suffix(LOCK)):
            found = path.stat() if path.is_file() else None
            booted = time.time() - time.monotonic()  # after a power cut a renamed file may lack its contents
            if found is None or found.st_size != size or found.st_mtime <= booted:
                for other in path.parent.iterdir():  # killed processes leave files; training removes all others
                    with suppress(FileNotFoundError):  # another process removed it
                        if other.stat().st_mtime < time.time() - ABANDONED_S:
                            other.unlink()
                _write(path, wanted, offsets, size)
            storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    except OSError as error:
        if not (reason := disk_full(error)):
            raise
        logger.warning("%s: %s; each process holds %.1f GB of its own instead", path, reason, size / 1e9)
        return None
    atexit.unregister(release_shared)
    atexit.register(release_shared, remove=True)  # for programs without a trainer, and for runs that fail before it
    _mapped.add(path)
    values = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    return [
        values[offset : offset + place.shape.numel() * dtype.itemsize].view(dtype).view(place.shape)
        for offset, (place, dtype) in zip(offsets, wanted, strict=True)
    ]


def _write(path: Path, wanted: Sequence[tuple[StoredTensor, torch.dtype]], offsets: Sequence[int], size: int) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            for offset, (place, dtype) in zip(offsets, wanted, strict=True):
                file.seek(offset)
                file.write(memoryview(place.read().to(dtype).view(-1).view(torch.uint8).numpy()))
            file.truncate(size)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def own_folder() -> Path:
    """Return the folder for shared files; raises PermissionError if another user of the machine can write to it."""
    folder = Path(tempfile.gettempdir()) / f"latentreward-{os.getuid()}"
    with suppress(FileExistsError):  # of a file or a broken link, which is refused below
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by others; remove it, or set TMPDIR to another folder")
    return folder


def release_shared(remove: bool) -> None:
    """Forget the shared files of this process, once all of the machine have mapped them; one process removes them."""
    while _mapped:
        path = _mapped.pop()
        if remove:
            with FileLock(lock := path.with_suffix(LOCK)):  # another run of the same models may be writing the file
                path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)  # before the release: filelock takes no lock on a deleted file
