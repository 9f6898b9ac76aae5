"""A signal ends a run with a checkpoint from which it goes on as if nothing had been."""

import os
import pty
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from latentreward.callbacks import GracefulStop, graceful_stop
from latentreward.callbacks.graceful_stop import silence_lost_terminal
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from latentreward.apps.commands.fit_folder import last_checkpoint
from latentreward.core.interrupts import stop_asked
from tests.callbacks.small_run import assert_same_state, fit, make_trainer
from tests.marks import slow_after


class Send(Callback):
    """Send signals to this process when a hook is called for the n-th time."""

    def __init__(self, hook: str, call: int, *numbers: signal.Signals) -> None:
        self.call, self.numbers = call, numbers
        setattr(self, hook, self.send)

    def send(self, *args: Any) -> None:
        self.call -= 1
        for number in self.numbers if self.call == 0 else ():
            os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def last_of() -> Callable[[Path], ModelCheckpoint]:
    return lambda folder: ModelCheckpoint(folder / "kept", save_last=True)


PLACES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "first batch": ("on_train_batch_start", 1, {}),
    "mid-accumulation": ("on_train_batch_start", 4, {"accumulate_grad_batches": 3}),
    "validation": ("on_validation_batch_start", 4, {"val_check_interval": 2}),
    "validation in mid-accumulation": (
        "on_validation_batch_start",
        2,
        {"val_check_interval": 3, "accumulate_grad_batches": 2},
    ),
    "before a validation": ("on_train_batch_start", 2, {"val_check_interval": 2}),
    "last batch of an epoch": ("on_train_batch_start", 7, {}),
    "validation between epochs": ("on_validation_batch_start", 3, {}),
    "saving": ("on_save_checkpoint", 2, {}),
    "one step an epoch": ("on_train_batch_start", 2, {"limit_train_batches": 3, "accumulate_grad_batches": 3}),
    "sanity check": ("on_validation_batch_start", 1, {"num_sanity_val_steps": 2}),
}


@pytest.mark.parametrize("place", slow_after(2, PLACES))
def test_sigterm_saves_and_the_resumed_run_ends_with_the_same_weights(place: str, tmp_path: Path, last_of) -> None:
    hook, call, options = PLACES[place]
    whole = make_trainer(tmp_path / "whole", [last_of(tmp_path / "whole")], **options)
    module = fit(whole)
    stopped = make_trainer(
        tmp_path, [last_of(tmp_path), Send(hook, call, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)], **options
    )
    with pytest.raises(SIGTERMException):
        fit(stopped)
    first = stopped.lightning_module
    resumed = make_trainer(tmp_path, [last_of(tmp_path)], **options)
    checkpoint = last_checkpoint(resumed)
    assert checkpoint == tmp_path / "kept" / "last.ckpt"
    second = fit(resumed, checkpoint)
    assert_same_state(whole, resumed)
    assert first.seen + second.seen == module.seen
    assert len(first.seen) < len(module.seen)
    begun = first.validated[2:] if options.get("num_sanity_val_steps") else first.validated
    assert begun + second.validated == module.validated[2 if options.get("num_sanity_val_steps") else 0 :]


def test_a_finished_run_is_not_stopped(tmp_path: Path, last_of) -> None:
    stop = GracefulStop()
    fit(make_trainer(tmp_path, [last_of(tmp_path), Send("on_train_batch_start", 14, signal.SIGTERM)], stop))
    fit(make_trainer(tmp_path, stop=stop))  # nor is the next one by that signal


@pytest.mark.parametrize("keeper", ["none", "best", "link", "weights", "default"])
def test_the_place_is_one_that_last_finds(keeper: str, tmp_path: Path) -> None:
    folder = tmp_path / ("kept" if keeper in ("best", "link", "weights") else "checkpoints")
    options = {"best": {"monitor": "val/loss"}, "link": {"save_last": "link"}, "weights": {"save_weights_only": True}}

    def trainer(*others: Callback) -> Trainer:
        keepers = [ModelCheckpoint(folder, **options[keeper])] if keeper in options else []
        checkpointing = {"enable_checkpointing": keeper != "none"}
        return make_trainer(tmp_path, [*keepers, *others], **checkpointing)

    with pytest.raises(SIGTERMException):
        fit(trainer(Send("on_train_batch_start", 9, signal.SIGTERM)))
    resumed = trainer()
    assert last_checkpoint(resumed) == folder / "last.ckpt"
    assert not (folder / "last.ckpt").is_symlink()
    again = fit(resumed, folder / "last.ckpt")
    assert len(again.seen) == 5
    with pytest.raises(SIGTERMException):  # a run that does not go on from it must not write over it
        fit(trainer(Send("on_train_batch_start", 2, signal.SIGTERM)))
    names = sorted(path.name for path in folder.glob("last*.ckpt"))
    assert names == (["last.ckpt"] if keeper == "none" else ["last-v1.ckpt", "last.ckpt"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_saves_once_and_gives_the_status(number: signal.Signals, status: int, tmp_path: Path, last_of) -> None:
    whole = make_trainer(tmp_path / "whole", [last_of(tmp_path / "whole")])
    fit(whole)
    with pytest.raises(SIGTERMException) as stop:
        fit(make_trainer(tmp_path, [last_of(tmp_path), Send("on_train_batch_start", 3, number)]))
    assert stop.value.code == status
    assert not stop_asked.is_set()  # else a notebook's next wait for a reward server would end at once
    resumed = make_trainer(tmp_path, [last_of(tmp_path)])
    assert len(fit(resumed, last_checkpoint(resumed)).seen) == 11
    assert_same_state(whole, resumed)


@pytest.mark.parametrize("through_lightning", [True, False])
def test_a_rank_outlives_only_the_process_that_started_it_through_lightning(
    through_lightning: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr(graceful_stop.atexit, "register", lambda *call: at_exit.append(call))
    monkeypatch.setenv(graceful_stop.LAUNCHER, str(os.getppid()))
    with monkeypatch.context() as patch:
        if through_lightning:  # which gives its ranks this variable; where it has none to start, it stays the default's
            patch.setenv("LOCAL_RANK", "0")
        trainer = make_trainer(tmp_path, [Send("on_train_batch_start", 1, signal.SIGTERM)])
    with pytest.raises(SIGTERMException):
        fit(trainer)
    assert ((graceful_stop.outlive, os.getppid()) in at_exit) == through_lightning


@pytest.mark.parametrize(("number", "got"), [(signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGINT, False)])
def test_ranks_that_lightning_started_get_the_signal(
    number: signal.Signals, got: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for SIGINT, which a terminal sends to all of them: a second one would end them without a checkpoint."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that Lightning neither starts nor watches any of its own
    trainer = make_trainer(tmp_path, [Send("on_train_batch_start", 1, number)])
    launcher = trainer.strategy._launcher = _SubprocessScriptLauncher(LightningEnvironment(), 1, 1)
    with subprocess.Popen(["sleep", "600"]) as rank:
        launcher.procs.append(rank)
        try:
            with pytest.raises(SIGTERMException):
                fit(trainer)
            with nullcontext() if got else pytest.raises(subprocess.TimeoutExpired):
                assert rank.wait(60 if got else 0.5) == -number
        finally:
            rank.kill()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(make_trainer(tmp_path, [Send("on_train_batch_start", 1, signal.SIGINT, signal.SIGINT)]))
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(fit(make_trainer(tmp_path, [Send("on_train_batch_start", 3, signal.SIGHUP)])).seen) == 14
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_does_not_end_the_run_by_what_is_printed(tmp_path: Path) -> None:
    """A progress bar, say, before the checkpoint is written."""
    process, terminal = pty.fork()
    if process == 0:
        status = 1
        try:
            signal.signal(signal.SIGHUP, lambda *_: silence_lost_terminal())
            (tmp_path / "ready").touch()
            signal.pause()
            os.write(1, b"10 %")
            os.write(2, b"20 %")
            status = 0
        finally:
            os._exit(status)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == 0


class KillWorker(Callback):
    """Kill a worker of a loader when a hook is called for the n-th time."""

    def __init__(self, hook: str, call: int) -> None:
        self.call = call
        setattr(self, hook, self.kill)

    def kill(self, trainer: Trainer, *args: Any) -> None:
        self.call -= 1
        if self.call == 0:
            loader = trainer.val_dataloaders if trainer.validating else trainer.train_dataloader
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(0.3)  # its end is signalled here, in the middle of a step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "call", "options"),
    [
        ("on_train_batch_start", 2, {"accumulate_grad_batches": 3}),
        ("on_validation_batch_start", 2, {"val_check_interval": 3}),
    ],
)
def test_a_killed_worker_ends_the_run_with_a_checkpoint(
    hook: str, call: int, options: dict[str, Any], tmp_path: Path, last_of, caplog: pytest.LogCaptureFixture
) -> None:
    list(DataLoader([0], num_workers=1))  # type: ignore[arg-type]  # torch's own handler of dead workers stays behind
    whole = make_trainer(tmp_path / "whole", [last_of(tmp_path / "whole")], **options)
    module = fit(whole)
    stopped = make_trainer(tmp_path, [last_of(tmp_path), KillWorker(hook, call)], **options)
    with pytest.raises(SIGTERMException) as stop:
        fit(stopped, workers=2)
    assert stop.value.code == 2
    (line,) = [record.getMessage() for record in caplog.records if "stopped as" in record.getMessage()]
    assert "worker process was killed (perhaps memory ran out: set num_workers lower, or give the job more" in line
    path = tmp_path / "kept" / "last.ckpt"
    assert f"saved to {path}; go on with --ckpt_path {path}" in line
    resumed = make_trainer(tmp_path, [last_of(tmp_path)], **options)
    second = fit(resumed, last_checkpoint(resumed))
    assert_same_state(whole, resumed)
    assert stopped.lightning_module.seen + second.seen == module.seen


class Environment(Callback):
    """Notes what Lightning believes to run on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.name = type(trainer._accelerator_connector.cluster_environment).__name__


@pytest.mark.parametrize(
    ("variables", "job"),
    [({}, "4711"), ({"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}, "4700_11")],
)
def test_slurm_requeue(variables, job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_of) -> None:
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    slurm = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**{f"SLURM_{name}": value for name, value in slurm.items()}, **variables}.items():
        monkeypatch.setenv(name, value)
    where = Environment()
    with pytest.raises(SIGTERMException):
        fit(make_trainer(tmp_path, [last_of(tmp_path), where, Send("on_train_batch_start", 3, signal.SIGUSR1)]))
    assert where.name == "SLURMEnvironment"
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    assert not list(tmp_path.glob("**/hpc_ckpt*"))
    resumed = make_trainer(tmp_path, [last_of(tmp_path)])
    assert len(fit(resumed, last_checkpoint(resumed)).seen) == 11
    (tmp_path / "asked").unlink()
    with pytest.raises(SIGTERMException):
        fit(make_trainer(tmp_path / "b", [Send("on_train_batch_start", 3, signal.SIGTERM)]))
    assert not (tmp_path / "asked").exists()
