"""Atomic writing of shards: a shard appears under its name only when complete, even after a power loss."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.cache.layout import PROMPT_LENGTHS
from latentreward.storage.durable import replacing

KEPT = "finished shards are kept: free some space and resume with the same command"
"""End of the error message on a full disk."""
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
"""Names of the dtypes in a safetensors header."""


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the tensor ``name`` in a cache that stores latents and embeddings in ``dtype``."""
    return torch.int32 if name == PROMPT_LENGTHS else dtype


def write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    batches: Iterable[tuple[int, Mapping[str, Tensor]]],
) -> str:
    """Write a safetensors file batch by batch, whose memory need is that of one batch; return its SHA-256.

    Args:
        path: Path of the finished file.
        shapes: Name of each tensor → its shape, whose first dimension is the number of rows.
        dtype: Dtype of latents and embeddings.
        batches: Index of a batch's first row, and its rows ``(n, ...)`` of every tensor.

    Raises:
        InputError: If the disk has not enough space for the whole file, which is reserved before the first batch.
    """
    dtypes = {name: stored_dtype(name, dtype) for name in shapes}
    row_bytes = {name: torch.Size(shape[1:]).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    header: dict[str, Any] = {}
    end, starts = 0, {}
    for name, shape in shapes.items():
        starts[name], end = end, end + shape[0] * row_bytes[name]
        kind = DTYPE_NAMES[dtypes[name]]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with replacing(path, KEPT) as unfinished, unfinished.open("xb+") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        os.posix_fallocate(stream.fileno(), 0, data + end)
        for first, rows in batches:
            for name, tensor in rows.items():
                if tensor.shape[1:] != shapes[name][1:] or tensor.dtype != dtypes[name]:
                    raise ValueError(
                        f"{path.name}: rows of {name} are {tuple(tensor.shape[1:])} {tensor.dtype}, planned "
                        f"{shapes[name][1:]} {dtypes[name]}"
                    )
                content = memoryview(tensor.cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
                offset = data + starts[name] + first * row_bytes[name]
                while content:
                    written = os.pwrite(stream.fileno(), content, offset)
                    content, offset = content[written:], offset + written
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()
