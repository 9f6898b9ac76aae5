"""Writing that survives a power cut: a file is either whole and under its name, or it is not there."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.cache.layout import TEMPORARY
from latentreward.storage.durable import TEMPORARY_NAME, replacing

KEPT = "finished shards are kept: free some space and resume with the same command"
"""What an error on a full disk says."""
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
"""Names of the types in a safetensors header."""


def remove_temporary(folder: Path) -> None:
    """Delete what killed runs left half written, those of an earlier version included, which named it ``*.tmp``."""
    for path in folder.rglob("*"):
        if TEMPORARY_NAME.fullmatch(path.name) or path.suffix == TEMPORARY:
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
        self._open = ExitStack()
        with self._abandoned_on_error():
            self._stream = self._open.enter_context(self._open.enter_context(replacing(path, KEPT)).open("xb+"))
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
        self._open.close()
        return sha256

    def abandon(self, error: BaseException) -> None:
        """Remove what was written so far."""
        with suppress(BaseException):
            self._open.__exit__(type(error), error, error.__traceback__)

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise
