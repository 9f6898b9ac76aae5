"""Work that several processes of one command share: the first one splits it into shards, and all do shards."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import torch

from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.core.errors import LIGHTNING_NO_GPU, NO_GPU, InputError, first_line, one_line
from latentreward.core.interrupts import Terminated, take_started_ranks
from latentreward.core.running import find_device
from latentreward.core.storage.durable import (
    claimed,
    discard,
    has_locks,
    is_held,
    locked,
    refuse_link,
    remove_temporary,
    write_file,
)
from latentreward.core.storage.json_files import read_config

if TYPE_CHECKING:
    from subprocess import Popen
    from types import TracebackType

    from lightning.fabric import Fabric
    from lightning.fabric.strategies import Strategy


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the processes that do the work, as for the trainer of ``latentreward fit``.

    Args:
        accelerator: ``cpu``, ``gpu`` or ``auto``.
        devices: Number of devices per node, or a list of device indices; ``auto`` takes all. With ``cpu``, the number
            of processes, each with one thread.
        num_nodes: Number of nodes; start the processes by torchrun or SLURM.
        strategy: ``auto``, or ``ddp`` for several processes.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"


PARENT = "LATENTREWARD_PARENT"
"""Environment variable with the ID of the process that started the ranks, valid even after that process has ended."""


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn what Lightning says about wrong settings of the processes into an InputError."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except InputError:
        raise
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        problem = first_line(error)
        raise InputError(f"trainer: {NO_GPU if problem.startswith(LIGHTNING_NO_GPU) else problem}") from error


def is_child(strategy: Strategy) -> bool:
    """Tell whether this process is a rank that Lightning started from the first process of the machine."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    environment, own = getattr(strategy, "cluster_environment", None), str(os.getpid())
    ranked = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
    return ranked and os.environ.get(PARENT, own) != own  # its own ID is that of a rank started by something else


def bind_to_parent(strategy: Strategy) -> None:
    """Let this process end with its parent if it is a child; otherwise let processes started later know their parent.

    A child ignores Ctrl-C, which the parent gets too, and which ends the children.
    """
    if is_child(strategy):
        parent = os.environ[PARENT]

        def wait_for_end() -> None:
            while str(os.getppid()) == parent:
                time.sleep(1)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_after(wait_for_end)  # else it would wait half an hour for the process group
    else:
        os.environ[PARENT] = str(os.getpid())


def forget_children() -> None:
    """Let processes started from now on be no ranks of this command."""
    os.environ.pop(PARENT, None)


def end_after(wait: Callable[[], Any]) -> None:
    """Start a thread that kills this process when ``wait`` returns."""

    def watch() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


PLAN, END, ERROR = "plan.json", "end", "error.json"
EDIT = "\0edit"
"""Name by which a plan holds the text of a prompt that carries pictures; no scorer or setting has it."""
POLL_S = 0.2  # seconds between two looks at the folder while a process waits for others
LEAVE_S = 5.0  # most seconds that the first process waits until the others have left the folder
AGAIN = "delete it, and its shard is done again"
KEPT = "what is done is kept: free some space and run the same command again"


class ShardFolder:
    """Folder of one run, in which its processes find plans, claim shards, and leave results and notes.

    Args:
        folder: Folder, on a file system that all processes see.
        rank: Number of this process, from 0; process 0 makes the folder.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self._lists = folder, rank, 0
        self._present = ExitStack()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        # The first process is there by now. On some network file systems, each machine has locks of its own.
        self._locks = has_locks(folder) and (rank == 0 or self._runs(0))
        self._present.enter_context(claimed(self._presence(rank)))

    def plan(self, name: str, shards: Sequence[Any]) -> ShardList:
        """Write the plan of the task's next list of shards, values of JSON and prompts, on the first process."""
        todo = ShardList(self.folder / str(self._lists), name, list(shards))
        pictures: dict[ImageRef, int] = {}
        plan = {"task": name, "shards": _packed(todo.shards, pictures), "pictures": [*map(_packed_image, pictures)]}
        write_file(todo.folder / PLAN, json.dumps(plan), KEPT)
        self._lists += 1
        return todo

    def next(self, check: Callable[[], None]) -> ShardList | None:
        """Wait for the plan of the next list of shards; None if the first process has ended the run.

        ``check`` is called while waiting, and may raise.
        """
        folder = self.folder / str(self._lists)
        while not (folder / PLAN).exists():
            if self.ended():
                return None
            check()
            time.sleep(POLL_S)
        self._lists += 1
        return read_list(folder)

    def ended(self) -> bool:
        """Tell whether the first process has ended the run, or another run has taken its place."""
        return (self.folder / END).exists() or not self.folder.exists()

    def end(self) -> None:
        """Tell the other processes that nothing is left to do."""
        write_file(self.folder / END, "")

    def lacks_first(self) -> bool:
        """Tell whether the first process has ended without a word, for example by a kill."""
        return self._locks and not self._runs(0) and not self.ended()

    def leave(self) -> None:
        """Give up the presence of this process."""
        self._present.close()

    def wait_for_others(self, count: int) -> None:
        """Wait until processes 1 to ``count - 1`` have left, but at most :data:`LEAVE_S` seconds."""
        until = time.monotonic() + LEAVE_S
        while self._locks and time.monotonic() < until and any(self._runs(rank) for rank in range(1, count)):
            time.sleep(POLL_S / 10)

    def note_error(self, message: str, printed: bool) -> None:
        """Leave a note of an error, which stops the other processes; an earlier note stays.

        ``printed`` tells whether this process prints the ``message``, one line for the user, itself.
        """
        if self.folder.exists() and not (self.folder / ERROR).exists():
            write_file(self.folder / ERROR, json.dumps({"message": message, "printed": printed}))

    def error(self) -> tuple[str, bool] | None:
        """Return the message of the noted error, and whether its process prints it; None without an error."""
        path = self.folder / ERROR
        note = _read_object(path, message=str, printed=bool) if path.exists() else None
        return None if note is None else (note["message"], note["printed"])

    def _presence(self, rank: int) -> Path:
        return self.folder / f"process{rank}.lock"

    def _runs(self, rank: int) -> bool:
        return is_held(self._presence(rank))


@dataclass(frozen=True)
class ShardList:
    """One list of shards that are done by the same task."""

    folder: Path  # of the list's plan and results
    task: str
    shards: list[Any]  # what JSON can hold, and prompts with their pictures; one value for each shard

    def done(self, number: int) -> bool:
        """Tell whether a shard has a result."""
        return self._result(number).exists()

    def finish(self, number: int, result: Any) -> None:
        """Write the result of a shard, a value that JSON can hold; after the return, it survives a kill."""
        write_file(self._result(number), json.dumps(result), KEPT)

    def results(self) -> list[tuple[Any, Any]]:
        """List all shards that are done, in their order, each with its result; raises InputError if one is damaged."""
        done = sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal())
        return [(self.shards[number], _read(self._result(number))) for number in done if number < len(self.shards)]

    def take(self, first: int, check: Callable[[], None]) -> Iterator[int]:
        """Claim shards one by one until all are done; yield the number of each one claimed.

        The caller calls :meth:`finish` before it asks for the next one. A shard that another process holds is waited
        for at the end, and taken if that process ends without a result. Each process begins with another shard, its
        ``first``. ``check`` is called before each shard and while waiting, and may raise.
        """
        left = [*range(first, len(self.shards)), *range(first)]
        while left:
            held = []
            for number in left:
                if self.done(number):
                    continue
                check()
                with claimed(self.folder / f"{number:06d}.lock") as mine:
                    if not mine:
                        held.append(number)
                    elif not self.done(number):  # it may have been finished before it was claimed
                        yield number
            left = held
            if left:
                time.sleep(POLL_S)

    def _result(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def read_list(folder: Path) -> ShardList:
    """Read the plan of a list of shards; raises InputError if it is damaged."""
    plan = _read_object(folder / PLAN, task=str, shards=list)
    pictures = [_unpacked_image(*image) for image in plan.get("pictures", ())]
    return ShardList(folder, plan["task"], _unpacked(plan["shards"], pictures))


def left_over(folder: Path, task: str) -> list[tuple[Any, Any]]:
    """List the shards of a task that earlier runs in ``folder`` finished and whose results nobody took, with these."""
    lists = (read_list(plan.parent) for plan in sorted(folder.glob(f"*/*/{PLAN}")))
    return [found for todo in lists if todo.task == task for found in todo.results()]


def _packed(value: Any, pictures: dict[ImageRef, int]) -> Any:
    """Return a value as JSON can hold it: JSON would write a prompt as a text, without the pictures that it edits.

    The pictures are added to ``pictures``, each once with its place: a plan repeats a prompt for each of its images.
    """
    if isinstance(value, EditPrompt):
        places = [pictures.setdefault(image, len(pictures)) for image in value.sources]
        return {EDIT: str.__str__(value), "sources": places}
    if isinstance(value, dict):
        return {name: _packed(one, pictures) for name, one in value.items()}
    return [_packed(one, pictures) for one in value] if isinstance(value, (list, tuple)) else value


def _packed_image(image: ImageRef) -> list[str | None]:
    data = None if image.data is None else b64encode(image.data).decode()
    return [image.image_key, data, *(None if path is None else str(path) for path in (image.path, image.root))]


def _unpacked(value: Any, pictures: Sequence[ImageRef]) -> Any:
    """Undo :func:`_packed`."""
    if isinstance(value, dict):
        if value.keys() == {EDIT, "sources"}:
            return EditPrompt(value[EDIT], [pictures[place] for place in value["sources"]])
        return {name: _unpacked(one, pictures) for name, one in value.items()}
    return [_unpacked(one, pictures) for one in value] if isinstance(value, list) else value


def _unpacked_image(key: str, data: str | None, *paths: str | None) -> ImageRef:
    return ImageRef(key, data and b64decode(data), *(path and Path(path) for path in paths))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); {AGAIN}") from error


def _read_object(path: Path, **fields: type) -> dict[str, Any]:
    """Read a JSON object that has the given fields, each of its type."""
    found = read_config(path, remedy=AGAIN)
    if wrong := [name for name, kind in fields.items() if not isinstance(found.get(name), kind)]:
        raise InputError(f"{path}: damaged (no {wrong[0]}); {AGAIN}")
    return found


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
