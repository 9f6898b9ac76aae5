"""A run of the cache: plan on one process, encode on all, resume where the last run stopped."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.utils.data import DataLoader

from latentreward.cache.check import Shard, read_shards, shard_states, table_problems
from latentreward.cache.encoding import EncodeBatches
from latentreward.cache.layout import PLAN, SCHEMAS, CachePlan, CacheSpec, manifest_name, read_plan
from latentreward.cache.plan import check_same, describe_data, write_plan
from latentreward.cache.scan import RowScan, scan_rows
from latentreward.cache.shard_writer import KEPT, remove_temporary
from latentreward.cache.sizing import ImageSettings
from latentreward.data.loading import WorkerLoader
from latentreward.data.readers import PairReader
from latentreward.errors import InputError
from latentreward.interrupts import TERMINATED
from latentreward.storage.durable import contents, write_errors_named
from latentreward.storage.locks import locked
from latentreward.storage.progress import Progress

logger = logging.getLogger(__name__)

PARENT = "LATENTREWARD_CACHE_PARENT"
"""Environment variable that tells a process who started it, even if that one has ended meanwhile."""


class EncodingDataModule(LightningDataModule):
    """Encode batches of the shards that are not finished; a rank gets every world-size-th of these shards.

    Args:
        folder: The cache.
        reader: Pairs.
        images: Sizes of images.
        spec: Settings, made from ``images`` and the encoders.
        num_workers: Processes that fetch and decode images, per rank.
    """

    def __init__(
        self, folder: Path, reader: PairReader, images: ImageSettings, spec: CacheSpec, num_workers: int
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.folder, self.reader, self.images = folder, reader, images
        self.spec, self.num_workers = spec, num_workers
        self.todo: list[Shard] | None = None
        self._held = ExitStack()

    @property
    def total(self) -> int:
        """Images and prompts that are still to be encoded, over all ranks."""
        return sum(shard.count for shard in self.todo or ())

    def prepare_data(self) -> None:
        """On one process: lock the folder, plan or check the old plan, and see which shards are missing or damaged.

        Raises:
            InputError: If another run is writing, the folder cannot be written to, or it was begun otherwise.
        """
        if self.todo is not None:
            return
        self._held.enter_context(locked(self.folder, "output"))
        with write_errors_named(self.folder, KEPT):
            begun = (self.folder / PLAN).exists()
            if not begun:
                self._refuse_other_files()
            remove_temporary(self.folder)
            data = describe_data(self.reader)
            if begun:
                plan = read_plan(self.folder)
                check_same(self.folder, plan, self.spec, data)
                self.spec = plan.spec  # an earlier version's lacks what was not recorded then
                self._restore_tables(plan, data)
            else:
                plan = self._plan(data)
            self.todo = self._unfinished(plan)

    def setup(self, stage: str) -> None:
        """Tell all ranks what there is to do."""
        assert self.trainer is not None
        self.todo = self.trainer.strategy.broadcast(self.todo)

    def predict_dataloader(self) -> DataLoader[Any]:
        """This rank's batches, shard by shard."""
        assert self.trainer is not None and self.todo is not None
        mine = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        plan = read_plan(self.folder)
        return WorkerLoader(
            EncodeBatches(self.folder, plan, mine, self.reader, self.images.max_pixels),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.accelerator.is_available(),
            # The process group has threads, beside which a fork may hang (seen with Python 3.11).
            multiprocessing_context="forkserver" if self.num_workers and self.trainer.world_size > 1 else None,
            worker_init_fn=end_worker_with_rank,
        )

    def release(self) -> None:
        """Let go of the lock."""
        self._held.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": ExitStack()}  # the lock stays with the process that took it

    def _plan(self, data: dict[str, Any]) -> CachePlan:
        rows = scan_rows(RowScan(self.reader, self.images, self.spec.latent_space), self.num_workers)
        with Progress("cache: plan", len(self.reader), "rows") as progress:
            return write_plan(self.folder, self.spec, self.images, data, rows, progress.add)

    def _restore_tables(self, plan: CachePlan, data: dict[str, Any]) -> None:
        """Plan again if a table is missing or damaged; the result must be the same plan."""
        if problems := table_problems(self.folder, plan):
            logger.warning("%s: %s; planning again", self.folder, "; ".join(problems))
            if self._plan(data).hash != plan.hash:
                raise InputError(
                    f"{self.folder}: {problems[0]}, and the reader's rows are not those of the plan any more; choose "
                    "another output"
                )

    def _refuse_other_files(self) -> None:
        """Whatever lies in a folder without a plan is not ours, but for what a killed run left of its planning."""
        ours = ("lock", PLAN, *SCHEMAS)  # "lock" is an earlier version's
        strangers = [name for name in contents(self.folder) if not name.startswith(ours)]
        if strangers:
            raise InputError(
                f"output={str(self.folder)!r} has no {PLAN} but holds {strangers[0]} ({len(strangers)} such files); "
                "choose an empty folder, or restore the plan"
            )

    def _unfinished(self, plan: CachePlan) -> list[Shard]:
        states = list(shard_states(self.folder, plan, read_shards(self.folder)))
        todo = [state.shard for state in states if state.problem is not None]
        if damaged := [str(state.problem) for state in states if state.problem and "damaged" in state.problem]:
            logger.warning("%s: %s (%d such); encoding again", self.folder, damaged[0], len(damaged))
        for shard in todo:  # from here on, a manifest says that its shard is finished
            (self.folder / manifest_name(shard.name)).unlink(missing_ok=True)
        if len(todo) < len(states):
            print(f"cache: {len(states) - len(todo)} of {len(states)} shards are there already", file=sys.stderr)
        return todo


class StopOnSigterm(Callback):
    """SIGTERM ends the run at once: finished shards are kept, and the one being written is removed.

    Lightning's own handler calls a collective, in which a single rank that was told to stop would wait for good.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, which puts back what was there when the run ends."""

        def stop(signum: int, frame: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if trainer.is_global_zero:
                print("cache: stopped by SIGTERM; resume with the same command", file=sys.stderr)
            if is_child(trainer):
                os.kill(os.getppid(), signal.SIGTERM)
                sys.exit(0)  # any other status has Lightning kill the parent, whose own status counts
            sys.exit(TERMINATED)

        signal.signal(signal.SIGTERM, stop)


def is_child(trainer: Trainer) -> bool:
    """Whether Lightning started this process, from the first one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 and PARENT in os.environ


def end_after(wait: Callable[[], Any]) -> None:
    """End this process at once when ``wait`` returns."""

    def watch() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """End this rank when its parent does; else it would wait half an hour for a group that never comes to be."""

    def wait() -> None:
        while str(os.getppid()) == os.environ[PARENT]:
            time.sleep(1)

    end_after(wait)


def end_worker_with_rank(worker_id: int) -> None:
    """End this worker when the rank it reads for does: of a fork server's workers, that is not the parent."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    end_after(rank.join)


def run_predict(trainer: Trainer, module: LightningModule, data: EncodingDataModule) -> None:
    """Encode what is missing; does nothing if that is nothing.

    Where Lightning starts the other processes, planning comes first: bad input is known before there are any. Where
    torchrun or SLURM started them all, they wait for the plan. The first process returns when all have finished.
    """
    try:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.is_global_zero and not getattr(environment, "creates_processes_externally", False):
            data.prepare_data()
            if not data.todo:
                return
        if is_child(trainer):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which a terminal asks as well, ends this process
            end_with_parent()
        else:
            os.environ[PARENT] = str(os.getpid())
        trainer.predict(module, datamodule=data, return_predictions=False)
        if trainer.is_global_zero:
            wait_for_shards(data.folder, data.todo or [])
    except BaseException:
        end_children(trainer, data.folder)
        raise
    finally:
        os.environ.pop(PARENT, None)  # what this process starts later is no rank of this run


def wait_for_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Until the other ranks have finished theirs: a collective call would have a time limit, and ignore signals."""
    for shard in shards:
        while not (folder / manifest_name(shard.name)).exists():
            time.sleep(0.2)


def end_children(trainer: Trainer, folder: Path) -> None:
    """End the processes that this one started, and remove what they were writing."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
        children, launcher.procs[:] = [*launcher.procs], []  # Lightning's observer would kill this one too
        for child in children:
            child.kill()  # SIGTERM would come back, see StopOnSigterm
            child.wait()
        remove_temporary(folder)
