"""The command line, or a function, in processes of their own that need not import everything again.

They are forked from one process that has imported torch, Lightning and our rooms, and has run nothing: a fresh
interpreter would spend about five seconds on imports.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import socket
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
"""Starts processes of Python's multiprocessing in the same way; what they are given is pickled."""

FORKS.set_forkserver_preload(
    [
        "latentreward.apps.commands.fit",
        "latentreward.diffusion.cache",
        "latentreward.reward.modules.reward",
        "latentreward.reward.scoring",
        "latentreward.reward.scoring.reward_model",
        "latentreward.tinyworld",
        "datasets",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.transformers.transformer_sd3",
        "diffusers.models.unets.unet_2d_condition",
        "peft",
        "transformers.models.clip.modeling_clip",
    ]
)


class Forked:
    """A process, with the part of ``subprocess.Popen`` that tests use; what it prints is kept in files.

    Args:
        function: What it runs.
        arguments: Of the function.
        cwd: Its working folder.
        environment: Its variables beyond those here.
        threads: Threads of torch.
        session: Whether it leads a session and a group of its own, so that ``os.killpg`` reaches what it starts.
        output: File that is given, at its end, all that it prints, instead of files of its own.
    """

    def __init__(
        self,
        function: Callable[..., None],
        arguments: Sequence[Any],
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
        session: bool = False,
        output: Path | None = None,
    ) -> None:
        if output is None:
            self._printed = tempfile.TemporaryDirectory(prefix="forked_")
            self._outputs = [Path(self._printed.name) / name for name in ("stdout", "stderr")]
        else:
            self._outputs = [output, output]
        for path in self._outputs:
            path.touch()
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        settings = (self._outputs, str(cwd or Path.cwd()), variables, threads, session)
        self._process = FORKS.Process(target=_run, args=(settings, function, arguments))
        self._process.start()
        while session and not self._leads():  # a group that is not there yet cannot be sent a signal
            time.sleep(0.001)

    def _leads(self) -> bool:
        """Whether it leads its session by now, or has ended."""
        with contextlib.suppress(ProcessLookupError):
            return os.getsid(self.pid) == self.pid or self.returncode is not None
        return True

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, -N if signal N ended it, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See :attr:`returncode`."""
        return self._process.exitcode

    def send_signal(self, sent: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: If it still runs after so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked process", timeout or 0, self.stdout, self.stderr)
        return self.returncode

    @property
    def stdout(self) -> str:
        """What it has written there so far."""
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        """What it has written there so far."""
        return self._outputs[1].read_text()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        return self.stdout, self.stderr


def start(arguments: Sequence[str], **options: Any) -> Forked:
    """``latentreward`` with these arguments; for ``options`` see :class:`Forked`."""
    return Forked(run_command, [tuple(arguments)], **options)


def start_ranks(
    arguments: Sequence[str], count: int, environment: Mapping[str, str] | None = None, **options: Any
) -> list[Forked]:
    """``latentreward`` on so many ranks, started one by one as a cluster's launcher does; see :class:`Forked`."""
    return [start(arguments, environment=one, **options) for one in rank_environments(count, environment)]


def rank_environments(count: int, environment: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Variables of so many ranks on this machine."""
    shared = dict(environment or {})
    if count == 1:
        return [shared]
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    return [{**shared, "LOCAL_RANK": str(rank)} for rank in range(count)]


def finish(arguments: Sequence[str], timeout: float = 120, **options: Any) -> Forked:
    """``latentreward`` with these arguments, once it has ended."""
    process = start(arguments, **options)
    try:
        process.wait(timeout)
    finally:
        process.kill()
    return process


def kill_after_parts(arguments: Sequence[str], parts: Path, count: int = 2, **options: Any) -> None:
    """Start ``latentreward`` and kill it by SIGKILL as soon as so many parts of a table lie in the folder ``parts``."""
    process = start(arguments, **options)
    deadline = time.monotonic() + 600
    while len([*parts.glob("rows_*.parquet")]) < count and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()


def on_ranks(
    target: str,
    arguments: Sequence[Any],
    world_size: int = 2,
    environment: Callable[[int], Mapping[str, str]] = lambda rank: {},
    timeout: float = 400,
) -> list[Any]:
    """Results of ``target`` (``module:function``), called as ``function(rank, *arguments)``, of every rank.

    Args:
        target: The function; what it returns must be what ``torch.load`` takes with ``weights_only``.
        arguments: After the rank.
        world_size: Number of processes.
        environment: Variables of a rank.
        timeout: Seconds that they may take.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        ranks = [
            Forked(_rank, [target, rank, arguments, f"{folder}/{rank}"], environment=environment(rank))
            for rank in range(world_size)
        ]
        try:
            printed = [process.communicate(timeout)[1][-6000:] for process in ranks]
            assert not any(process.returncode for process in ranks), "\n==== next rank ====\n".join(printed)
        finally:
            for process in ranks:
                process.kill()
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(world_size)]


def _run(settings: tuple[Any, ...], function: Callable[..., None], arguments: Sequence[Any]) -> None:
    """What a forked process does."""
    outputs, cwd, variables, threads, session = settings
    if session:
        os.setsid()
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.path.insert(0, cwd)
    multiprocessing.set_start_method(None, force=True)  # a loader's workers start as in a fresh interpreter
    FORKS.set_forkserver_preload([])  # a fork server of its own (loaders of several ranks) would import all that again
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # as an interpreter does, and multiprocessing does not: ours end a loader's workers


def run_command(arguments: Sequence[str]) -> None:
    """``latentreward`` with these arguments, in this process."""
    from latentreward.apps.cli import main

    sys.argv = [str(Path(sys.executable).with_name("latentreward")), *arguments]  # by which Lightning starts more ranks
    main()


def _rank(target: str, rank: int, arguments: Sequence[Any], path: str) -> None:
    module, function = target.split(":")
    torch.save(getattr(importlib.import_module(module), function)(rank, *arguments), path)
