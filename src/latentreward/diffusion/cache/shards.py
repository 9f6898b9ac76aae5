"""Shards, which are safetensors files: atomic writing, and reading of single rows into the memory of a batch."""

import errno
import hashlib
import json
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.core.storage import weight_files
from latentreward.core.storage.durable import replacing
from latentreward.diffusion.cache.layout import PROMPT_LENGTHS

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
LENGTHS_DTYPES = {"I32": torch.int32}
"""Dtype of ``prompt_lengths``."""
MOST_BUFFERS = 512
"""Most buffers passed to one ``preadv``; Linux accepts 1024."""
REMEDY = "run `latentreward cache --check` on the cache"
KEPT = "finished shards are kept: free some space and resume with the same command"
"""End of the error message on a full disk."""


@dataclass(frozen=True)
class TensorBlock:
    """One tensor of a safetensors file: N rows of one shape, one after the other."""

    dtype: torch.dtype  # dtype of the elements
    rows: int  # number of rows N
    shape: tuple[int, ...]  # shape of one row
    offset: int  # bytes from the start of the file to row 0
    row_bytes: int  # bytes of one row


def read_header(path: Path) -> dict[str, TensorBlock]:
    """Read the header of a safetensors file: position and shape of each tensor by name.

    Raises:
        InputError: If the file is missing, is not a safetensors file, or is shorter or longer than its header says.
    """
    blocks, last = {}, 0
    try:
        entries, start, size = weight_files.read_header(path)
        for name, entry in entries.items():
            begin, end = entry.data_offsets
            rows, *shape = entry.shape
            dtypes = LENGTHS_DTYPES if name == PROMPT_LENGTHS else DTYPES
            if entry.dtype not in dtypes:
                raise ValueError(f"dtype {entry.dtype} is none of {', '.join(dtypes)}")
            dtype, last = dtypes[entry.dtype], max(last, start + end)
            row_bytes = dtype.itemsize * torch.Size(shape).numel()
            if rows * row_bytes != end - begin:
                raise ValueError("its offsets do not fit its shapes")
            blocks[name] = TensorBlock(dtype, rows, tuple(shape), start + begin, row_bytes)
    except FileNotFoundError as error:
        raise InputError(f"shard {path} is missing; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"shard {path} is not a safetensors file ({error}); {REMEDY}") from error
    if last != size:
        raise InputError(f"shard {path} has {size} bytes, but its header says {last}; {REMEDY}")
    return blocks


def read_lengths(path: Path, blocks: Mapping[str, TensorBlock], most: int) -> np.ndarray:
    """Read the number of tokens ``(N,)`` of each prompt of a text shard.

    Returns:
        The numbers; an empty array if the shard has none, or one lies outside 1…``most``.
    """
    block = blocks.get(PROMPT_LENGTHS)
    if block is None or block.shape or not block.rows:
        return np.zeros(0, np.int32)
    lengths = np.fromfile(path, np.int32, block.rows, offset=block.offset)
    return lengths if lengths.min() >= 1 and lengths.max() <= most else lengths[:0]


class ShardStore:
    """Many safetensors files that are opened on demand.

    Headers are read once, at construction. Each process opens a file at its first read, and closes the least recently
    used file when too many are open. A store can be pickled and used after ``fork``, because each read passes its
    offset and does not move a file position that processes would share.

    Args:
        paths: Files of the store; reads refer to a file by its index in this list.

    Raises:
        InputError: If a file is missing or damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self.blocks = [read_header(path) for path in self.paths]
        self._most_open = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's files; later reads open files again."""
        for file in getattr(self, "_files", {}).values():
            file.close()
        self._files = OrderedDict()

    def read(self, name: str, places: Sequence[tuple[int, int]], out: Tensor) -> None:
        """Read rows of the tensor ``name`` into ``out``.

        Args:
            name: Name of the tensor, which every file in ``places`` must hold.
            places: (file, row) indices for each row of ``out``.
            out: Contiguous CPU tensor ``(len(places), *shape)`` of the stored dtype, written in place.

        Raises:
            InputError: If a file ends early, or shared memory is full.
        """
        if not places:
            return
        target = memoryview(out.view(torch.uint8).numpy()).cast("B")
        size = len(target) // len(places)
        for file, row, positions in _runs(places):
            block = self.blocks[file][name]
            views = [target[position * size : (position + 1) * size] for position in positions]
            if block.row_bytes != size or not _read_into(self._fileno(file), views, block.offset + row * size):
                raise InputError(f"shard {self.paths[file]} ends before row {row + len(views) - 1}; {REMEDY}")

    def read_span(self, name: str, file: int, row: int, out: Tensor) -> None:
        """Read consecutive rows of the tensor ``name`` of one file, from ``row`` on, into ``out``.

        Raises:
            InputError: As for :meth:`read`.
        """
        target, block = memoryview(out.view(torch.uint8).numpy()).cast("B"), self.blocks[file][name]
        fits = len(target) == len(out) * block.row_bytes
        if not fits or not _read_into(self._fileno(file), [target], block.offset + row * block.row_bytes):
            raise InputError(f"shard {self.paths[file]} ends before row {row + len(out) - 1}; {REMEDY}")

    def _fileno(self, number: int) -> int:
        file = self._files.get(number)
        if file is None:
            while len(self._files) >= self._most_open:
                self._files.popitem(last=False)[1].close()
            file = self._files[number] = FileIO(self.paths[number])
        self._files.move_to_end(number)
        return file.fileno()


def _runs(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Group ``places`` into runs of consecutive rows of a file: (file, first row, positions in ``places``)."""
    order = sorted(range(len(places)), key=places.__getitem__)
    first, run = places[order[0]], [order[0]]
    for position in order[1:]:
        file, row = places[position]
        if file == first[0] and row == first[1] + len(run) and len(run) < MOST_BUFFERS:
            run.append(position)
            continue
        yield *first, run
        first, run = (file, row), [position]
    yield *first, run


def _read_into(fileno: int, views: Sequence[memoryview], offset: int) -> bool:
    """Fill ``views`` with the file's bytes from ``offset`` on; return False if the file is too short."""
    try:
        if os.preadv(fileno, views, offset) == sum(map(len, views)):
            return True
        for view in views:  # preadv may read fewer bytes than requested
            done = 0
            while done < len(view):
                step = os.preadv(fileno, [view[done:]], offset + done)
                if step == 0:
                    return False
                done += step
            offset += len(view)
        return True
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise InputError(
            "shared memory for the loader's workers is full; give the container more (docker --shm-size), or set "
            "data.num_workers: 0"
        ) from error


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
    names = {kind: name for name, kind in (DTYPES | LENGTHS_DTYPES).items()}
    header: dict[str, Any] = {}
    end, starts = 0, {}
    for name, shape in shapes.items():
        starts[name], end = end, end + shape[0] * row_bytes[name]
        header[name] = {"dtype": names[dtypes[name]], "shape": list(shape), "data_offsets": [starts[name], end]}
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
