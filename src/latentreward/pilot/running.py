"""Running of a pilot's stages, one process after the other; a stage that was stopped goes on where it was."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from latentreward.steps.tasks import Task
from latentreward.steps.workshop import LOG, START, Workshop

TOLD_EVERY_S = 15.0
"""Seconds between lines about the progress of a stage."""


def workshop(folder: Path) -> Workshop:
    """Return the folder of all stages' outputs, in which commands resume."""
    return Workshop(folder, resumes=True, environment={})


def unfinished(tasks: Mapping[str, Task], shop: Workshop) -> list[Task]:
    """List the stages that have not finished, or whose inputs were made again, in their order."""
    return [task for task in tasks.values() if shop.done(task) is None]


def run_stages(tasks: Mapping[str, Task], shop: Workshop) -> None:
    """Run the stages that have not finished.

    Ctrl-C and SIGTERM end the stage's process by SIGTERM and wait for it, so that a training saves a checkpoint.

    Raises:
        InputError: If a stage fails.
    """
    with ThreadPoolExecutor(1) as pool:  # an interrupt reaches the main thread, and leaves the process to the other
        try:
            for name, task in tasks.items():
                log = task.output(shop.folder).parent / LOG
                if shop.done(task) is not None:
                    print(f"{name}: done before", flush=True)
                    continue
                print(f"{name}: {'goes on' if shop.goes_on(task) else 'starts'}; its log is {log}", flush=True)
                running, told = pool.submit(shop.run, task), progress(log)
                while not wait([running], TOLD_EVERY_S).done:
                    if (line := progress(log)) != told:
                        print(f"{name}: {line}", flush=True)
                        told = line
                running.result()
        finally:
            shop.close()


def progress(log: Path) -> str:
    """Return the last line about progress, with rate and time left, that a stage's process has written to its log."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.endswith(" left")), "")


def starts(log: Path) -> int:
    """Return how often a stage's process was started, from its log."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return sum(line.startswith(START) for line in text.splitlines())
