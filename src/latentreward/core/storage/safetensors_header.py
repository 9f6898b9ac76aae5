"""Reading of a safetensors file's header, without the tensors."""

import json
import os
from pathlib import Path
from typing import Any

LONGEST = 1 << 20  # bytes of the longest header that is accepted, enough for some thousand tensors


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
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
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length, size
