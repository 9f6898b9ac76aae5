"""Kill training at random moments, go on with ``--ckpt_path last``, and compare with the run that was left alone.

    python tests/faults/train_kill.py --kills 20 --processes 1 --folder runs/faults

prints a line per kill and a summary; exit status 1 if weights or trained pairs differ.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.training import TrainingRun

STARTUP_S = 6.0
PER_BATCH_S = 0.4


def kill_once(run: TrainingRun, rng: random.Random) -> str:
    """Start, or go on, and kill one rank or all at a random moment; returns what was done, or "" if the run ended.

    One moment in four lies anywhere between the start of the process and the first batches; the others after one to
    four more batches, so that the run gets on.
    """
    before = run.begun()
    run.start()
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, STARTUP_S))
        run.kill_all()
        return f"all ranks, {run.begun() - before} batches after the start"
    victim = rng.choice(["all", *range(run.processes)]) if run.processes > 1 else "all"
    rank = 0 if victim == "all" else int(victim)
    pid = run.wait_for_batches(run.begun(rank) + rng.randint(1, 4), rank)
    time.sleep(rng.uniform(0, PER_BATCH_S))
    if run.has_ended():  # the end came first
        assert not any(run.wait()), run.output()[-2000:]
        return ""
    if victim == "all":
        run.kill_all()
    else:
        os.kill(pid, signal.SIGKILL)
        assert all(run.wait()), "a rank ended as if it had not been left alone"
    return f"rank {victim}, {run.begun() - before} batches after the start"


def kill_and_compare(broken: TrainingRun, whole: TrainingRun, kills: int, seed: int) -> bool:
    """Kill ``broken`` so often, let it end, and print whether it ended as ``whole`` did; returns that."""
    rng, done = random.Random(seed), 0
    while done < kills and (what := kill_once(broken, rng)):
        done += 1
        print(f"kill {done}: {what}", flush=True)
    broken.finish()
    same_weights = broken.weights() == whole.weights()
    same_pairs = broken.trained_pairs() == whole.trained_pairs()
    print(
        f"{done} kills, {broken.processes} process(es), {len(whole.trained_pairs())} batches, "
        f"{sum(broken.begun(rank) for rank in range(broken.processes))} begun: weights "
        f"{'equal' if same_weights else 'DIFFER'} ({whole.weights()[:16]}), "
        f"trained pairs {'equal' if same_pairs else 'DIFFER'}"
    )
    return same_weights and same_pairs


def main() -> int:
    """Run, kill, compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2, help="more give more batches to kill in")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, required=True, help="for data and runs; must not hold earlier runs")
    given = parser.parse_args()
    folder = given.folder.resolve() / f"{given.processes}_processes"
    options = [f"--trainer.max_epochs={given.epochs}"]
    whole, broken = (
        TrainingRun(folder / name, given.folder.resolve() / "data", given.processes, options)
        for name in ("whole", "broken")
    )
    whole.finish()
    return 0 if kill_and_compare(broken, whole, given.kills, given.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
