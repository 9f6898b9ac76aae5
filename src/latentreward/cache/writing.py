"""Run of ``latentreward cache``: plan on one process, encode on all processes, and resume unfinished runs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from latentreward.cache.check import Shard, read_shards, shard_states, table_problems
from latentreward.cache.encoding import EncodeBatches
from latentreward.cache.layout import PLAN, SCHEMAS, CachePlan, CacheSpec, manifest_name, read_plan
from latentreward.cache.plan import check_same, describe_data, write_plan
from latentreward.cache.scan import RowScan, scan_rows
from latentreward.cache.shard_writer import KEPT, remove_temporary
from latentreward.cache.sizing import ImageSettings
from latentreward.cache.space import check_space, need_of
from latentreward.data.loading import WorkerLoader
from latentreward.data.readers import PairReader
from latentreward.errors import InputError
from latentreward.interrupts import TERMINATED, kill_started_ranks
from latentreward.ranks.processes import bind_to_parent, end_after, forget_children, is_child, started_outside
from latentreward.storage.durable import contents, write_errors_named
from latentreward.storage.locks import locked
from latentreward.storage.progress import Progress

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder

logger = logging.getLogger(__name__)


class EncodingDataModule(LightningDataModule):
    """Data module of the batches to encode for unfinished shards, which are split over the ranks.

    Args:
        folder: Folder of the cache.
        reader: Reader of the pairs to cache.
        images: Settings for the sizes of images.
        spec: Settings of the cache, made from ``images`` and the encoders.
        num_workers: Number of processes per rank that read and decode images.
        text: Text encoder, whose tokenizer tells the lengths of prompts; None if prompts are not cached.

    Attributes:
        todo: Shards that have to be encoded; None before :meth:`prepare_data`.
    """

    def __init__(
        self,
        folder: Path,
        reader: PairReader,
        images: ImageSettings,
        spec: CacheSpec,
        num_workers: int,
        text: PromptEncoder | None = None,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.folder, self.reader, self.images = folder, reader, images
        self.spec, self.num_workers, self.text = spec, num_workers, text
        self.todo: list[Shard] | None = None
        self._held = ExitStack()

    @property
    def total(self) -> int:
        """Number of images and prompts in the unfinished shards, over all ranks; finished shards do not count."""
        return sum(shard.count for shard in self.todo or ())

    def prepare_data(self) -> None:
        """Lock the folder, write or check the plan, and find missing or damaged shards; called on one process only.

        Raises:
            InputError: If another run is writing to the folder, the folder cannot be written to, holds other files, was
                begun with other settings or data, or lies on a disk with too little space.
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
                self._restore_tables(plan, data)
            else:
                plan = self._plan(data)
            todo = self._unfinished(plan)
            need = need_of(self.folder, plan, todo, self.text)
            try:
                check_space(self.folder, need)
            except InputError:
                if not begun:  # other settings may fit, and the folder is free for them
                    for name in (PLAN, *SCHEMAS):
                        (self.folder / name).unlink()
                raise
            if todo:
                print(f"cache: to write: {need}", file=sys.stderr)
            self.todo = todo

    def setup(self, stage: str) -> None:
        """Send the list of unfinished shards to all ranks."""
        assert self.trainer is not None
        self.todo = self.trainer.strategy.broadcast(self.todo)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return a loader of this rank's batches, shard by shard."""
        assert self.trainer is not None and self.todo is not None
        mine = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        plan = read_plan(self.folder)
        return WorkerLoader(
            EncodeBatches(self.folder, plan, mine, self.reader, self.images.max_pixels),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.accelerator.is_available(),
            # The process group runs threads, and a fork of a process with threads may hang (seen with Python 3.11).
            multiprocessing_context="forkserver" if self.num_workers and self.trainer.world_size > 1 else None,
            worker_init_fn=end_worker_with_rank,
        )

    def release(self) -> None:
        """Release the lock of the folder."""
        self._held.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": ExitStack()}  # the lock stays with the process that took it

    def _plan(self, data: dict[str, Any]) -> CachePlan:
        rows = scan_rows(RowScan(self.reader, self.images, self.spec.latent_space), self.num_workers)
        with Progress("cache: plan", len(self.reader), "rows") as progress:
            return write_plan(self.folder, self.spec, self.images, data, rows, self.reader, progress.add)

    def _restore_tables(self, plan: CachePlan, data: dict[str, Any]) -> None:
        """Plan again if a table is missing or damaged; raise InputError if the new plan differs from the old plan."""
        if problems := table_problems(self.folder, plan):
            logger.warning("%s: %s; planning again", self.folder, "; ".join(problems))
            if self._plan(data).hash != plan.hash:
                raise InputError(
                    f"{self.folder}: {problems[0]}, and the reader's rows are not those of the plan any more; choose "
                    "another output"
                )

    def _refuse_other_files(self) -> None:
        """Raise InputError if a folder without a plan holds files of others.

        Tables that a killed run wrote before its plan are allowed.
        """
        strangers = [name for name in contents(self.folder) if not name.startswith((PLAN, *SCHEMAS))]
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
        for shard in todo:  # removed, so that a manifest always means a finished shard
            (self.folder / manifest_name(shard.name)).unlink(missing_ok=True)
        if len(todo) < len(states):
            print(f"cache: {len(states) - len(todo)} of {len(states)} shards are there already", file=sys.stderr)
        return todo


class StopOnSigterm(Callback):
    """Callback that ends the run at once on SIGTERM; finished shards are kept, the unfinished shard is removed.

    Lightning's own handler makes a collective call, in which a rank that alone got the signal would wait forever.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install a SIGTERM handler that ends the process at once; Lightning restores its original at the end."""

        def stop(signum: int, frame: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if trainer.is_global_zero:
                print("cache: stopped by SIGTERM; resume with the same command", file=sys.stderr)
            if is_child(trainer.strategy):
                os.kill(os.getppid(), signal.SIGTERM)
                sys.exit(0)  # otherwise Lightning would kill the parent, whose status counts
            sys.exit(TERMINATED)

        signal.signal(signal.SIGTERM, stop)


def end_worker_with_rank(worker_id: int) -> None:
    """Kill this loader worker when its rank ends; with a fork server, the rank is not the worker's parent process."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    end_after(rank.join)


def run_predict(trainer: Trainer, module: LightningModule, data: EncodingDataModule) -> None:
    """Encode all unfinished shards; return at once if there are none.

    If Lightning starts the other processes, planning comes before their start, so that bad input is found early. If
    torchrun or SLURM started all processes, they wait for the plan. The first process returns when all shards are
    finished.
    """
    try:
        if trainer.is_global_zero and not started_outside(trainer.strategy):
            data.prepare_data()
            if not data.todo:
                return
        bind_to_parent(trainer.strategy)
        trainer.predict(module, datamodule=data, return_predictions=False)
        if trainer.is_global_zero:
            wait_for_shards(data.folder, data.todo or [])
    except BaseException:
        end_children(trainer, data.folder)
        raise
    finally:
        forget_children()


def wait_for_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Wait until all ``shards`` have their manifests, that is, until the other ranks have finished.

    The wait polls the folder, because a collective call would have a time limit and ignore signals.
    """
    for shard in shards:
        while not (folder / manifest_name(shard.name)).exists():
            time.sleep(0.2)


def end_children(trainer: Trainer, folder: Path) -> None:
    """Kill the processes that this process started, and remove their unfinished files."""
    if kill_started_ranks(trainer):  # not by SIGTERM, on which a rank would signal this process, see StopOnSigterm
        remove_temporary(folder)
