"""Reading of a safetensors file's header, without the tensors."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from latentreward.core.storage.json_files import checked, parse

LONGEST = 1 << 20  # bytes of the longest header that is accepted, enough for some thousand tensors

Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Entry:
    """Entry of a tensor."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]  # of its first byte and the one behind its last, from the beginning of the data


def read_header(path: Path) -> tuple[dict[str, Entry], int, int]:
    """Read the header of a safetensors file.

    Returns:
        The header's entry of each tensor by name, the byte at which the data of all tensors begin, and the file's size
        in bytes.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a safetensors file. A header length beyond the file or 1 MiB is not trusted.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST, size - 8):
            raise ValueError("its header has no valid length")
        header: Any = parse(file.read(length))
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    return checked(dict[str, Entry], header, "its header"), 8 + length, size
