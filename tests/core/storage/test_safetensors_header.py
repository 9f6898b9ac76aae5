"""The header of a stranger's safetensors file holds what is promised, or is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.storage.weight_files import read_header

ENTRY = {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    "header",
    [
        *([ENTRY], {"a": 1}, {"a": {"dtype": "F32"}}),
        *({"a": {**ENTRY, "shape": shape}} for shape in (3, [float("inf"), 3], [10**400, 3], [-1, 3], [1.0, 3], ["1"])),
        *({"a": {**ENTRY, "data_offsets": offsets}} for offsets in ([0], [0, float("nan")], [0, 2**63])),
    ],
)
def test_a_wrong_header_is_one_line(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(ValueError, match="its header") as error:
        read_header(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
