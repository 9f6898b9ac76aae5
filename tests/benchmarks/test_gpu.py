"""`make bench-gpu` runs unattended: each block at tiny size on the CPU, time limits, and going on after a stop."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.marks import release_after

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "scoring": 6,
    "vlm": 9,
    "rewards": 2,
    "alignment": 3,
    "methods": 10,
    "execution": 3,
    "switches": 14,
    "families": 18,
}
"""Block → rows of its tiny form."""


@pytest.fixture(scope="module")
def blocks(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("gpu_blocks")


def cells(path: Path) -> tuple[dict[str, Any], list[list[Any]]]:
    """A block's file and its rows."""
    found = json.loads(path.read_text())
    (table,) = found["tables"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return found, table["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", release_after(1, ["rewards", *(name for name in ROWS if name != "rewards")]))
def test_a_block_writes_its_rows(blocks: ModuleType, tmp_path: Path, name: str) -> None:
    blocks.measure(name, tmp_path / "block.json", "cpu", tiny=True)
    found, rows = cells(tmp_path / "block.json")
    assert found["complete"]
    assert len(rows) == ROWS[name]
    assert not [row[1] for row in rows if str(row[1]).startswith(("failed", "out of memory"))]
    assert {"processor", "torch", "diffusers", "lightning", "commit", "load"} <= found.keys()


def test_a_row_that_fails_says_so_and_the_rest_goes_on(blocks: ModuleType) -> None:
    def exhausted() -> Iterator[list[Any]]:
        yield ["first", 1, 2]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken() -> Iterator[list[Any]]:
        raise ValueError("no such | kernel\nsecond line")

    written: list[int] = []
    setting = blocks.Setting("cpu", True, 1, lambda: written.append(1))
    works = {"large": exhausted, "broken": broken, "good": lambda: iter([["last", 3, 4]])}
    assert [*blocks.guarded(("a", "b", "c"), works, setting)] == [
        ["first", 1, 2],
        ["large", "out of memory", ""],
        ["broken", "failed: ValueError: no such / kernel", ""],
        ["last", 3, 4],
    ]
    assert len(written) == 2
