"""Kill ``latentreward cache`` with SIGKILL at random moments, again and again, and compare what it leaves in the end.

    python -m tests.faults.cache_kill --kills 20 --workers 1
    python -m tests.faults.cache_kill --kills 20 --workers 2

The cache must equal, file by file, that of a run which was never interrupted. Of two workers one is killed, or the
first process, which they end with; the next run starts at once.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentreward.apps.cli import main as command
from latentreward.core.storage.durable import LOCK
from tests.diffusion.cache.writing import cache_arguments, contents, write_data
from tests.processes import Forked, start

SETTINGS = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--encoder.batch_size=2", "--num_workers=1")
PATIENCE = 300.0
"""Seconds after which a run that shows no progress counts as hanging."""


def finished(cache: Path) -> int:
    """Number of finished files."""
    return len(list(cache.glob("*.safetensors")))


def begun(cache: Path) -> int:
    """When a run last took the lock."""
    lock = cache / LOCK
    return lock.stat().st_mtime_ns if lock.exists() else 0


def descendants(process: int) -> Iterator[int]:
    """IDs of the processes that a process has started, and of those that they have."""
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


def workers_of(run: Forked) -> list[int]:
    """IDs of a run's workers, which Ray names so."""
    found = []
    for process in descendants(run.pid):
        command = Path(f"/proc/{process}/cmdline")
        if command.exists() and command.read_bytes().startswith(b"ray::Worker"):
            found.append(process)
    return found


def interrupt(run: Forked, cache: Path, draw: random.Random) -> str:
    """Let a run finish a few more files, and kill it or one of its workers; returns what was done."""
    before, since = finished(cache), begun(cache)
    more, delay = draw.randint(0, 4), draw.uniform(0, 0.2)
    end = time.monotonic() + PATIENCE
    while run.poll() is None and (begun(cache) == since or finished(cache) < before + more):
        assert time.monotonic() < end, "the run hangs"
        time.sleep(0.002)
    time.sleep(delay)
    if run.poll() is not None:
        return f"{'' if run.returncode == 0 else run.stderr} ended by itself with status {run.returncode}"
    if (workers := workers_of(run)) and draw.random() < 0.5:
        os.kill(draw.choice(workers), signal.SIGKILL)
        assert run.wait(PATIENCE) == 0, run.stderr
        return f"worker killed with {finished(cache)} files done"
    run.kill()
    run.wait(PATIENCE)
    return f"first process killed with {finished(cache)} files done"


def run_kills(folder: Path, kills: int, workers: int, seed: int, pairs: int) -> None:
    """Write one cache in peace and others under ``kills`` kills, and compare.

    Raises:
        AssertionError: If a file differs, or a run fails for another reason than a kill.
    """
    draw = random.Random(seed)
    data = write_data(folder / "data", pairs)
    settings = [*SETTINGS, f"--workers={workers}"]
    expected = finish(folder / "whole", data, SETTINGS)
    done = number = 0
    while done < kills:
        number += 1
        assert number <= 5 * kills + 5, f"{done} kills in {number} caches: runs end before they can be killed"
        cache = folder / f"cache{number}"
        while done < kills:
            what = interrupt(start(cache_arguments(cache, data, *settings)), cache, draw)
            print(f"{workers} workers, kill {done + 1}: {what}", flush=True)
            done += "killed" in what
            if not what.startswith("first"):
                assert "worker" in what or what.endswith("status 0"), what
                break
        found = finish(cache, data, settings)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not different, f"{cache}: {sorted(different)}"
        command(["cache", str(cache), "--check"])
    print(f"{workers} workers: {done} kills, {number} caches, all {len(expected)} files equal, {pairs} pairs each")


def finish(cache: Path, data: Path, settings: Sequence[str]) -> dict[str, str]:
    """Run until the cache is finished; returns the hash of every file."""
    run = start(cache_arguments(cache, data, *settings))
    assert run.wait(PATIENCE) == 0, run.stderr
    return contents(cache)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cache_kill_") as folder:
        run_kills(Path(folder), options.kills, options.workers, options.seed, options.pairs)


if __name__ == "__main__":
    main()
