"""Files and folders that stand under their name whole or not at all, also after a kill or a loss of power."""

import errno
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from latentreward.errors import InputError
from latentreward.interrupts import interrupts_held

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}
MEANWHILE = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
"""Error numbers of a rename where another process renamed in between."""
ERROR_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
"""The system's error number in the message of another error, such as safetensors'."""
TORCH_STOPPED = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+")
"""What torch.save says of a write that failed; of a sharded checkpoint's other processes no more is known."""
TEMPORARY_NAME = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.(partial|old)")
"""Name by :func:`temporary_name`: target, host, process."""
LOCK = ".lock"
"""File in a folder by which one process at a time writes there."""
KEPT = "what was there before is kept: free some space and run it again"


@contextmanager
def replacing(target: Path, kept: str = KEPT, over: bool = True) -> Iterator[Path]:
    """Yield a path for a new file or folder, which takes the place of ``target`` if the block ends without an error.

    The folder of ``target`` is made if need be; after an error nothing is left of what the block wrote.

    Args:
        target: File or folder.
        kept: What an error on a full disk says after the file's name: what is safe, and how to go on.
        over: Whether what is there gives way; otherwise a folder that is there and not empty stays.

    Raises:
        InputError: If the disk is full, a limit on file sizes or a quota is reached, or writing is not allowed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(target)
    try:
        with write_errors_named(target, kept):
            yield partial
            put_in_place(partial, target, over)
    finally:
        discard(partial)


def write_file(target: Path, content: str | bytes, kept: str = KEPT) -> None:
    """Write a whole small file, see :func:`replacing`; lone surrogates of a text become question marks."""
    with replacing(target, kept) as partial:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


@contextmanager
def write_errors_named(path: Path, kept: str = KEPT) -> Iterator[None]:
    """Turn a full disk and a place that cannot be written to into one line that names ``path``.

    Raises:
        InputError: In place of such an error; other errors pass.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # as that of a sharded checkpoint is
        if reason := disk_full(error):
            raise InputError(f"no space left for {path} ({reason}); {kept}") from error
        if isinstance(error, OSError) and error.errno in REFUSED:
            reason = os.strerror(error.errno)
            raise InputError(f"{path} cannot be written to ({reason}); allow it, or choose another place") from error
        raise


def disk_full(error: BaseException) -> str | None:
    """Why a file cannot grow, if ``error`` or one behind it says so; None otherwise."""
    behind: BaseException | None = error
    while behind is not None:  # torch.save raises its own error over the OSError
        quoted = ERROR_NUMBER.search(str(behind))
        number = getattr(behind, "errno", None) or (quoted and int(quoted[1] or quoted[2]))
        if number in FULL:
            return os.strerror(number)
        behind = behind.__cause__ or behind.__context__
    return "PyTorch could not write all of it" if TORCH_STOPPED.search(str(error)) else None


def contents(folder: Path) -> list[str]:
    """Sorted names in a folder, without its lock and what a killed process left half written."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != LOCK and not TEMPORARY_NAME.fullmatch(name))


@interrupts_held()
def put_in_place(partial: Path, target: Path, over: bool = True) -> None:
    """Rename a complete file or folder to ``target`` once the disk has it; an older one gives way, if ``over``.

    A link is replaced, not what it leads to. Where several processes write one target, the last one's stays whole.
    What a killed process left of writing ``target`` is removed.
    """
    settle(partial)
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


def settle(path: Path) -> None:
    """Give a file, or the files in a folder, the mode that new files get here, and wait until the disk has them.

    safetensors makes its files readable by their owner alone, whatever the umask is.
    """
    sample = temporary_name(path)
    sample.touch()
    mode = sample.stat().st_mode
    sample.unlink()
    for part in (*path.rglob("*"), path):
        if part.is_file() and part.stat().st_mode != mode:
            part.chmod(mode)
        sync(part)


def _swapped(partial: Path, target: Path) -> bool:
    """Rename ``partial`` to ``target``; False if another process put its own there in between."""
    old = temporary_name(target, "old")
    try:
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


def temporary_name(target: Path, suffix: str = "partial") -> Path:
    """A hidden name beside ``target`` that no other process uses: ``.NAME.HOST-PROCESS-RANDOM.SUFFIX``."""
    return target.with_name(f".{target.name}.{_this_host()}-{os.getpid()}-{uuid4().hex[:8]}.{suffix}")


def _this_host() -> str:
    """Short mark of this machine: processes are numbered on each."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _runs(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def discard(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
