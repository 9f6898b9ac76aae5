"""Files are whole or absent, and are what safetensors reads."""

import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward.cache.shards import ShardWriter, disk_problems_named, file_hash, locked, replacing
from latentreward.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_written_in_batches_are_one_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tokens, pooled = torch.randn(5, 3, 7).to(dtype), torch.randn(5, 2).to(dtype)
    path = tmp_path / "text" / "0.safetensors"
    writer = ShardWriter(path, {"tokens": (5, 3, 7), "pooled": (5, 2)}, dtype)
    for first in (0, 2, 4):
        rows = slice(first, first + 2)
        writer.write(first, {"tokens": tokens[rows], "pooled": pooled[rows]})
        assert not path.exists()
    assert writer.finish() == file_hash(path)
    read = load_file(path)
    assert torch.equal(read["tokens"], tokens)
    assert torch.equal(read["pooled"], pooled)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_error_leaves_neither_file_nor_remains(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0.safetensors", {"latents": (2, 3)}, torch.float32)
    with pytest.raises(ValueError, match="planned"):
        writer.write(0, {"latents": torch.zeros(1, 4)})
    with pytest.raises(RuntimeError), replacing(tmp_path / "plan.json") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as stream:
        stream.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_one_lock_per_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "cache"):
        child = os.fork()
        if child == 0:  # a lock does not keep out the process that holds it
            with (tmp_path / "cache" / "lock").open("w") as stream:
                try:
                    fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    with locked(tmp_path / "cache"):
        pass


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"), locked(tmp_path / "file" / "cache"):
        pass
    with pytest.raises(InputError, match="cannot be written to"), disk_problems_named(tmp_path):
        raise OSError(30, "Read-only file system")
    with pytest.raises(InputError, match="resume with the same command"), disk_problems_named(tmp_path):
        raise OSError(28, "No space left on device")
