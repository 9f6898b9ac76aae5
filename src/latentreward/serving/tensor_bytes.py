"""Safetensors bytes from strangers: everything is checked in the header before a tensor is made.

By hand, since ``safetensors.deserialize`` copies all tensors before their names and shapes can be compared with the
protocol, takes 770 MiB for a body of 33 MiB that lists 600 000 empty tensors, and takes keys that stand twice.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentreward.serving.errors import RequestError

HEADER_BYTES = 16 * 1024
"""Longest header; five tensors need less than 500 bytes."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""Name in the header → dtype, of those that any request may hold."""
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Expected:
    """What a tensor must be like.

    Attributes:
        rank: Number of axes.
        dtypes: Names in :data:`DTYPES`.
        required: Whether it must be there.
    """

    rank: int
    dtypes: tuple[str, ...] = FLOATS
    required: bool = True


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it.

    Attributes:
        dtype: Name in :data:`DTYPES`.
        shape: Sizes of its axes, at least 1 each.
        begin: Its first byte, counted from the end of the header.
        end: One past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(body: bytes | bytearray, expected: Mapping[str, Expected]) -> tuple[dict[str, Entry], memoryview]:
    """Tensors that ``body`` says it holds, and the bytes after the header, which they cover exactly.

    Format: 8 bytes little-endian length, JSON of that length, data (safetensors, its README).

    Raises:
        RequestError: If it is no safetensors file, its header is too long, a tensor is missing, unknown or not as
            expected, or offsets lie.
    """
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise RequestError("the body is no safetensors file: it ends before its header does")
    if length > HEADER_BYTES:
        raise RequestError(f"the safetensors header has {length} bytes; at most {HEADER_BYTES} are read")
    data = memoryview(body)[8 + length :]
    header = _parse_json(bytes(body[8 : 8 + length]))
    missing = [name for name, wanted in expected.items() if wanted.required and name not in header]
    unknown = [name for name in header if name not in expected]
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"holds an unknown tensor {unknown[0][:40]!r}"
        raise RequestError(f"the body {problem}; the protocol has {', '.join(expected)}")
    entries = {name: _entry(name, header[name], expected[name]) for name in header}
    _check_cover(entries.values(), len(data))
    return entries, data


def read_tensor(entry: Entry, data: memoryview) -> Tensor:
    """The tensor of an entry that :func:`read_header` gave; its own copy."""
    return torch.frombuffer(bytearray(data[entry.begin : entry.end]), dtype=DTYPES[entry.dtype]).view(entry.shape)


def _parse_json(text: bytes) -> dict[str, Any]:
    """Descriptions of tensors by name; metadata is checked and left out."""
    if not text.startswith(b"{"):
        raise RequestError("the safetensors header is no JSON object")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the safetensors header cannot be read ({type(error).__name__})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RequestError("the safetensors header's __metadata__ must map texts to texts")
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _entry(name: str, described: Any, expected: Expected) -> Entry:
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise RequestError(f"{name}: the header must give dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if dtype not in expected.dtypes:
        raise RequestError(f"{name}: dtype must be {' or '.join(expected.dtypes)}, not {str(dtype)[:20]!r}")
    if not _natural(shape, least=1) or len(shape) != expected.rank:
        raise RequestError(f"{name}: shape must be {expected.rank} whole numbers from 1 on, not {str(shape)[:80]}")
    if not _natural(offsets, least=0) or len(offsets) != 2:
        raise RequestError(f"{name}: data_offsets must be two whole numbers from 0 on, not {str(offsets)[:80]}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise RequestError(f"{name}: data_offsets span {offsets[1] - offsets[0]} bytes, but its shape takes {size}")
    return Entry(dtype, tuple(shape), *offsets)


def _natural(values: Any, least: int) -> bool:
    """Whether they are a list of whole numbers, each short enough to be multiplied and printed."""
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**40 for value in values)


def _check_cover(entries: Iterable[Entry], length: int) -> None:
    """Refuse tensors that overlap, leave gaps or reach past the data."""
    reached = 0
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if entry.begin != reached:
            raise RequestError(f"data_offsets overlap or leave a gap at byte {min(reached, entry.begin)} of the data")
        reached = entry.end
    if reached != length:
        raise RequestError(f"data_offsets cover {reached} bytes, but {length} follow the header")
