"""What a safetensors file says of its tensors, without reading them."""

import json
import os
from pathlib import Path
from typing import Any

LONGEST = 1 << 20
"""Bytes of the longest header that is read: some thousand tensors."""


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Read the entries of all tensors by name, the byte at which their data begin, and the size of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file; no more is read than the file can hold.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST, size - 8):
            raise ValueError("its header has no valid length")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length, size
