"""One writer in a folder: processes, their ends, and file systems that cannot lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentreward.core.errors import InputError
from latentreward.core.storage.durable import contents, locked

HOLD = """
import os, sys, time
from pathlib import Path
from latentreward.core.storage.durable import locked
with locked(Path(sys.argv[1]), "output_dir"):
    if os.fork() == 0:  # as a loader's worker, which may outlive a killed process by seconds
        print("held", flush=True)  # by now filelock has closed this process's copy of the lock
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a forked worker that holds the lock of ``tmp_path/run``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_process_is_refused_until_the_first_is_dead(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # the first refusal leaves the name of the holder
        message = rf"output_dir: {folder} is being written by another run \(process {holder.pid} on \S+\); wait for it"
        with pytest.raises(InputError, match=message), locked(folder, "output_dir"):
            pass
    assert contents(folder) == []
    with locked(tmp_path / "other run", "output_dir"):
        pass
    holder.kill()  # not its worker
    holder.wait()
    with locked(folder, "output_dir"):
        assert contents(folder) == []
    assert list(folder.iterdir()) == []


def test_an_error_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path, "output_dir"):
        raise RuntimeError
    with locked(tmp_path, "output_dir"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path, "output_dir"):
        (tmp_path / "result").write_text("written")
    [warning] = caplog.messages
    assert warning.startswith(f"{tmp_path}: its file system has no locks ({os.strerror(number)})")
    assert contents(tmp_path) == ["result"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written to \(Not a directory"),
        locked(tmp_path / "file" / "cache", "output"),
    ):
        pass
