"""Steps of the command: each is a process of its own, whose output is kept as long as its arguments are the same.

``python -m latentreward.apps.taste.steps PID ARGUMENT...`` is the command line of ``latentreward`` that ends with the
process PID, which started it.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Self

from latentreward.core.errors import InputError
from latentreward.core.settings.rewriting import find_config
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import refuse_link, write_file

DONE, LOG = "done", "log.txt"
SHIPPED = "--config=configs/"
TOLD_EVERY_S = 15.0
"""Seconds between lines about the progress of a step."""


@dataclass(frozen=True)
class Step:
    """Command of ``latentreward`` that runs once, in a folder of its own."""

    name: str
    arguments: tuple[str, ...]
    output: Path

    @classmethod
    def of(cls, work: Path, name: str, arguments: Sequence[str]) -> Self:
        """Make a step below ``work``; ``{out}`` in its arguments stands for the folder of its output.

        The folder is named by the arguments, in which the outputs of earlier steps are named, and by shipped configs:
        where one of them changes, this and all later steps start in new folders.
        """
        files = [Path(find_config(text.partition("=")[2])) for text in arguments if text.startswith(SHIPPED)]
        key = digest(["\0".join((*arguments, *(file.read_text(encoding="utf-8") for file in files)))])
        output = work / f"{name}-{key[:16]}" / "out"
        return cls(name, tuple(text.replace("{out}", str(output)) for text in arguments), output)

    def run(self) -> None:
        """Run the command unless it has finished; one that was stopped goes on in its folder."""
        folder, log = self.output.parent, self.output.parent / LOG
        if (folder / DONE).is_file():
            print(f"{self.name}: done before", flush=True)
            return
        print(f"{self.name}: {'goes on' if folder.exists() else 'starts'}; its log is {log}", flush=True)
        self.output.mkdir(parents=True, exist_ok=True)
        refuse_link(log)
        with log.open("a") as stream:
            stream.write(f"$ latentreward {' '.join(self.arguments)}\n")
            stream.flush()
            code = call(self, stream)
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1]
            raise InputError(f"{self.name} failed: {last} (all of it is in {log})")
        write_file(folder / DONE, "")


def call(step: Step, log: IO[str]) -> int:
    """Run a step's process, tell its progress, and return its exit status."""
    command = [sys.executable, "-m", __name__, str(os.getpid()), *step.arguments]
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    shown = progress(Path(log.name))
    try:
        while True:
            try:
                return running.wait(TOLD_EVERY_S)
            except subprocess.TimeoutExpired:
                if (line := progress(Path(log.name))) != shown:
                    print(f"{step.name}: {line}", flush=True)
                    shown = line
    except BaseException:  # Ctrl-C or SIGTERM: a training saves a checkpoint
        running.terminate()
        running.wait()
        raise


def progress(log: Path) -> str:
    """Return the last line about progress, with rate and time left, that a step's process has written to its log."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.endswith(" left")), "")


def end_with(parent: int) -> None:
    """Send this process SIGTERM once ``parent`` was killed: the next command would run the same step beside it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv[:2] = ["latentreward"]
    runpy.run_module("latentreward", run_name="__main__", alter_sys=True)
