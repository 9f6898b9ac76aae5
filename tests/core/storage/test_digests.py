"""Checksums that are computed beside other work: once, of the file as it is when it is used, and never for longer."""

import os
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.core.storage import digests
from latentreward.core.storage.digests import check_hash, check_records, checking_meanwhile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "last.ckpt")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each record of a zip file is read."""
    count: Counter[str] = Counter()
    whole = zipfile.ZipFile.open

    def counted(records: zipfile.ZipFile, name: Any, *args: Any, **kwargs: Any) -> Any:
        count[str(name)] += 1
        return whole(records, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", counted)
    return count


def saved(path: Path) -> Path:
    torch.save({f"{n}": torch.full((1000,), float(n)) for n in range(5)}, path)
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def slow_reads() -> Iterator[None]:
    """Let a checksum take a minute, until the block ends."""
    going, read = threading.Event(), zipfile.ZipExtFile.read

    def slow(record: zipfile.ZipExtFile, size: int | None = -1) -> bytes:
        going.wait(0.05)
        return read(record, size if going.is_set() else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "read", slow)
        yield
        going.set()


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


def test_what_is_computed_beside_other_work_is_not_computed_again(path: Path, opened: Counter[str]) -> None:
    with checking_meanwhile(records=[(path, None)]):
        until(lambda: opened)
        check_records(path)
    check_records(path.parent / ".." / path.parent.name / path.name)
    assert len(opened) > 5
    assert set(opened.values()) == {1}


def test_a_file_exchanged_after_the_start_is_read_again(path: Path, opened: Counter[str]) -> None:
    known = sha256(path.read_bytes()).hexdigest()
    before = path.stat()
    with checking_meanwhile([path], [(path, None)]):
        until(lambda: len(opened) > 5)
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        flip(other)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)  # of equal size and time
        with pytest.raises(ValueError, match=r"does not fit its checksum$"):
            check_records(path)
        with pytest.raises(InputError, match="is damaged"):
            check_hash(path, known, "get it again")
    saved(path)
    check_records(path)


@pytest.mark.parametrize("late", [True, False])
def test_a_fault_in_a_thread_is_told_by_the_check(late: bool, path: Path) -> None:
    if not late:
        flip(path)
    missing = path.with_name("missing.ckpt")
    with checking_meanwhile([missing], [(missing, None), (path, None)]):
        if late:
            flip(path)
        with pytest.raises(ValueError, match=r"^\S+ in last.ckpt does not fit its checksum$"):
            check_records(path)
        with pytest.raises(FileNotFoundError):
            check_hash(missing, "", "get it again")


def test_no_thread_outlives_a_refused_command(path: Path, opened: Counter[str]) -> None:
    threads = threading.active_count()
    with slow_reads():
        with pytest.raises(InputError, match="refused"), checking_meanwhile(records=[(path, None)]):
            until(lambda: opened)
            start = time.monotonic()
            raise InputError("refused")
        assert time.monotonic() - start < 5
        assert threading.active_count() == threads
    check_records(path)
    flip(path)
    with pytest.raises(ValueError, match="does not fit"):
        check_records(path)


def test_threads_end_with_their_work_and_not_with_the_block(path: Path) -> None:
    threads = threading.active_count()
    with checking_meanwhile([path], [(path, None)]):
        until(lambda: threading.active_count() == threads)


def test_a_check_that_waits_for_an_ended_block_goes_on_alone(path: Path, opened: Counter[str]) -> None:
    problems: list[str] = []

    def check() -> None:
        try:
            check_records(path)
        except ValueError as error:
            problems.append(str(error))

    flip(path)
    waiting = threading.Thread(target=check)
    with slow_reads(), checking_meanwhile(records=[(path, None)]):
        until(lambda: opened)
        waiting.start()
        time.sleep(0.05)
        assert not problems
    waiting.join(20)
    assert len(problems) == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(path: Path, opened: Counter[str]) -> None:
    known = path.with_name("known")
    known.write_bytes(b"x")
    check_hash(known, sha256(b"x").hexdigest(), "get it again")
    with slow_reads(), checking_meanwhile(records=[(path, None)]):
        until(lambda: opened)
        child = os.fork()
        if not child:
            os._exit(digests._LOCK.locked() or any(not one.done() for one in digests._CHECKSUMS.values()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert any(not one.done() for one in digests._CHECKSUMS.values())
