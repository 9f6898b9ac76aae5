"""Atomic writing of shards: a shard appears under its name only when complete, even after a power loss."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.cache.layout import PROMPT_LENGTHS
from latentreward.storage.durable import TEMPORARY_NAME, replacing

KEPT = "finished shards are kept: free some space and resume with the same command"
"""End of the error message on a full disk."""
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
"""Names of the dtypes in a safetensors header."""


def remove_temporary(folder: Path) -> None:
    """Delete unfinished files of killed runs."""
    for path in folder.rglob("*"):
        if TEMPORARY_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the tensor ``name`` in a cache that stores latents and embeddings in ``dtype``."""
    return torch.int32 if name == PROMPT_LENGTHS else dtype


class ShardWriter:
    """Writer of a safetensors file, batch by batch, whose memory need is that of one batch.

    Args:
        path: Path of the finished file.
        shapes: Name of each tensor → its shape, whose first dimension is the number of rows.
        dtype: Dtype of latents and embeddings.

    Raises:
        OSError: If the disk has not enough space for the shard; the space is reserved at construction.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self.shapes = path, dict(shapes)
        self.dtypes = {name: stored_dtype(name, dtype) for name in shapes}
        header: dict[str, Any] = {}
        end, self._starts, self._row_bytes = 0, {}, {}
        for name, shape in self.shapes.items():
            row_bytes = torch.Size(shape[1:]).numel() * self.dtypes[name].itemsize
            start, end = end, end + shape[0] * row_bytes
            kind = DTYPE_NAMES[self.dtypes[name]]
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
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
        """Write ``rows[name]`` ``(n, ...)`` of every tensor, starting at row ``first``."""
        with self._abandoned_on_error():
            for name, tensor in rows.items():
                if tensor.shape[1:] != self.shapes[name][1:] or tensor.dtype != self.dtypes[name]:
                    raise ValueError(
                        f"{self.path.name}: rows of {name} are {tuple(tensor.shape[1:])} {tensor.dtype}, planned "
                        f"{self.shapes[name][1:]} {self.dtypes[name]}"
                    )
                content = memoryview(tensor.cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
                offset = self._data + self._starts[name] + first * self._row_bytes[name]
                while content:
                    written = os.pwrite(self._stream.fileno(), content, offset)
                    content, offset = content[written:], offset + written

    def finish(self) -> str:
        """Rename the finished file to ``path`` and return its SHA-256."""
        with self._abandoned_on_error():
            self._stream.seek(0)
            sha256 = hashlib.file_digest(self._stream, "sha256").hexdigest()
        self._open.close()
        return sha256

    def abandon(self, error: BaseException) -> None:
        """Remove the unfinished file, after ``error``."""
        with suppress(BaseException):
            self._open.__exit__(type(error), error, error.__traceback__)

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise
