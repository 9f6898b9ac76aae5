"""Work that several processes of one command share: the first one splits it into shards, and all do shards."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import torch

from latentreward.core.errors import InputError, first_line, one_line
from latentreward.core.interrupts import Terminated, take_started_ranks
from latentreward.core.ranks.processes import bind_to_parent, forget_children, is_child, trainer_errors
from latentreward.core.ranks.settings import TrainerSettings
from latentreward.core.running import find_device
from latentreward.core.storage.durable import discard, refuse_link, remove_temporary
from latentreward.core.storage.locks import locked
from latentreward.core.storage.shards import ShardFolder, ShardList, left_over

if TYPE_CHECKING:
    from subprocess import Popen
    from types import TracebackType

    from lightning.fabric import Fabric

SHARDS = ".shards"
"""Name of the folder of shards in a folder of output."""

Shard = Any
"""What JSON can hold; for example, a list of pictures to sample."""
Result = Any
"""What JSON can hold."""
Task = Callable[[Sequence[Shard]], Callable[[Shard], Result]]
"""Function that loads what the work on some shards needs, and returns the function that does one shard."""


class SharedWork:
    """Work of one command that is shared by several processes; a context manager around the work.

    Every process calls :meth:`join`, in which all but the first one do shards. The first process then checks the input,
    holds the lock of the output, calls :meth:`run` for each list of shards, and writes the output. If a process is
    killed, another one does its unfinished shard again. An error in one process ends all. Without ``trainer``, this
    process does all shards.

    Args:
        trainer: Settings of the processes; None for one process.
        device: Name of the device of a single process; with ``trainer``, ``auto``.
        folder: Folder for shards and results, removed at the end; on a file system that all processes see.

    Attributes:
        first: Whether this process is the first one.
        size: Number of processes on all machines.

    Raises:
        InputError: If the settings fit neither this machine nor each other, or the folder is a link.
    """

    def __init__(self, trainer: TrainerSettings | None, device: str, folder: Path) -> None:
        refuse_link(folder)
        self.folder, self._name = folder, device
        self.first, self.size = True, 1
        self._fabric: Fabric | None = None
        self._tasks: dict[str, Task] = {}
        self._settings: Mapping[str, Any] = {}
        self._shared: ShardFolder | None = None
        self._run_name: str | None = None
        self._launched = self._outside = False
        self._started: list[Popen[bytes]] = []
        self._output: Path | None = None
        self._ran = False
        self._threads = torch.get_num_threads()
        if trainer is None:
            size = os.environ.get("WORLD_SIZE", "1")
            if "TORCHELASTIC_RUN_ID" in os.environ and size != "1":  # each process would do all of the work
                raise InputError(
                    f"torchrun has started {size} processes; set trainer.devices and trainer.num_nodes for them"
                )
            return
        if device != "auto":
            raise InputError(
                f"device is {device!r}, and trainer is set too; leave device out, and choose by trainer.accelerator "
                "and trainer.devices"
            )
        self._fabric = _fabric(trainer)
        self.first, self.size = self._fabric.global_rank == 0, self._fabric.world_size
        # Whether something else than Lightning, such as torchrun or SLURM, has started all processes.
        environment = self._fabric.strategy.cluster_environment  # type: ignore[attr-defined]  # as DDPStrategy has it
        self._outside = environment.creates_processes_externally

    @cached_property
    def device(self) -> torch.device:
        """Device of this process; raises InputError if this machine does not have it."""
        return find_device(self._name) if self._fabric is None else self._fabric.device

    def __enter__(self) -> Self:
        if self._fabric is not None:
            self._set_device()
            if not self.first or (self.size > 1 and self._outside):
                self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from subprocess import TimeoutExpired

        try:
            if self.first:
                self._end(error)
            elif error is not None:
                self._tell(error)
        finally:
            for child in self._started:
                if error is not None:
                    child.kill()
                try:
                    child.wait(30)  # seconds; it should have ended with the work
                except TimeoutExpired:
                    child.kill()
                    child.wait()
            if self._shared is not None:
                self._shared.leave()
            if self._fabric is not None:
                forget_children()
                torch.set_num_threads(self._threads)
            if error is not None and self._ran and self._output is not None and self._output.is_dir():
                # A killed process leaves the file that it was writing, at its full size.
                with suppress(InputError, OSError), locked(self._output, "output"):
                    remove_temporary(self._output)

    def join(self, tasks: Mapping[str, Task], settings: Mapping[str, Any], output: Path | None = None) -> bool:
        """Set the tasks of this process, and compare its settings with those of the first process.

        Every other process than the first one then does shards, until the first process ends the work.

        Args:
            tasks: Function of each task by its name. It is called when this process begins its first shard of a list.
            settings: Settings on which the results depend, and fingerprints of files; JSON must be able to hold them.
            output: Folder that the tasks write to. After an error, unfinished files of killed processes are removed
                there, unless another command holds its lock by then.

        Returns:
            Whether this is the first process, which goes on; any other one has nothing left to do.

        Raises:
            InputError: On another process than the first one, if its settings or files differ from those of the first.
        """
        first, own = self._settings, json.loads(json.dumps(settings))
        self._tasks, self._settings, self._output = {**tasks}, own, output
        if self._shared is not None and (names := [one for one in {**first, **own} if first.get(one) != own.get(one)]):
            raise InputError(
                f"{', '.join(names)}: not as in the first process; give all processes the same command, and do not "
                "change its files until the end"
            )
        if self.first:
            return True
        if self._run_name is None:
            sys.exit(2)  # the first process prints the error
        while self._shared is not None and (todo := self._shared.next(self._check)) is not None:
            self._do_shards(todo, lambda shard: None)
        return False

    def run(
        self,
        task: str,
        shards: Sequence[Shard],
        keep: Callable[[Sequence[tuple[Shard, Result]]], None],
        done: Callable[[Shard], None] = lambda shard: None,
    ) -> None:
        """Do all shards of a list by all processes, and return when they are done; for the first process.

        Args:
            task: Name of the task.
            shards: Shards, each given to the task's function.
            keep: Function that takes shards with their results: each shard by itself if there is one process, otherwise
                all at once, also after an error.
            done: Function that takes each shard that this process has done, for a display of progress.
        """
        if not shards:
            return
        self._ran = True
        if self.size == 1:
            work = self._tasks[task](shards)
            for shard in shards:
                keep([(shard, work(shard))])
                done(shard)
            return
        if self._shared is None:
            self._start()
        assert self._shared is not None
        todo = self._shared.plan(task, shards)
        try:
            self._do_shards(todo, done)
        finally:
            keep(todo.results())

    def left_over(self, name: str) -> list[tuple[Shard, Result]]:
        """List the shards of a task that a killed run finished, each with its result."""
        return left_over(self.folder, name)

    def _do_shards(self, todo: ShardList, done: Callable[[Shard], None]) -> None:
        """Do shards of a list until none is left, beginning at a place of this process's own."""
        rank = 0 if self._fabric is None else self._fabric.global_rank
        work = None
        claims = todo.take(len(todo.shards) * rank // self.size, self._check)
        try:
            for number in claims:
                if work is None:
                    work = self._tasks[todo.task](todo.shards)
                todo.finish(number, work(todo.shards[number]))
                done(todo.shards[number])
        except Exception as error:
            self._note(error)  # while the shard is still claimed: another process would do it, and go on
            raise

    def _start(self) -> None:
        """Start the other processes if Lightning does so, and agree on the folder of the run."""
        assert self._fabric is not None
        if not self._launched:
            bind_to_parent(self._fabric.strategy)
            with trainer_errors():
                self._fabric.launch()
            self._launched = True
            self._set_device()  # Lightning has set the number of threads
            self._started = take_started_ranks(self._fabric.strategy)
            if self.first and self._outside:
                return  # the input is to be checked first
        self._agree(uuid4().hex)

    def _agree(self, run: str | None) -> None:
        """Send the first process's run and settings to all processes; the others' own values are not used.

        The name of the run's folder is an empty text if nothing is to be done, and None after an error.

        Raises:
            InputError: If a process has ended already, or cannot use the folder.
            SystemExit: In another process than the first one, if a process cannot use the folder.
        """
        assert self._fabric is not None
        if self.first and run:
            for earlier in self.folder.glob("*"):  # processes that a killed run may have left end by this
                discard(earlier)
            self._shared = ShardFolder(self.folder / run, 0)
        try:
            self._run_name, self._settings = self._fabric.broadcast((run, self._settings))
            with suppress(OSError):  # without an answer, the others would wait for hours
                if self._run_name and not self.first and (self.folder / self._run_name).is_dir():
                    self._shared = ShardFolder(self.folder / self._run_name, self._fabric.global_rank)
            # All join before one works: the first could end, and remove the folder, before another has looked for it.
            seen = not self._run_name or self._shared is not None
            seen = self._fabric.strategy.reduce_boolean_decision(seen)
        except RuntimeError as error:
            raise InputError(f"another process ended before the work began ({first_line(error)})") from error
        if not seen and not self.first:
            sys.exit(2)  # the first process tells why
        if not seen:
            raise InputError(
                f"{self.folder}: not all processes can use it; put the output on a file system that all machines share"
            )

    def _set_device(self) -> None:
        """Take the device, and on a CPU one thread: their number changes the last bits of results."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        elif self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)

    def _check(self) -> None:
        """End this process if another one has failed; tell of killed ones.

        Raises:
            InputError: The error of another process that has not printed it; or if the first process is gone.
            SystemExit: If another process has printed its error, or has ended the run.
        """
        assert self._shared is not None
        if (noted := self._shared.error()) is not None:
            message, printed = noted
            if self.first and not printed:
                raise InputError(message)
            sys.exit(2)
        if not self.first and self._shared.ended():
            sys.exit(0)
        if not self.first and self._shared.lacks_first():
            raise InputError(
                "the first process has ended before this one; what is done is kept: the same command goes on there"
            )
        for child in [child for child in self._started if child.poll() is not None]:
            self._started.remove(child)
            end = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
            print(f"process {child.pid} has ended ({end}): the others do its part", file=sys.stderr)

    def _tell(self, error: BaseException) -> None:
        """Leave a note of this process's error for the others, and end in silence if the first one prints it.

        Raises:
            SystemExit: In a process that the first one of the machine has started.
        """
        assert self._fabric is not None
        child = is_child(self._fabric.strategy)
        if isinstance(error, SystemExit) or self._shared is None:
            return
        if isinstance(error, KeyboardInterrupt):
            if child and isinstance(error, Terminated):
                os.kill(os.getppid(), signal.SIGTERM)  # which ends all
                sys.exit(0)
            self._shared.note_error("a process was stopped", printed=True)
            return
        self._note(error)
        if child:
            if not isinstance(error, InputError | OSError):
                traceback.print_exception(error)
            sys.exit(2)

    def _note(self, error: BaseException) -> None:
        """Leave a note of this process's error, unless there is one; a child of the first process prints nothing."""
        if self._shared is None or self._fabric is None:
            return
        line = one_line(error) if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {error}"
        child = not self.first and is_child(self._fabric.strategy)
        self._shared.note_error(f"{line} (process {self._fabric.global_rank})", printed=not child)

    def _end(self, error: BaseException | None) -> None:
        """Tell the others that the work is done, or that it has failed, and remove the folder if it is done."""
        if self._launched and self._shared is None:  # the others wait to hear whether there is anything to do
            with suppress(InputError):
                self._agree("" if error is None else None)
        if error is not None:
            self._note(error)
            return
        if self._shared is None:
            discard(self.folder)
            return
        self._shared.end()
        self._shared.wait_for_others(self.size)
        discard(self._shared.folder)
        with suppress(OSError):  # the lock of the output is free by now, so that another run may have begun
            self.folder.rmdir()


def _fabric(trainer: TrainerSettings) -> Fabric:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    if trainer.strategy not in ("auto", "ddp"):
        raise InputError(f"trainer.strategy is {trainer.strategy!r}; each process holds a whole model: leave it out")
    if not re.fullmatch(r"auto|-1|\d+(,\d*)*|\[\d+(, ?\d+)*\]", str(trainer.devices)):
        raise InputError(f"trainer.devices is {trainer.devices!r}; give a number, a list of device numbers, or auto")
    with trainer_errors():
        return Fabric(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            # So long may ranks of torchrun or SLURM wait until the first one has checked its input.
            strategy=DDPStrategy(timeout=timedelta(hours=6)),
        )
