"""Locks, and atomic writes: a file or folder appears under its name when complete, also after a kill or power loss."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING
from uuid import uuid4

from latentreward.core.errors import InputError
from latentreward.core.interrupts import interrupts_held

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

# Error numbers: of a full disk, an exhausted quota and a file over the size limit; of a path where writing is not
# allowed or not possible; of a rename whose target another process replaced at the same time; of a system without an
# atomic exchange of two names; and of a file system without locks.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}
MEANWHILE = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
ERROR_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
"""Error number of the operating system, quoted in the message of another error, such as one from safetensors."""
# When other ranks fail to write a sharded checkpoint, only this text reaches the current rank, without a number.
TORCH_STOPPED = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+")
TEMPORARY_NAME = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.(partial|old)")
"""Pattern of the names from :func:`temporary_name`, with groups for target, host, process ID and suffix."""
LOCK = ".lock"  # name of the lock file in a folder that only one process may write to at a time
KEPT = "what was there before is kept: free some space and run it again"
"""Default end of the error message on a full disk."""


@contextmanager
def replacing(target: Path, kept: str = KEPT, over: bool = True) -> Iterator[Path]:
    """Yield a temporary path, and rename the file or folder written there to ``target`` if the block raises no error.

    The parent folder of ``target`` is created if it does not exist. After an error, the temporary path is removed.

    Args:
        target: File or folder to create.
        kept: End of the error message on a full disk: what is still safe, and how to continue.
        over: Whether to replace an existing ``target``. If False, an existing non-empty folder stays, without an error.
    """
    partial = temporary_name(target.absolute())  # pyarrow takes a:b for an address
    try:
        with write_errors_named(target, kept):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            put_in_place(partial, target, over)
    finally:
        discard(partial)


def write_file(target: Path, content: str | bytes, kept: str = KEPT) -> None:
    """Write a small file atomically, see :func:`replacing`; lone surrogates in a text become question marks."""
    with replacing(target, kept) as partial:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def remove_temporary(folder: Path) -> None:
    """Delete unfinished files and folders of killed processes; those of a process that runs on this machine stay."""
    for path in [*folder.rglob("*")]:
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and not (match[2] == _this_host() and _runs(int(match[3]))):
            discard(path)


def check_writable(target: Path) -> None:
    """Raise InputError if nothing can be written at ``target``, before the work whose result it gets."""
    with write_errors_named(target):  # an unnamed file, in the nearest folder that exists
        TemporaryFile(dir=next(folder for folder in target.absolute().parents if folder.exists())).close()


def refuse_link(path: Path) -> None:
    """Raise InputError for a link at a place of an output's own, behind which would be written or deleted."""
    if path.is_symlink():
        raise InputError(f"output: {path} is a link; delete it, or choose another output")


@contextmanager
def write_errors_named(path: Path, kept: str = KEPT) -> Iterator[None]:
    """Turn errors from a full disk or a path that cannot be written to into an InputError that names ``path``."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # the CheckpointException of a sharded save is not an Exception
        if reason := disk_full(error):
            raise InputError(f"no space left for {path} ({reason}); {kept}") from error
        if isinstance(error, OSError) and error.errno in REFUSED:
            reason = os.strerror(error.errno)
            raise InputError(f"{path} cannot be written to ({reason}); allow it, or choose another place") from error
        raise


def disk_full(error: BaseException) -> str | None:
    """Return the reason why a file cannot grow, if ``error`` or an error in its cause chain says so; else None."""
    behind: BaseException | None = error
    while behind is not None:  # torch.save wraps the OSError in its own error
        quoted = ERROR_NUMBER.search(str(behind))
        number = getattr(behind, "errno", None) or (quoted and int(quoted[1] or quoted[2]))
        if number in FULL:
            return os.strerror(number)
        behind = behind.__cause__ or behind.__context__
    return "PyTorch could not write all of it" if TORCH_STOPPED.search(str(error)) else None


def contents(folder: Path) -> list[str]:
    """List the sorted names in a folder, without its lock file and unfinished files of killed processes."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != LOCK and not TEMPORARY_NAME.fullmatch(name))


@interrupts_held()
def put_in_place(partial: Path, target: Path, over: bool = True) -> None:
    """Sync a complete file or folder to disk, then rename ``partial`` to ``target``, over what is there if ``over``.

    A symbolic link is replaced itself, not the file behind it. If several processes write the same target, the result
    of the last one remains, complete. What killed processes of this machine left for ``target`` is removed.

    A kill leaves either the old or the new target. Only where a folder takes the place of something and
    :func:`exchange` is not available, a kill may leave neither under its name, but both beside it.
    """
    sync_files(partial, target)
    if over:
        while not _swapped(partial, target):
            pass
    else:
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    sync(target.parent)
    for path in target.parent.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and match[1] == target.name and match[2] == _this_host() and not _runs(int(match[3])):
            discard(path)


def sync_files(path: Path, target: Path) -> None:
    """Set the umask's default mode on a file, or on all files in a folder, and sync them to disk.

    safetensors makes its files readable by their owner alone. A kill may leave an empty file, which
    :func:`put_in_place` removes by the name of ``target``.
    """
    sample = temporary_name(target)
    sample.touch()
    mode = sample.stat().st_mode
    sample.unlink()
    for part in (*path.rglob("*"), path):
        if part.is_file() and part.stat().st_mode != mode:
            part.chmod(mode)
        sync(part)


def _swapped(partial: Path, target: Path) -> bool:
    """Rename ``partial`` to ``target``; return False if another process replaced ``target`` at the same time."""
    old = temporary_name(target, "old")
    try:
        if os.path.lexists(target) and (target.is_dir() or partial.is_dir()) and exchange(partial, target):
            discard(partial)
            return True
        if target.is_dir():
            target.rename(old)
        elif partial.is_dir():
            target.unlink(missing_ok=True)
        partial.replace(target)
    except OSError as error:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        discard(old)
        if error.errno not in MEANWHILE or not partial.exists():
            raise
        return False
    discard(old)
    return True


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one atomic step; return False if that is not possible here.

    Linux with glibc 2.28 or later can do it on most local file systems, but not, for example, on NFS.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, rename_exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's headers
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def temporary_name(target: Path, suffix: str = "partial") -> Path:
    """Return a hidden, unique path beside ``target``: ``.NAME.HOST-PROCESS-RANDOM.SUFFIX``."""
    return target.with_name(f".{target.name}.{_this_host()}-{os.getpid()}-{uuid4().hex[:8]}.{suffix}")


def _this_host() -> str:
    """Return a short hash of this machine's name; process IDs are unique on one machine only."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _runs(process: int) -> bool:
    """Tell whether a process with this ID is running on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may belong to another user
    return True


def discard(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk (``fsync``)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Hold the write lock of ``folder`` inside the block; the folder is created if it does not exist.

    Processes that only read take no lock. The operating system frees the lock when the process ends, also after a
    kill, which leaves the lock file behind. On a file system without locks, the block runs unlocked, with a warning.
    """
    from filelock import FileLock  # not for `--help`

    path = folder / LOCK
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        with write_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except TimeoutError as error:
        holder = ""
        with suppress(OSError):
            holder = path.read_text(errors="replace")
        problem = f"{setting}: {folder} is being written by another run ({holder or 'which has just begun'})"
        raise InputError(f"{problem}; wait for it, end it, or choose another {setting}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: its file system has no locks (%s); run one process at a time there", folder, error.strerror)
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # before the release: filelock takes no lock on a deleted file
            lock.release()


def lock_run(trainer: Trainer, held: ExitStack) -> None:
    """Set up a trainer's processes, then lock its run folder on global rank 0 until ``held`` closes.

    It replaces ``trainer.strategy.setup_environment``: no earlier hook lets the ranks communicate, and directly after
    it Lightning's loggers write to the folder. If another process holds the lock, the other ranks exit with status 2.
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
