"""Damage, full disks, second runs and signals: one line each, nothing lost, and the same bytes in the end."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latentreward.apps.cli import main
from latentreward.diffusion.cache.store import IMAGES
from tests.diffusion.cache.writing import contents, run_cache, start_cache, write_data
from tests.marks import slow_after
from tests.processes import Forked

SETTINGS = ("--encoder.text=true", "--encoder.prompts_per_shard=4")
SLOWLY = (
    "import torch, time; rows = torch.Tensor.isfinite; torch.Tensor.isfinite = lambda t: time.sleep(0.3) or rows(t)"
)
"""Each encode batch takes at least 0.3 s, so that there is time to interrupt."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and its cache, never interrupted."""
    folder = tmp_path_factory.mktemp("written")
    data = write_data(folder / "data", pairs=24)
    run_cache(folder / "cache", data, *SETTINGS)
    return data, folder / "cache"


@pytest.fixture
def copied(written: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the cache, to damage."""
    return Path(shutil.copytree(written[1], tmp_path / "cache"))


def flip(path: Path) -> None:
    """Turn one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def first_file(cache: Path) -> Path:
    return min(cache.glob("latents-*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flipped": (lambda cache: flip(first_file(cache)), "is damaged: its contents"),
    "truncated": (lambda cache: os.truncate(first_file(cache), 100), "is damaged"),
    "missing": (lambda cache: first_file(cache).unlink(), "is missing"),
    "another's contents": (
        lambda cache: shutil.copy(max(cache.glob("text-*.safetensors")), first_file(cache)),
        "is damaged: its tensors",
    ),
    "text missing": (lambda cache: [one.unlink() for one in cache.glob("text-*")], "text-00000.safetensors is missing"),
    "table flipped": (lambda cache: flip(cache / IMAGES), "images.parquet is damaged"),
    "table missing": (lambda cache: (cache / IMAGES).unlink(), "images.parquet is missing"),
    "interrupted rename": (
        lambda cache: first_file(cache).rename(cache / ".latents-00000.safetensors.0123abcd-1-0123abcd.partial"),
        "is missing",
    ),
}


@pytest.mark.parametrize("kind", slow_after(2, DAMAGE))
def test_damage_is_named_and_put_right(
    written: tuple[Path, Path], copied: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGE[kind]
    damage(copied)
    with pytest.raises(SystemExit) as status:
        main(["cache", str(copied), "--check"])
    assert status.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert message in lines[0]
    assert lines[-1].endswith("run the command that wrote it to put them right")
    run_cache(copied, written[0], *SETTINGS)
    assert contents(copied) == contents(written[1])
    capsys.readouterr()
    main(["cache", str(copied), "--check"])
    assert capsys.readouterr().out == f"{copied} is whole: 24 pairs, 44 images, 13 prompts\n"


def test_a_finished_cache_is_left_alone(written: tuple[Path, Path]) -> None:
    cache = written[1]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
    run_cache(cache, written[0], *SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")} == before


@pytest.mark.slow
def test_a_full_disk_loses_nothing(written: tuple[Path, Path], tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"  # the largest shards are larger
    run = start_cache(tmp_path / "cache", written[0], *SETTINGS, setup=limit)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 2
    [line] = [line for line in error.splitlines() if "error" in line]
    assert re.match(rf"latentreward: error: no space left for {tmp_path}/cache/\S+ \(File too large\)", line)
    assert line.endswith("finished files are kept: free some space and resume with the same command")
    assert not list(tmp_path.rglob("*.partial"))
    run_cache(tmp_path / "cache", written[0], *SETTINGS)
    assert contents(tmp_path / "cache") == contents(written[1])


def wait_for_files(cache: Path, run: Forked) -> None:
    """Until one file is finished."""
    end = time.monotonic() + 300
    while not (list(cache.glob("*.safetensors"))):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_and_a_second_run(
    written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    run = start_cache(cache, written[0], *SETTINGS, "--encoder.batch_size=4", setup=SLOWLY)
    wait_for_files(cache, run)
    with pytest.raises(SystemExit):
        run_cache(cache, written[0], *SETTINGS)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        f"latentreward: error: output: {cache} is being written by another run (process {run.pid} on "
    )
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 143
    kept = f"finished files are kept in {cache}: the same command goes on there"
    assert error.strip().splitlines()[-1] == f"latentreward: stopped by SIGTERM; {kept}"
    assert not list(cache.rglob("*.partial"))
    done = contents(cache)
    assert any(name.endswith(".safetensors") for name in done)
    assert done.items() < contents(written[1]).items()
    run_cache(cache, written[0], *SETTINGS)
    assert contents(cache) == contents(written[1])


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "sent"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGKILL)])
def test_a_signal_to_one_of_two_processes(
    written: tuple[Path, Path], tmp_path: Path, rank: int, sent: signal.Signals
) -> None:
    cache, two = tmp_path / "cache", ("--trainer.devices=2", "--trainer.strategy=ddp")
    run = start_cache(cache, written[0], *SETTINGS, *two, setup=SLOWLY)
    wait_for_files(cache, run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[0]) if rank else run.pid, sent)
    _, error = run.communicate(timeout=300)
    assert not list(cache.rglob("*.partial")) and "Traceback" not in error
    if sent == signal.SIGTERM:
        assert run.returncode == 143
        run_cache(cache, written[0], *SETTINGS)
    else:
        assert run.returncode == 0
        assert f"process {children[0]} has ended (signal 9): the others do its part" in error
    assert contents(cache) == contents(written[1])
