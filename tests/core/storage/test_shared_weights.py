"""Converted weights in one file: other runs, killed processes and full disks."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from latentreward.core.storage.weight_files import (
    ABANDONED_S,
    StoredTensor,
    map_weights,
    own_folder,
    release_shared,
    shared,
)
from tests.limits import largest_file

VALUES = torch.arange(1000.0)
Wanted = Sequence[tuple[StoredTensor, torch.dtype]]


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_file({"weight": VALUES.half()}, tmp_path / "model.safetensors")
    return weights(tmp_path)


def weights(folder: Path) -> Wanted:
    places = map_weights([folder / "model.safetensors"]).places.values()
    return [(place, torch.float32) for place in places]


def first(tensors: list[Tensor] | None) -> Tensor:
    assert tensors is not None
    return tensors[0]


def files() -> list[Path]:
    return sorted(path for path in own_folder().iterdir() if path.suffix != ".lock")


def test_the_file_is_not_removed_while_another_run_writes_it(wanted: Wanted) -> None:
    values = first(shared(wanted))
    (file,) = files()
    remover = Thread(target=release_shared, args=(True,))
    with FileLock(lock := file.with_suffix(".lock")):
        remover.start()
        remover.join(0.3)
        assert remover.is_alive()
        assert file.is_file()
        assert lock.is_file()
    remover.join(300)
    assert not [*own_folder().iterdir()]
    assert torch.equal(values, VALUES)  # what is mapped stays


@pytest.mark.parametrize("harm", ["cut short", "of an earlier boot"])
def test_a_file_that_a_power_cut_may_have_harmed_is_written_again(harm: str, wanted: Wanted) -> None:
    shared(wanted)
    (file,) = files()
    file.write_bytes(bytes(file.stat().st_size // (2 if harm == "cut short" else 1)))
    if harm == "of an earlier boot":
        earlier = time.time() - time.monotonic() - 60
        os.utime(file, (earlier, earlier))
    assert torch.equal(first(shared(wanted)), VALUES)
    release_shared(remove=True)


def test_a_source_that_was_written_in_place_is_converted_again(wanted: Wanted, tmp_path: Path) -> None:
    assert torch.equal(first(shared(wanted)), VALUES)
    source = tmp_path / "model.safetensors"
    before = source.stat()
    save_file({"weight": -VALUES.half()}, tmp_path / "other")
    while source.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock has steps
        with source.open("r+b") as file:
            file.write((tmp_path / "other").read_bytes())
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = source.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert torch.equal(first(shared(weights(tmp_path))), -VALUES)
    release_shared(remove=True)


def test_what_killed_processes_left_is_removed(wanted: Wanted) -> None:
    old, new = own_folder() / "0123.partial", own_folder() / "4567.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - ABANDONED_S - 60,) * 2)
    shared(wanted)
    assert not old.exists()
    assert new.exists()
    release_shared(remove=True)


def test_a_full_disk_leaves_weights_to_each_process(wanted: Wanted) -> None:
    with largest_file(1000):
        assert shared(wanted) is None
    assert not files()


def test_a_folder_of_another_user_is_refused(wanted: Wanted, tmp_path: Path) -> None:
    folder = own_folder()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written to by others; remove it, or set TMPDIR"):
        shared(wanted)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="can be written to by others"):
        shared(wanted)
    folder.unlink()
    folder.touch()
    with pytest.raises(PermissionError, match="can be written to by others"):
        shared(wanted)
