"""`make bench-gpu` runs unattended: each block at tiny size on the CPU, time limits, and going on after a stop."""

import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

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


@pytest.mark.slow
def test_a_family_holds_one_network_at_a_time(blocks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    kind = sys.modules[blocks.family_rows.__module__].RandomModel
    make = kind.network

    def network(self: Any) -> Any:
        assert not [one for one in made if one() is not None]
        found = make(self)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(kind, "network", network)
    setting = blocks.Setting("cpu", True, 1, lambda: None)
    assert len([*blocks.rows_of_family("Tongyi-MAI/Z-Image", setting)]) == len(made) == 2


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


TRIAL = ("--device=cpu", "--tiny")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command outside of the checkout, with nothing of it on the import path."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output=out", *arguments]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=hidden, capture_output=True, text=True, check=False)


def write(path: Path, *rows: list[Any], complete: bool = True, device: str = "cpu", tiny: bool = True) -> None:
    """Write a block's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"complete": complete, "device": device, "tiny": tiny, "tables": [{"rows": rows}]}
    path.write_text(json.dumps(found))


def test_blocks_without_time_are_named_and_done_ones_skipped(tmp_path: Path) -> None:
    write(tmp_path / "out" / "trial" / "vlm.json", ["one", 1.0], ["two", "failed: ValueError: x"])
    write(tmp_path / "out" / "trial" / "scoring.json", ["one", 1.0], complete=False)
    stopped = run(tmp_path, *TRIAL, "--minutes=0")
    assert "vlm: done already" in stopped.stdout
    assert "scoring: no time left" in stopped.stdout
    assert stopped.returncode == 1
    assert "not measured to the end: scoring, rewards, alignment, methods, execution" in stopped.stderr


def test_a_block_is_done_with_its_own_settings_unless_all_rows_failed(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    is_done, path = load("gpu").is_done, tmp_path / "vlm.json"
    write(path, ["one", "out of memory"], ["two", "failed: ValueError: x"])
    assert is_done(path, "cpu", True)
    assert not is_done(path, "cuda", True)
    assert not is_done(path, "cpu", False)
    write(path, ["one", "failed: ValueError: x"], ["two", "failed: ValueError: y"])
    assert not is_done(path, "cpu", True)


def test_a_trial_leaves_measured_blocks_alone(tmp_path: Path) -> None:
    write(tmp_path / "out" / "vlm.json", ["one", 1.0], device="cuda", tiny=False)
    before = (tmp_path / "out" / "vlm.json").read_text()
    tried = run(tmp_path, *TRIAL, "vlm", "--minutes=0")
    assert "vlm: no time left" in tried.stdout
    assert (tmp_path / "out" / "vlm.json").read_text() == before


@pytest.mark.slow
def test_a_missing_gpu_is_told_before_any_block(tmp_path: Path) -> None:
    refused = run(tmp_path)
    assert refused.returncode == 2
    assert re.fullmatch(r"PyTorch \S+ finds no CUDA device; --device cpu --tiny .*\n", refused.stderr)
    assert "##" not in refused.stdout
    assert not (tmp_path / "out").exists()


def test_wheels_are_unpacked_and_imported_from(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with ZipFile(tmp_path / "library-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("library.py", "number = 5")
    script = load("gpu")
    places = script.import_path(tmp_path).split(os.pathsep)
    assert (tmp_path / "unpacked" / "library.py").read_text() == "number = 5"
    assert places[:3] == [str(ROOT / "src"), str(ROOT), str(tmp_path / "unpacked")]
    assert script.import_path(tmp_path).split(os.pathsep) == places


def test_the_oldest_pytorch_is_that_of_the_package(load: Callable[[str], ModuleType]) -> None:
    floor = re.search(r"^ +torch >= (\d+)\.(\d+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert floor
    assert tuple(map(int, floor.groups())) == load("gpu").FLOOR


@pytest.mark.slow
@pytest.mark.release
def test_it_runs_from_anywhere_and_with_wheels_beside_it(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    done = run(tmp_path, *TRIAL, "rewards", "--wheels=wheels")
    assert done.returncode == 0, done.stderr
    assert cells(tmp_path / "out" / "trial" / "rewards.json")[0]["complete"]
