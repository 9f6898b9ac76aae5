"""Parsing of safetensors bytes from untrusted clients: the header is checked in full before a tensor is made.

Not by ``safetensors.deserialize``, which copies all tensors before names and shapes can be checked, needs 770 MiB for a
body of 33 MiB that lists 600 000 empty tensors, and accepts duplicate keys.
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
"""Greatest length of a safetensors header, in bytes; five tensors need less than 500."""
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.uint8,
    "U8": torch.uint8,
}
"""Name of a dtype in safetensors → dtype of torch to read it as, for the dtypes that requests may use.

Truth values are read as numbers, because torch takes bytes above 1 for them without an error.
"""
FLOATS = ("F32", "F16", "BF16")
"""Names of the floating-point dtypes that requests may use."""


@dataclass(frozen=True)
class Expected:
    """Requirements of the protocol on a tensor.

    Attributes:
        shapes: Allowed shapes: names of the axes, separated by spaces.
        dtypes: Allowed dtypes, by their names in :data:`DTYPES`.
        required: Whether a request must have the tensor.
        taken: Whether the served model takes the tensor; if not, a request must not have it.
    """

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...] = FLOATS
    required: bool = True
    taken: bool = True


@dataclass(frozen=True)
class Entry:
    """Description of a tensor in the header.

    Attributes:
        dtype: Name in :data:`DTYPES`.
        shape: Shape; each size is at least 1.
        begin: Offset of the tensor's first byte, counted from the end of the header.
        end: Offset one past the tensor's last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(body: bytes | bytearray, expected: Mapping[str, Expected]) -> tuple[dict[str, Entry], memoryview]:
    """Read and check the header of a safetensors body without texts; see :func:`read_described`."""
    entries, data, _ = read_described(body, expected, HEADER_BYTES)
    return entries, data


def read_described(
    body: bytes | bytearray, expected: Mapping[str, Expected], most: int
) -> tuple[dict[str, Entry], memoryview, dict[str, str]]:
    """Read and check the header of a safetensors body.

    Format (README of safetensors): 8 bytes of little-endian length, JSON of that length, data.

    Returns:
        Descriptions of the tensors by name, the data after the header, and the texts of ``__metadata__``. The tensors
        cover the data exactly.

    Raises:
        RequestError: If the body is not in safetensors format, its header is too long, a tensor is missing or unknown
            or does not meet the requirements, or the tensors overlap, leave gaps or reach past the data. With status
            422 if the served model does not take a tensor.
    """
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise RequestError("the body is no safetensors file: it ends before its header does")
    if length > most:
        raise RequestError(f"the safetensors header has {length} bytes; at most {most} are read")
    data = memoryview(body)[8 + length :]
    header, texts = _parse_json(bytes(body[8 : 8 + length]))
    missing = [name for name, wanted in expected.items() if wanted.required and name not in header]
    unknown = [name for name in header if name not in expected]
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"holds an unknown tensor {unknown[0][:40]!r}"
        names = ", ".join(name for name, wanted in expected.items() if wanted.taken)
        raise RequestError(f"the body {problem}; the protocol has {names}")
    for name in header:
        if not expected[name].taken:
            raise RequestError(f"{name} is given, but this model takes none; leave it out", 422)
    entries = {name: _entry(name, header[name], expected[name]) for name in header}
    _check_cover(entries.values(), len(data))
    return entries, data, texts


def read_tensor(entry: Entry, data: memoryview) -> Tensor:
    """Copy the tensor of ``entry`` from the data that :func:`read_header` returned."""
    return torch.frombuffer(bytearray(data[entry.begin : entry.end]), dtype=DTYPES[entry.dtype]).view(entry.shape)


def read_floats(name: str, entry: Entry, data: memoryview) -> Tensor:
    """Copy a tensor as float32; raise RequestError with status 422 if it holds NaN or infinity."""
    tensor = read_tensor(entry, data).to(torch.float32)
    if not tensor.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinity", 422)
    return tensor


def _parse_json(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse the header's JSON into descriptions of tensors by name, and metadata."""
    if not text.startswith(b"{"):
        raise RequestError("the safetensors header is no JSON object")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the safetensors header cannot be read ({type(error).__name__})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RequestError("the safetensors header's __metadata__ must map texts to texts")
    return header, metadata


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
    axes = [wanted.split() for wanted in expected.shapes]
    if not _natural(shape, least=1) or len(shape) not in map(len, axes):
        wanted = " or ".join(f"({', '.join(names)})" for names in axes)
        raise RequestError(f"{name}: shape must be {wanted}, whole numbers from 1 on, not {str(shape)[:80]}")
    if not _natural(offsets, least=0) or len(offsets) != 2:
        raise RequestError(f"{name}: data_offsets must be two whole numbers from 0 on, not {str(offsets)[:80]}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise RequestError(f"{name}: data_offsets span {offsets[1] - offsets[0]} bytes, but its shape takes {size}")
    return Entry(dtype, tuple(shape), *offsets)


def _natural(values: Any, least: int) -> bool:
    """Tell whether ``values`` is a list of integers from ``least`` to 2⁴⁰ - 1, so that products stay manageable."""
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**40 for value in values)


def _check_cover(entries: Iterable[Entry], length: int) -> None:
    """Raise RequestError if tensors overlap, leave gaps, or do not cover ``length`` bytes of data."""
    reached = 0
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if entry.begin != reached:
            raise RequestError(f"data_offsets overlap or leave a gap at byte {min(reached, entry.begin)} of the data")
        reached = entry.end
    if reached != length:
        raise RequestError(f"data_offsets cover {reached} bytes, but {length} follow the header")
