"""Kill ``latentreward cache`` with SIGKILL at random moments, again and again, and compare what it leaves in the end.

    python -m tests.faults.cache_kill --kills 20 --processes 1
    python -m tests.faults.cache_kill --kills 20 --processes 2

The cache must equal, file by file, that of a run which was never interrupted. Of two processes, the first, the second
or both are killed; the next run starts at once, while a survivor may still be writing.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from latentreward.apps.cli import main as command
from latentreward.core.storage.durable import LOCK
from tests.diffusion.cache.writing import cache_arguments, contents, write_data
from tests.processes import Forked, start_ranks

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


def interrupt(ranks: Sequence[Forked], cache: Path, draw: random.Random) -> str:
    """Let a run finish a few more files, kill some of its ranks, and wait for the first; returns what was done."""
    before, since = finished(cache), begun(cache)
    more, delay = draw.randint(0, 4), draw.uniform(0, 0.2)
    end = time.monotonic() + PATIENCE
    while ranks[0].poll() is None and (begun(cache) == since or finished(cache) < before + more):
        assert time.monotonic() < end, "the run hangs"
        time.sleep(0.002)
    time.sleep(delay)
    if ranks[0].poll() is not None:
        output = "" if ranks[0].returncode == 0 else ranks[0].stderr
        return f"{output} ended by itself with status {ranks[0].returncode}"
    chosen = sorted(draw.sample(range(len(ranks)), draw.randint(1, len(ranks))))
    for rank in chosen:
        ranks[rank].kill()
    ranks[0].wait(PATIENCE)
    names = " and ".join(("first", "second")[rank] for rank in chosen)
    return f"{names} process killed with {finished(cache)} files done"


def run_kills(folder: Path, kills: int, processes: int, seed: int, pairs: int) -> None:
    """Write one cache in peace and others under ``kills`` kills, and compare.

    Raises:
        AssertionError: If a file differs, or a run fails for another reason than a kill.
    """
    draw = random.Random(seed)
    data = write_data(folder / "data", pairs)
    settings = [*SETTINGS, *(["--trainer.devices=2", "--trainer.strategy=ddp"] if processes == 2 else [])]
    expected = finish(folder / "whole", data, SETTINGS)
    done = number = 0
    while done < kills:
        number += 1
        assert number <= 5 * kills + 5, f"{done} kills in {number} caches: runs end before they can be killed"
        cache = folder / f"cache{number}"
        while done < kills:
            what = interrupt(begin(cache, data, settings, processes), cache, draw)
            print(f"{processes} processes, kill {done + 1}: {what}", flush=True)
            if "killed" not in what:
                assert what.endswith("status 0"), what
                break
            done += 1
        found = finish(cache, data, settings, processes)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not different, f"{cache}: {sorted(different)}"
        command(["cache", str(cache), "--check"])
    print(f"{processes} processes: {done} kills, {number} caches, all {len(expected)} files equal, {pairs} pairs each")


def begin(cache: Path, data: Path, settings: Sequence[str], processes: int) -> list[Forked]:
    """Start a run that writes the cache, or goes on with it."""
    return start_ranks(cache_arguments(cache, data, *settings), processes)


def finish(cache: Path, data: Path, settings: Sequence[str], processes: int = 1) -> dict[str, str]:
    """Run until the cache is finished; returns the hash of every file."""
    for rank in begin(cache, data, settings, processes):
        assert rank.wait(PATIENCE) == 0, rank.stderr
    return contents(cache)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cache_kill_") as folder:
        run_kills(Path(folder), options.kills, options.processes, options.seed, options.pairs)


if __name__ == "__main__":
    main()
