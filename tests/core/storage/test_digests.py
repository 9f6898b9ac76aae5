"""Checksums: of every part of a file, once, and of the file as it is when it is used."""

import os
import zipfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.core.storage.digests import check_hash, check_records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({f"{n}": torch.full((1000,), float(n)) for n in range(5)}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


def test_every_part_of_a_file_is_checked(path: Path) -> None:
    size, file = path.stat().st_size, path.with_name("parts")
    file.write_bytes(path.read_bytes() * 2)
    check_records(file, ((0, size), (size, size)))
    flip(path)
    file.write_bytes(file.read_bytes()[:size] + path.read_bytes())
    check_records(file, ((0, size),))
    with pytest.raises(ValueError, match="does not fit its checksum"):
        check_records(file, ((0, size), (size, size)))


def test_a_record_that_goes_on_beyond_the_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w") as records:
        records.writestr("archive/data.pkl", b"0123456789")
    start, end = path.read_bytes().split(b"PK\1\2")
    path.write_bytes(start + b"PK\1\2" + end.replace((10).to_bytes(4, "little"), (10**6).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"a record|checksum"):
        check_records(path)


def test_a_file_is_read_once_until_it_is_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, whole = Counter[str](), zipfile.ZipFile.open

    def counted(records: zipfile.ZipFile, name: Any, *args: Any, **kwargs: Any) -> Any:
        count[str(name)] += 1
        return whole(records, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", counted)
    known, before = sha256(path.read_bytes()).hexdigest(), path.stat()
    for _ in range(2):
        check_records(path.parent / ".." / path.parent.name / path.name)
        check_hash(path, known, "get it again")
    assert len(count) > 5 and set(count.values()) == {1}
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)  # of equal size and time
    with pytest.raises(ValueError, match=r"does not fit its checksum$"):
        check_records(path)
    with pytest.raises(InputError, match="is damaged"):
        check_hash(path, known, "get it again")
