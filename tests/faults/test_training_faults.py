"""Training through the command line, broken off by kills and signals: it ends as if it had been left alone."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.train_kill import kill_and_compare
from tests.faults.training import TrainingRun

pytestmark = pytest.mark.slow
TERMINATED = 143
Make = Callable[..., TrainingRun]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "data"


@pytest.fixture
def make(tmp_path: Path, data: Path) -> Make:
    return lambda name, **settings: TrainingRun(tmp_path / name, data, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[int], TrainingRun]:
    """The run that is left alone, for a number of processes."""
    runs: dict[int, TrainingRun] = {}

    def get(processes: int) -> TrainingRun:
        if processes not in runs:
            runs[processes] = TrainingRun(tmp_path_factory.mktemp(f"whole{processes}"), data, processes)
            runs[processes].finish()
        return runs[processes]

    return get


def assert_same_end(run: TrainingRun, whole: TrainingRun) -> None:
    assert run.trained_pairs() == whole.trained_pairs()
    assert run.weights() == whole.weights()


@pytest.mark.parametrize(("processes", "seed"), [(1, 1), (2, 1)])
def test_kills(processes: int, seed: int, make: Make, whole) -> None:
    assert kill_and_compare(make("broken", processes=processes), whole(processes), kills=2, seed=seed)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_of_two_saves_once_and_ends_both(rank: int, make: Make, whole) -> None:
    run = make("run", processes=2, save_every=1000)
    run.start()
    os.kill(run.wait_for_batches(8, rank), signal.SIGTERM)
    assert run.wait() == [TERMINATED] * 2
    assert 8 <= run.begun() <= 10  # the optimiser step in which the signal came is finished, no other begun
    assert run.output().count("stopped by a signal (terminate)") == 1
    assert [path.name for path in (run.folder / "checkpoints").glob("*.ckpt")] == ["last.ckpt"]
    run.finish()
    assert_same_end(run, whole(2))
    assert run.begun() == whole(2).begun()  # no batch was taken twice


def test_sigterm_to_every_process_of_a_run_lightning_launched(make: Make, whole) -> None:
    """As a batch system does, loader workers included."""
    run = make("run", processes=2, save_every=1000)
    run.launch()
    run.wait_for_batches(5)
    os.killpg(run.ranks[0].pid, signal.SIGTERM)
    assert run.wait() == [TERMINATED]
    run.finish()
    assert_same_end(run, whole(2))


def test_slurm_requeues_and_the_job_goes_on_unasked(make: Make, whole, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    program.chmod(0o755)
    slurm = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    run = make("run", save_every=1000, resume=False)
    run.start(**environment, PATH=f"{program.parent}:{os.environ['PATH']}")
    os.kill(run.wait_for_batches(7), signal.SIGUSR1)
    assert run.wait() == [TERMINATED]
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    run.finish(**environment, SLURM_RESTART_COUNT="1")
    assert_same_end(run, whole(1))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_world_size_takes_the_same_pairs_in_each_step(before: int, after: int, make: Make, whole) -> None:
    """Two ranks that accumulate two batches, or one that accumulates four of them."""

    def sized(processes: int) -> TrainingRun:
        options = ["--data.batch_size=2", f"--trainer.accumulate_grad_batches={4 // processes}"]
        return make("run", processes=processes, save_every=1000, options=options)

    first = sized(before)
    first.start()
    os.kill(first.wait_for_batches(9), signal.SIGTERM)
    assert first.wait() == [TERMINATED] * before
    sized(after).finish()
    assert first.pairs_by_step() == whole(2).pairs_by_step()
    assert first.checkpoint()["global_step"] == whole(2).checkpoint()["global_step"]
