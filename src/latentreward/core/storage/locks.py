"""Locks: only one process at a time writes to a folder, or does one part of a run's work."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from latentreward.core.errors import InputError
from latentreward.core.storage.durable import LOCK, write_errors_named

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # error numbers of a file system without locks
logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Hold the write lock of ``folder`` inside the block; the folder is created if it does not exist.

    Processes that only read take no lock. The operating system frees the lock when the process ends, also after a
    kill, which leaves the lock file behind. On a file system without locks, the block runs unlocked, with a warning.

    Raises:
        InputError: If another process holds the lock, or the folder cannot be written to.
    """
    try:
        with write_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _taken(folder / LOCK)
            (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        try:  # the process ID and host that the lock's holder wrote into it
            holder = (folder / LOCK).read_text(errors="replace") or "which has just begun"
        except OSError:
            holder = "unknown"
        problem = f"{setting}: {folder} is being written by another run ({holder})"
        raise InputError(f"{problem}; wait for it, end it, or choose another {setting}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: its file system has no locks (%s); run one process at a time there", folder, error.strerror)
        yield
        return
    try:
        yield
    finally:
        _give_back(lock)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Try to hold the lock file ``path`` inside the block, without waiting; yield False if another process holds it.

    The operating system frees the lock when the process ends, also after a kill. The lock file stays: on NFS, to lock a
    file that another machine has just deleted is an error. On a file system without locks, True is yielded to every
    process, see :func:`has_locks`.
    """
    try:
        lock = _taken(path)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Tell whether a process holds the lock file ``path``; False without the file, or on a file system without locks.

    Any number of processes may ask at once: they share a lock for that moment, so that none takes another's question
    for a holder.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as filelock locks, whose own is exclusive
    except OSError as error:
        if error.errno not in {errno.EWOULDBLOCK, errno.ENOENT, *NO_LOCKS}:
            raise
        return error.errno == errno.EWOULDBLOCK
    return False


def has_locks(folder: Path) -> bool:
    """Tell whether the file system of ``folder`` has locks, by taking one there."""
    try:
        _give_back(_taken(folder / f"{LOCK}.{os.getpid()}.{socket.gethostname()}"))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _taken(path: Path) -> FileLock:
    """Take the lock of a file, which is created; raises Timeout if it is held, OSError with a number in NO_LOCKS."""
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    lock.acquire()
    return lock


def _give_back(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)  # before the release: filelock takes no lock on a deleted file
    lock.release()


def lock_run(trainer: Trainer, held: ExitStack) -> None:
    """Set up a trainer's processes, then lock its run folder on global rank 0 until ``held`` closes.

    It replaces ``trainer.strategy.setup_environment``, because no earlier hook lets the ranks communicate, and
    directly after it Lightning's loggers write to the folder. Nothing is locked if the trainer has no log folder, or
    with ``fast_dev_run``.

    Raises:
        InputError: On global rank 0, if another process holds the lock; the other ranks exit with status 2.
    """
    strategy = trainer.strategy
    type(strategy).setup_environment(strategy)
    folder = trainer.log_dir  # a collective call: every rank has to make it
    if folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]  # fast_dev_run writes nothing
        return
    refusal: str | None = None
    if trainer.is_global_zero:
        try:
            by_logger = "name" if any(log.name for log in trainer.loggers) else "save_dir"
            chosen_by = f"trainer.logger.{by_logger}" if trainer.loggers else "trainer.default_root_dir"
            held.enter_context(locked(Path(folder), chosen_by))
        except InputError as error:
            refusal = str(error)
    refusal = strategy.broadcast(refusal)
    if refusal is not None:
        if trainer.is_global_zero:
            raise InputError(refusal)
        sys.exit(2)
