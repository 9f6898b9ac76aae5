"""Writing that survives a power cut: a file is either whole and under its name, or it is not there."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from latentreward.cache.layout import LOCK, TEMPORARY
from latentreward.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
"""Names of the types in a safetensors header."""


@contextmanager
def disk_problems_named(folder: Path) -> Iterator[None]:
    """Turn a full disk and a folder that cannot be written to into one line each.

    Raises:
        InputError: In place of such an OSError; other ones pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise InputError(
                f"no space left for {folder} ({error.strerror}); finished shards are kept: free some space and resume "
                "with the same command"
            ) from error
        if error.errno in READ_ONLY:
            raise InputError(
                f"output={str(folder)!r} cannot be written to ({error.strerror}); allow it or choose another folder"
            ) from error
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, which is made if need be.

    The lock ends with the process, however that ends. It is a record lock, which forked worker processes, unlike those
    of ``flock``, do not inherit: they may outlive a killed process by seconds.

    Raises:
        InputError: If another run holds the lock, or the folder cannot be written to.
    """
    with disk_problems_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("w")
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"output={str(folder)!r} is being written by another run; wait for it, or choose another folder"
            ) from error
        yield


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` when the block ends without an error.

    It is written under a name of its own beside ``path``, so that a process left over from a killed run cannot get in
    the way; then flushed to the disk, renamed, and the folder flushed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{TEMPORARY}")
    try:
        with temporary.open("xb+") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole small file, see :func:`replacing`."""
    with replacing(path) as stream:
        stream.write(text.encode())


def remove_temporary(folder: Path) -> None:
    """Delete what killed runs left half written."""
    for path in folder.rglob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ShardWriter:
    """A safetensors file whose rows come batch by batch; memory holds one batch.

    Args:
        path: Where the finished file will be.
        shapes: Name of each tensor → its shape, the rows of all tensors first.
        dtype: Type of all tensors.

    Raises:
        OSError: If the disk has no room for the whole shard: it is reserved at once.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self.dtype, self.shapes = path, dtype, dict(shapes)
        header: dict[str, Any] = {}
        end, self._starts, self._row_bytes = 0, {}, {}
        for name, shape in self.shapes.items():
            row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
            start, end = end, end + shape[0] * row_bytes
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name], self._row_bytes[name] = start, row_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._context = replacing(path)
        self._stream = self._context.__enter__()
        with self._abandoned_on_error():
            self._stream.write(len(text).to_bytes(8, "little") + text)
            self._stream.flush()
            os.posix_fallocate(self._stream.fileno(), 0, self._data + end)

    def write(self, first: int, rows: Mapping[str, Tensor]) -> None:
        """Put ``rows[name]`` ``(n, ...)`` of every tensor at row ``first``."""
        with self._abandoned_on_error():
            for name, tensor in rows.items():
                if tensor.shape[1:] != self.shapes[name][1:] or tensor.dtype != self.dtype:
                    raise ValueError(
                        f"{self.path.name}: rows of {name} are {tuple(tensor.shape[1:])} {tensor.dtype}, planned "
                        f"{self.shapes[name][1:]} {self.dtype}"
                    )
                content = memoryview(tensor.cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
                offset = self._data + self._starts[name] + first * self._row_bytes[name]
                while content:
                    written = os.pwrite(self._stream.fileno(), content, offset)
                    content, offset = content[written:], offset + written

    def finish(self) -> str:
        """Put the file in its place; returns its SHA-256."""
        with self._abandoned_on_error():
            self._stream.seek(0)
            sha256 = hashlib.file_digest(self._stream, "sha256").hexdigest()
        self._context.__exit__(None, None, None)
        return sha256

    def abandon(self, error: BaseException) -> None:
        """Remove what was written so far."""
        with suppress(BaseException):
            self._context.__exit__(type(error), error, error.__traceback__)

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise
