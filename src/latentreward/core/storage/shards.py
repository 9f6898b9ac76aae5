"""Shards of work that the processes of one command share out among themselves in a folder.

A process claims a shard by a lock, which the operating system frees when the process ends. Its result is one file. So a
shard of a killed process is free again, and a shard with a result is never done twice.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.json_files import read_config
from latentreward.core.storage.locks import claimed, has_locks, is_held

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
