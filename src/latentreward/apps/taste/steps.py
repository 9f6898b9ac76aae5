"""Running of steps: each in a process of its own, its output kept as long as what it depends on has not changed."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Annotated, Any
from uuid import uuid4

import yaml
from pydantic import BeforeValidator

import latentreward
from latentreward.apps.taste import process
from latentreward.core.errors import InputError, did_you_mean, one_line
from latentreward.core.reports.page import versions
from latentreward.core.settings.rewriting import check_yaml, find_config
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import discard, refuse_link, write_file
from latentreward.core.storage.json_files import STRICT, read_config

PACKAGE = Path(latentreward.__file__).parent
CLONE = PACKAGE.parents[1]
"""Folder of the repository if the package is installed from a clone."""


def commit() -> str:
    """Return the commit of the checkout that holds the package, with ``+`` if its files differ; empty without one."""
    if not (CLONE / ".git").exists():
        return ""
    git = partial(subprocess.check_output, cwd=CLONE, text=True, stderr=subprocess.DEVNULL)
    try:
        head = git(["git", "rev-parse", "--short=10", "HEAD"]).strip()
        changed = git(["git", "status", "--porcelain", "--", "src", "callbacks", "configs", "tools"])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}{'+' if changed.strip() else ''}"


def machine() -> dict[str, str | int | None]:
    """Describe the processor and the system."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(found, platform.processor()) or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.system()}


def computed_with() -> dict[str, str]:
    """Return the versions of Python and of the packages that train and compute."""
    return versions() | {name: version(name) for name in ("lightning", "peft")}


CONFIG = "--config="
PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")
"""Placeholder in a step's arguments: ``{out}``, ``{seed}``, or the name of the step whose output folder it stands for.

Braces around anything else, such as those of JSON or of ``${SD15_PATH}``, stay.
"""


def split(given: Any) -> tuple[str, ...]:
    """Split the arguments of a process, which a YAML file holds as one text, with a shell's quotes."""
    if not isinstance(given, str):
        raise ValueError("it must be a text")
    return tuple(shlex.split(given))


Arguments = Annotated[tuple[str, ...], BeforeValidator(split)]
"""Arguments of a process."""


@dataclass(frozen=True)
class Step:
    """Command that runs in a process of its own."""

    __pydantic_config__ = STRICT
    run: Arguments  # arguments of the process, starting with a subcommand of ``latentreward``
    module: str = ""  # module to run as a program instead of the command line; empty for the command line
    quick: Arguments = ()  # arguments added for a trial of two steps
    pairs: str = ""  # name of the step that wrote the pairs which the step scores; empty if it scores no pairs


@dataclass(frozen=True)
class Task:
    """Step of an arm and a seed, with its placeholders resolved."""

    name: str  # name of the step
    module: str  # as of :class:`Step`
    arguments: tuple[str, ...]  # arguments that may contain placeholders
    inputs: Mapping[str, "Task"] = field(hash=False)  # placeholder → task whose output it stands for
    seed: int  # seed that ``{seed}`` stands for
    key: str  # digest of all that the output depends on apart from source files; equal tasks have equal keys

    def command(self, folder: Path) -> list[str]:
        """Return the arguments with placeholders replaced by the seed and by folders below ``folder``."""
        places = {name: str(task.output(folder)) for name, task in self.inputs.items()}
        places |= {"out": str(self.output(folder)), "seed": str(self.seed)}
        return [PLACEHOLDER.sub(lambda found: places.get(found[1], found[0]), text) for text in self.arguments]

    def output(self, folder: Path) -> Path:
        """Return the folder of the task's output, below ``folder``."""
        return folder / f"{self.name}-{self.key[:16]}" / "out"

    def needed(self) -> Iterator["Task"]:
        """Yield the task and all that it depends on, dependencies first, possibly repeatedly."""
        for task in self.inputs.values():
            yield from task.needed()
        yield self


def resolve(
    steps: Mapping[str, Step],
    name: str,
    seed: int,
    added: Mapping[str, Sequence[str]] = MappingProxyType({}),
    quick: bool = False,
) -> Task:
    """Resolve a step and the steps that its arguments name.

    ``added`` holds arguments by the names of steps; ``quick`` adds those of a trial of two steps.
    """
    found = steps[name]
    arguments = [*found.run, *added.get(name, ()), *(found.quick if quick else ())]
    names = {place for text in arguments for place in PLACEHOLDER.findall(text)} & steps.keys()
    inputs = {one: resolve(steps, one, seed, added, quick) for one in sorted(names)}
    known = {one: task.key for one, task in inputs.items()} | {"seed": str(seed)}
    resolved = [PLACEHOLDER.sub(lambda place: known.get(place[1], place[0]), text) for text in arguments]
    configs = [text for text in arguments if text.startswith(CONFIG) and not PLACEHOLDER.search(text)]
    files = [config_digest(find_config(text.removeprefix(CONFIG))) for text in configs]
    key = digest(["\0".join((found.module, *resolved, "", *files))])
    return Task(name, found.module, tuple(arguments), inputs, seed, key)


def check_steps(place: str, steps: Mapping[str, Step]) -> None:
    """Check steps that come from a file: their names become names of folders."""
    needs, known = {}, {*steps, "out", "seed"}
    for name, step in steps.items():
        if not re.fullmatch(r"\w+", name):
            raise InputError(f"{place}: {name!r} is not a name; use letters, digits and _")
        named = {found for text in (*step.run, *step.quick) for found in PLACEHOLDER.findall(text)}
        for one in sorted(named - known):
            raise InputError(f"{place}.{name}: {{{one}}} names no step{did_you_mean(one, known)}")
        needs[name] = named & steps.keys()
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise InputError(f"{place}: {' needs '.join(error.args[1])}") from error


@cache
def config_digest(path: str) -> str:
    """Digest the settings in a YAML file; comments and layout do not count."""
    return digest([repr(yaml.safe_load(Path(path).read_text(encoding="utf-8")))])


def load_yaml(path: str) -> Any:
    """Read a YAML file, by its path or by the name ``configs/...`` of one that ships with the package.

    Raises:
        InputError: If the file is not YAML, or fails :func:`~latentreward.core.settings.rewriting.check_yaml`.
    """
    file = Path(find_config(path))
    try:
        check_yaml(text := file.read_text(encoding="utf-8"))
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise InputError(f"{path}: {one_line(error)}") from error


RECORD, LOG, INPUTS, TOLD = "record.json", "log.txt", "inputs.json", "process.json"
TOLD_EVERY_S = 15.0
"""Seconds between lines about the progress of a task."""


@dataclass(frozen=True)
class Done:
    """Record of a finished task."""

    cpu_seconds: float  # processor time of its process
    modules: tuple[str, ...]  # modules of this package that its process imported
    source: str  # digest of their source files at that time; empty if the runner takes none
    inputs: dict[str, str | None]  # key of an input → its ``identity``
    seconds: float  # time of its last process by the clock
    gpu_bytes: int  # peak memory that PyTorch allocated on a GPU in its last process
    identity: str  # random name of this output, by which other tasks' records tell it from one that was made again


@dataclass
class TaskRunner:
    """Runner of tasks in processes; each output in its folder is computed once."""

    folder: Path  # folder of all outputs
    # Digest of the source files of modules. An output is discarded when it differs, and a command that was stopped
    # starts again. With None, an output stays finished when source files change, and a command goes on in the output
    # that it left, unless an input was made again since.
    source_digest: Callable[[Iterable[str]], str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of the processes beyond those here
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False

    def done(self, task: Task) -> Done | None:
        """Return a task's record; None if it is unfinished, ran with other source files, or an input was made again."""
        folder = task.output(self.folder).parent
        if not (folder / RECORD).is_file():
            return None
        content = read_config(folder / RECORD, remedy=f"remove {folder} to run {task.name} again")
        try:
            found = Done(**content)
        except TypeError as error:
            raise InputError(f"{folder / RECORD} is damaged ({error}); remove {folder} to run it again") from error
        if self.source_digest is not None and self.source_digest(found.modules) != found.source:
            return None
        current = self._inputs(task)
        return found if current == found.inputs and None not in current.values() else None

    def log(self, task: Task) -> Path:
        """Return the file beside a task's output to which its processes print."""
        return task.output(self.folder).parent / LOG

    def _inputs(self, task: Task) -> dict[str, str | None]:
        """Return key of an input → its identity; None if it has not finished."""
        return {one.key: found.identity if (found := self.done(one)) else None for one in task.inputs.values()}

    def run(self, task: Task) -> None:
        """Run a task's process, which prints to :meth:`log`."""
        folder, log, inputs = task.output(self.folder).parent, self.log(task), self._inputs(task)
        goes_on = self.source_digest is None and folder.exists()
        if goes_on and (folder / INPUTS).is_file():
            goes_on = read_config(folder / INPUTS, remedy=f"remove {folder} to start anew") == inputs
        print(f"{task.name}: {'goes on' if goes_on else 'starts'}; its log is {log}", flush=True)
        if not goes_on:
            discard(task.output(self.folder))  # before the files by which a later start sees what a stop here left
            discard(folder)
        task.output(self.folder).mkdir(parents=True, exist_ok=True)
        arguments = task.command(self.folder)
        write_file(folder / INPUTS, json.dumps(inputs))
        for written in (log, folder / TOLD):
            refuse_link(written)
        with log.open("a") as stream:
            stream.write(f"$ {task.module or 'latentreward'} {' '.join(arguments)}\n")
            stream.flush()
            command = [sys.executable, "-m", process.__name__, str(folder / TOLD), task.module, *arguments]
            code = self._call(command, stream.fileno())
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1]
            raise InputError(f"{task.name} failed: {last} (all of it is in {log})")
        told = json.loads((folder / TOLD).read_text())
        source = "" if self.source_digest is None else self.source_digest(told["modules"])
        found = Done(**told, source=source, inputs=inputs, identity=uuid4().hex)
        write_file(folder / RECORD, json.dumps(vars(found)))

    def _call(self, command: Sequence[str], log: int) -> int:
        environment = {**os.environ, **self.environment}
        with self._lock:
            if self._closed:
                raise KeyboardInterrupt
            running = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            self._running.add(running)
        try:
            return running.wait()
        finally:
            with self._lock:
                self._running.discard(running)

    def close(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._closed = True
            for running in self._running:
                running.terminate()


def run_tasks(
    tasks: Iterable[Task],
    runner: TaskRunner,
    processes: int = 1,
    finished: Callable[[Task], None] = lambda task: None,
    keep_going: bool = False,
) -> list[str]:
    """Run the tasks that have not finished, each after its inputs, otherwise in their order.

    Ctrl-C and SIGTERM end the running processes by SIGTERM and wait for them, so that a training saves a checkpoint.

    Args:
        tasks: Tasks; an input that is not among them has finished.
        runner: Runner, which is closed at the end.
        processes: Most processes at a time.
        finished: Called with each task that this call has run.
        keep_going: Whether tasks that do not depend on a failed one still run. Then a line for each task that failed is
            returned; otherwise the first failure raises InputError.
    """
    waiting = {task.key: task for task in tasks}
    unfinished, failures = {*waiting}, list[str]()
    running, shown = dict[Future[None], Task](), dict[str, str]()
    with ThreadPoolExecutor(processes) as pool:  # an interrupt reaches the main thread and leaves processes to others
        try:
            while True:
                for task in ready(waiting, unfinished, runner):
                    if len(running) < processes:
                        del waiting[task.key]
                        shown[task.key] = progress(runner.log(task))
                        running[pool.submit(runner.run, task)] = task
                if not running:
                    return failures
                ended = wait(running, TOLD_EVERY_S, FIRST_COMPLETED).done
                for task in running.values():
                    if (line := progress(runner.log(task))) != shown[task.key]:
                        print(f"{task.name}: {line}", flush=True)
                        shown[task.key] = line
                for task, error in [(running.pop(future), future.exception()) for future in ended]:
                    if error is None:
                        unfinished.remove(task.key)
                        finished(task)
                    elif keep_going and isinstance(error, InputError):
                        failures.append(str(error))
                        print(error, file=sys.stderr, flush=True)
                    else:
                        raise error
        finally:
            runner.close()


def ready(waiting: dict[str, Task], unfinished: set[str], runner: TaskRunner) -> Iterator[Task]:
    """Yield the waiting tasks whose inputs have finished; take out those that have finished themselves before."""
    for key, task in [*waiting.items()]:
        if unfinished & {one.key for one in task.inputs.values()}:
            continue
        if runner.done(task) is None:
            yield task
        else:
            print(f"{task.name}: done before", flush=True)
            del waiting[key]
            unfinished.remove(key)


def progress(log: Path) -> str:
    """Return the last line about progress, with rate and time left, that a task's process has written to its log."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.endswith(" left")), "")
