"""Callback that saves a checkpoint before a signal ends the run."""

import atexit
import logging
import os
import re
import signal
import subprocess
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException

from latentreward.core.errors import check_at_least_one, first_line
from latentreward.core.interrupts import INTERRUPTED, TERMINATED, stop_asked
from latentreward.data.loading import WORKER_REMEDY, WorkerLoader
from latentreward.reward import RemoteError

logger = logging.getLogger(__name__)

LAUNCHER = "LATENTREWARD_LAUNCHER"
"""Environment variable with the id of the process that started this rank through Lightning."""
LAUNCHER_WAIT_S = 30.0  # longest time, in seconds, that :func:`outlive` waits for that process to exit


class StopRequest(IntEnum):
    """Reason to stop a run: a signal, or a killed worker process of a loader. Of several, the largest value counts."""

    NONE = 0
    INTERRUPT = 1
    HANGUP = 2
    TERMINATE = 3
    REQUEUE = 4
    WORKER_DIED = 5


STATUSES = {
    StopRequest.INTERRUPT: INTERRUPTED,
    StopRequest.HANGUP: 129,
    StopRequest.TERMINATE: TERMINATED,
    StopRequest.REQUEUE: TERMINATED,
    StopRequest.WORKER_DIED: 2,
}
"""Exit status of the run for each reason to stop."""
SILENT_RANK = re.compile(r"timed out|connection (closed|reset) by peer", re.IGNORECASE)
"""Pattern of PyTorch's error messages when another rank has exited or does not answer."""


class GracefulStop(Callback):
    """Callback that saves one checkpoint and ends all processes when any process gets a signal to stop.

    - SIGTERM: save, exit with status 143. A second SIGTERM changes nothing.
    - SIGHUP (the terminal was closed): save, exit with status 129. Under nohup, SIGHUP stays ignored.
    - The requeue signal of a SLURM job (SIGUSR1): save, ``scontrol requeue``, exit with status 143.
    - SIGINT (Ctrl-C): save, exit with status 130. A second Ctrl-C ends the run at once, without a checkpoint.
    - A killed worker process of a loader: save, exit with status 2. Until the run stops, the training process loads
      the batches itself.
    - A reward server that fails (``RemoteError``): save at once, in the middle of a rollout, and raise the error.

    ``fit`` raises ``SIGTERMException``, a ``SystemExit`` with that status.

    The processes agree on a stop at the end of a batch. In the middle of gradient accumulation they first train up to
    the optimiser step; at the end of an epoch, up to the first optimiser step of the next epoch. A running validation
    is finished before the run stops, because half a validation cannot be resumed. The checkpoint is the ``last.ckpt``
    of the run's ``ModelCheckpoint``, or ``checkpoints/last.ckpt`` under ``default_root_dir`` if the run has none;
    ``--ckpt_path last`` finds either. The command line adds this callback to every fit.

    A wait for a reward server ends at once, in the middle of a rollout. Ranks that Lightning has started get the signal
    of the process that started them, but for SIGINT, which a terminal sends to all of them. If another rank has exited
    or does not answer, ``fit`` raises TimeoutError, and ranks that this process started are killed.

    Args:
        every_n_batches: Check for signals after every n-th batch; each check is a small exchange between processes.

    Note:
        This callback replaces Lightning's signal handlers. Those broadcast from inside the handler, which hangs unless
        all processes get the signal at the same point of the code; they exit with status 0; and under SLURM they save
        to a file that ``--ckpt_path last`` does not find.

    Example:
        ``--graceful_stop.every_n_batches=10`` on the command line; ``Trainer(callbacks=[GracefulStop()])`` in Python.
    """

    def __init__(self, every_n_batches: int = 1) -> None:
        check_at_least_one(every_n_batches=every_n_batches)
        if "LOCAL_RANK" not in os.environ:  # set by Lightning for the ranks that it starts, and by torchrun
            os.environ[LAUNCHER] = str(os.getpid())
        self.every_n_batches = every_n_batches
        self._request = self._agreed = StopRequest.NONE
        self._requests: dict[int, StopRequest] = {}
        self._loaders: list[WorkerLoader] = []
        self._launcher: Any = None
        self._training = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Place this callback after those that change weights or checkpoint; forget a request to an earlier run."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = sorted(callbacks, key=lambda it: (isinstance(it, Checkpoint), it is self))  # type: ignore[attr-defined]
        self._training, self._request, self._agreed = False, StopRequest.NONE, StopRequest.NONE
        stop_asked.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a request to stop, which was that of this run."""
        stop_asked.clear()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the signal handlers that Lightning has just set; Lightning's teardown restores the original ones."""
        self._take_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, for runs without a sanity check, and find the loaders with workers."""
        self._take_signals(trainer)
        self._training = True  # the other callbacks have restored their states by now

    def _take_signals(self, trainer: Trainer) -> None:
        self._launcher = trainer.strategy.launcher
        self._requests = {signal.SIGTERM: StopRequest.TERMINATE, signal.SIGINT: StopRequest.INTERRUPT}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._requests[signal.SIGHUP] = StopRequest.HANGUP
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requests[environment.requeue_signal] = StopRequest.REQUEUE
        try:
            for number in self._requests:
                signal.signal(number, self._note)
        except ValueError:  # not the main thread, which alone may set handlers
            logger.warning("fit runs outside the main thread: SIGTERM will end it without a checkpoint")
        loaders = CombinedLoader([trainer.train_dataloader, trainer.val_dataloaders]).flattened
        self._loaders = [loader for loader in loaders if isinstance(loader, WorkerLoader)]
        for loader in self._loaders:
            loader.goes_on = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exchange requests to stop between processes; stop if there is one and the batch ended an optimiser step."""
        if (batch_idx + 1) % self.every_n_batches == 0:
            self._agree(trainer)
        self._stop_if_resumable(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange requests to stop after a validation; stop if there is one and the epoch is not at its end."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._agree(trainer)
            self._stop_if_resumable(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange requests and stop at the end of an epoch that is too short to stop after one of its batches."""
        if trainer.num_training_batches <= max(trainer.accumulate_grad_batches, self.every_n_batches):
            self._agree(trainer)
            if self._agreed:
                self._stop(trainer)

    def saves_after(self, exception: BaseException) -> bool:
        """Tell whether :meth:`on_exception` saves a checkpoint: after a failure of a reward server in training."""
        return isinstance(exception, RemoteError) and self._training

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save after a failure of a reward server; raise a one-line error if another rank has exited or is silent.

        In the latter case ranks that this process started are killed.
        """
        stop_asked.clear()  # Lightning calls no teardown of callbacks now; a later run or wait in this process goes on
        if self.saves_after(exception):
            assert isinstance(exception, RemoteError)
            self._agree(trainer)
            if self._agreed:  # a signal has ended the wait for the server
                self._stop(trainer)
            path = checkpoint_path(trainer)
            trainer.save_checkpoint(path, weights_only=False)  # with None Lightning prints a line
            exception.resume = f"saved optimiser step {trainer.global_step}; go on with --ckpt_path {path}"
        if isinstance(exception, RuntimeError) and trainer.world_size > 1 and SILENT_RANK.search(str(exception)):
            kill_started_ranks(trainer.strategy.launcher)
            limit = getattr(trainer.strategy, "_timeout", None)
            raise TimeoutError(
                f"another rank is gone, or has not answered rank {trainer.global_rank} for {limit} (--rank_timeout_s): "
                f"{first_line(exception)}; go on with --ckpt_path last"
            ) from exception

    def _note(self, number: int, frame: FrameType | None) -> None:
        request = self._requests[number]
        if request == StopRequest.HANGUP:
            silence_lost_terminal()
        if request == StopRequest.INTERRUPT and self._request == StopRequest.INTERRUPT:
            raise KeyboardInterrupt
        self._request = max(self._request, request)
        stop_asked.set()
        if request != StopRequest.INTERRUPT and self._launcher is not None:  # another rank may wait for its server
            self._launcher.kill(number)

    def _agree(self, trainer: Trainer) -> None:
        if any(loader.worker_died for loader in self._loaders):
            self._request = StopRequest.WORKER_DIED
        request = torch.tensor(int(self._request), device=trainer.strategy.root_device)
        self._agreed = StopRequest(int(trainer.strategy.reduce(request, reduce_op="max")))

    def _stop_if_resumable(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop
        if self._agreed and not loop._should_accumulate() and not loop.epoch_loop.batch_progress.is_last_batch:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        path = checkpoint_path(trainer)
        trainer.save_checkpoint(path, weights_only=False)  # with None Lightning prints a line
        if trainer.is_global_zero:
            where = f"optimiser step {trainer.global_step}, saved to {path}"
            why = f"by a signal ({self._agreed.name.lower()})"
            if self._agreed == StopRequest.WORKER_DIED:
                why = f"as a data loader's worker process was killed ({WORKER_REMEDY})"
            logger.warning("stopped %s at %s; go on with --ckpt_path %s", why, where, path)
            if self._agreed == StopRequest.REQUEUE:
                requeue()
        if os.environ.get(LAUNCHER) == str(os.getppid()):
            atexit.register(outlive, os.getppid())
        raise SIGTERMException(STATUSES[self._agreed])


def checkpoint_path(trainer: Trainer) -> Path:
    """Return the checkpoint's path, equal on all ranks: ``--ckpt_path last`` finds it, and no earlier run wrote it.

    The path is also set in the run's ``ModelCheckpoint``, which then writes its next ``last.ckpt`` over this file.
    """
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if not keepers:
        return fallback_folder(trainer) / "last.ckpt"
    keeper = next((keeper for keeper in keepers if keeper.save_last), keepers[0])
    if not keeper.last_model_path:
        stem, version = ModelCheckpoint.CHECKPOINT_NAME_LAST, 0
        path = f"{keeper.dirpath}/{stem}{keeper.FILE_EXTENSION}"
        while keeper.file_exists(path, trainer):
            version += 1
            path = f"{keeper.dirpath}/{stem}-v{version}{keeper.FILE_EXTENSION}"
        keeper.last_model_path = path
    return Path(keeper.last_model_path)


def fallback_folder(trainer: Trainer) -> Path:
    """Return the checkpoint's folder in a run without any ``ModelCheckpoint``."""
    return Path(trainer.default_root_dir) / "checkpoints"


def kill_started_ranks(launcher: Any) -> None:
    """Kill the ranks that this process started through Lightning, whose observer would kill this process too."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        ranks, launcher.procs[:] = [*launcher.procs], []  # the observer shares the list
        for rank in ranks:
            rank.kill()
            rank.wait()


def requeue() -> None:
    """Ask SLURM to requeue this job, and log a warning if that fails."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = f"status {done.returncode}: {done.stderr.strip()}" if done.returncode else ""
    except OSError as error:  # no scontrol in PATH
        problem = str(error)
    if problem:
        logger.warning("scontrol requeue %s failed (%s)", job, problem)


def silence_lost_terminal() -> None:
    """Redirect output to a closed terminal to the null device, where a progress bar raises no OSError."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def outlive(parent: int) -> None:
    """Wait until the process that started this rank exits: Lightning kills that process if this rank exits first."""
    deadline = time.monotonic() + LAUNCHER_WAIT_S
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
