"""Files and folders are whole under their name or not there, and a full disk is one line."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from latentreward.core.errors import InputError
from latentreward.core.storage import durable
from latentreward.core.storage.durable import (
    check_writable,
    put_in_place,
    replacing,
    temporary_name,
    write_file,
)
from tests.limits import largest_file

TENSORS = {"a": torch.zeros(100_000)}


def save_open_file(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(TENSORS, file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(bytes(400_000)),
    "torch": save_open_file,
    "safetensors": lambda path: save_file(TENSORS, path),
    "parquet": lambda path: pq.write_table(pa.table({"a": range(100_000)}), path),
    "shards": lambda path: distributed_checkpoint.save(TENSORS, storage_writer=FileSystemWriter(path), no_dist=True),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "target"
    write_file(path, "old")
    with (
        largest_file(100_000),
        pytest.raises(InputError, match=rf"no space left for {path} \(.*\); pages are kept$") as error,
        replacing(path, "pages are kept") as partial,
    ):
        WRITERS[writer](partial)
    assert "\n" not in str(error.value)
    assert ("File too large" in str(error.value)) == (writer != "shards")  # which wraps the system's error in text
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/target", "file/below/target"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = rf"^{tmp_path / name} cannot be written to \(.*\); allow it, or choose another place$"
    with pytest.raises(InputError, match=message):
        check_writable(tmp_path / name)
    with pytest.raises(InputError, match=message), replacing(tmp_path / name):
        pass
    check_writable(tmp_path / "not" / "yet" / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_files_have_the_mode_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            save_file(TENSORS, partial / "weights.safetensors")  # on its own, safetensors keeps it to the owner
        write_file(tmp_path / "text", "")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "folder" / "weights.safetensors", tmp_path / "text")]
    assert modes == [0o640, 0o640]


def test_what_is_there_may_stay(tmp_path: Path) -> None:
    target = folder_with(tmp_path / "target", "first")
    with replacing(target, over=False) as partial:
        folder_with(partial, "second")
    assert (target / "content").read_text() == "first"
    (target / "content").unlink()
    with replacing(target, over=False) as partial:
        folder_with(partial, "second")
    assert (target / "content").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "plan.json"
    write_file(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "content").write_text(text)
    return path


@pytest.mark.parametrize("old", ["nothing", "folder", "file", "link", "dangling link"])
@pytest.mark.parametrize("exchanging", [True, False])
def test_a_folder_takes_the_place_of_whatever_was_there(
    exchanging: bool, old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanging:
        monkeypatch.setattr(durable, "exchange", cannot_exchange)
    target, other = tmp_path / "target", folder_with(tmp_path / "other", "other")
    if old == "folder":
        folder_with(target, "old")
    elif old == "file":
        target.write_text("old")
    elif "link" in old:
        target.symlink_to(tmp_path / "none" if old == "dangling link" else other)
    for text in ("new", "newer"):
        put_in_place(folder_with(temporary_name(target), text), target)
        assert (target / "content").read_text() == text
    assert (other / "content").read_text() == "other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    if (process := os.fork()) == 0:
        folder_with(temporary_name(target), "dead")
        temporary_name(target, "old").write_text("dead")
        os._exit(0)
    os.waitpid(process, 0)
    (tmp_path / ".target.partial").write_text("another's")
    alive = folder_with(temporary_name(target), "alive")
    put_in_place(folder_with(temporary_name(target), "new"), target)
    assert {path.name for path in tmp_path.iterdir()} == {"target", ".target.partial", alive.name}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    target, line, found = folder_with(tmp_path / "target", "old"), 0, set()
    while not replaced_until(line, target):
        found.add((target / "content").read_text())
        put_in_place(folder_with(temporary_name(target), "old"), target)
        assert list(tmp_path.iterdir()) == [target]  # what the kill left is removed
        line += 1
    assert found == {"old", "new"}


def replaced_until(line: int, target: Path) -> bool:
    """Replace ``target`` in a process that is killed before this line of the module; False if it was killed."""
    if (process := os.fork()) == 0:
        partial, lines = folder_with(temporary_name(target), "new"), 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != durable.__file__:
                return None
            if event == "line":
                if lines == line:
                    os.kill(os.getpid(), signal.SIGKILL)
                lines += 1
            return trace

        sys.settrace(trace)
        put_in_place(partial, target)
        os._exit(0)
    return os.waitpid(process, 0)[1] == 0


def cannot_exchange(one: Path, other: Path) -> bool:
    """What a file system without an exchange answers."""
    return False


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder_with(tmp_path / "target", "old")
    partial = folder_with(tmp_path / "partial", "new")
    monkeypatch.setattr(durable, "exchange", cannot_exchange)
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        put_in_place(partial, target)
    assert (target / "content").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partial", "target"]


def no_space(self: Path, target: Path) -> Path:
    """What a full disk says."""
    raise OSError(28, "no space left on device")
