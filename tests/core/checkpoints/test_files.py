"""A checkpoint is whole or it is not there, and a damaged one is passed over aloud."""

import os
import signal
import time
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from latentreward.core.checkpoints.files import (
    DurableCheckpointIO,
    checkpoint_problem,
    holds_weights_alone,
    newest_intact,
)
from latentreward.core.errors import InputError
from tests.processes import Forked


def write(path: Path, age: float = 0.0, number: int = 0, whole: bool = True) -> Path:
    content = {"number": number, "weights": torch.arange(1000.0), "pytorch-lightning_version": "2.6.0"}
    content |= {"optimizer_states": []} if whole else {}
    DurableCheckpointIO().save_checkpoint(content, path)
    os.utime(path, times=(time.time() - age,) * 2)
    return path


def damage(path: Path, how: str) -> None:
    data, modified = path.read_bytes(), path.stat().st_mtime
    changed = {"torn": data[: len(data) // 2], "empty": b"", "garbage": b"no checkpoint"}[how]
    path.write_bytes(changed)
    os.utime(path, times=(modified, modified))


def save_half_and_die(path: Path) -> None:
    """What a process of its own does."""
    whole = torch.save

    def half(checkpoint: dict[str, Any], file: BinaryIO) -> None:
        whole(checkpoint, file)
        if isinstance(file, BytesIO):
            return
        file.flush()
        os.ftruncate(file.fileno(), 500)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    DurableCheckpointIO().save_checkpoint({"number": 2}, path)


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", number=1)
    assert Forked(save_half_and_die, [path]).wait(60) == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["number"] == 1
    assert newest_intact([path]) == path
    write(path, number=3)
    assert torch.load(path, weights_only=True)["number"] == 3


@pytest.mark.parametrize("how", ["torn", "empty", "garbage"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_previous_one(how: str, tmp_path: Path, caplog) -> None:
    write(tmp_path / "step=10.ckpt", age=60)
    previous = write(tmp_path / "step=20.ckpt", age=30)
    last = write(tmp_path / "last.ckpt", age=10)
    assert newest_intact([last, tmp_path / "absent.ckpt"]) == last
    damage(last, how)
    assert checkpoint_problem(last)
    assert newest_intact([last]) == previous
    (line,) = caplog.messages
    assert line.startswith(f"ckpt_path: {last} is damaged")
    assert line.endswith(f"going on from the previous one, {previous}")
    assert "\n" not in line
    for path in tmp_path.glob("step*"):
        path.unlink()
    with pytest.raises(InputError, match="no checkpoint beside it is intact; remove it to start anew"):
        newest_intact([last])


def test_weights_alone_are_passed_over_by_a_run_that_goes_on(tmp_path: Path) -> None:
    previous = write(tmp_path / "step=10.ckpt", age=60)
    best, last = write(tmp_path / "best.ckpt", age=30, whole=False), write(tmp_path / "last.ckpt", age=10)
    assert [holds_weights_alone(path) for path in (previous, best, last)] == [False, True, False]
    damage(last, "torn")
    assert newest_intact([last]) == previous
    previous.unlink()
    with pytest.raises(InputError, match="no checkpoint beside it is intact"):
        newest_intact([last])


def test_a_folder_of_shards_needs_its_index(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    assert checkpoint_problem(folder) == ".metadata is missing"
    for name in (".metadata", "meta.pt"):
        (folder / name).touch()
    assert "is damaged" in str(checkpoint_problem(folder))


def mappings(path: Path) -> int:
    """Number of mappings of a file in this process."""
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux only")
def test_the_state_of_an_optimiser_does_not_keep_the_weights_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    moments = {0: {"exp_avg": torch.ones(5000)}}
    whole = {"state_dict": {"w": torch.arange(5000.0)}, "optimizer_states": [{"state": moments}]}
    DurableCheckpointIO().save_checkpoint(whole, path)
    content = DurableCheckpointIO().load_checkpoint(path)
    before = mappings(path)
    assert torch.equal(content.pop("state_dict")["w"], torch.arange(5000.0))
    assert mappings(path) == before - 1 == 1
    assert content["optimizer_states"][0]["state"][0]["exp_avg"].sum() == 5000
