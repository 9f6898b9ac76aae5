"""Scores of many rows from a server: batches, requests at the same time, and a cache by content."""

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Event, Lock, Thread
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field

from latentreward.core.errors import InputError
from latentreward.core.interrupts import stop_asked
from latentreward.core.storage.json_files import checked, shown
from latentreward.reward.remote.schemas import REMEDY
from latentreward.reward.remote.server import LOOK_S, Connection, RemoteServer, TooLarge

CACHED = 65536  # number of scores that a process remembers; a score takes about 150 bytes
SCORES = list[Annotated[float, Field(ge=-3.4028235e38, le=3.4028235e38)]]
"""Scores of a reply: finite numbers in the range of float32; a truth value or a text is none."""

Row = TypeVar("Row")
PendingScores = Callable[[], list[float]]
"""Function that waits for the scores of rows that have been asked for, and returns one for each row.

It raises RemoteError if a request fails, or a signal asks the run to stop; requests under way are then given up.
"""


class RemoteScores(ABC, Generic[Row]):
    """Base class of sources of scores from a server.

    Rows with equal keys are asked for once. A score is remembered, so that a row gets the same score again. Only one
    thread may call the methods, but for :meth:`ask`.
    """

    def __init__(self, server: RemoteServer, batch_size: int, model: str | None = None) -> None:
        self.connection, self.batch_size = Connection(server), batch_size
        self.model = model  # that the server has named so far; None if it has not
        self._known: OrderedDict[str, float] = OrderedDict()
        self._lock, self._ended = Lock(), Event()
        self._threads, self._waiting = 0, deque[tuple[Sequence[Row], Future[Any], Event]]()

    @abstractmethod
    def ask(self, rows: Sequence[Row], ended: Event) -> tuple[Sequence[Any], str | None]:
        """Ask for the scores of a batch, in a thread; return them, unchecked, and the model that the server names.

        Another thread sets ``ended`` when it does not need the scores any more.
        """

    def begin_rows(self, rows: Sequence[Row], keys: Sequence[str]) -> PendingScores:
        """Ask for the scores of N rows, and return before they are there.

        Rows with the same content have the same key.
        """
        known = {key: self._known[key] for key in keys if key in self._known}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        names, asked, size = list(new), [], self.batch_size
        for start in range(0, len(names), size):
            batch, future = names[start : start + size], Future[Any]()
            asked.append((batch, future))
            with self._lock:
                self._waiting.append(([new[key] for key in batch], future, self._ended))
                if self._threads < self.connection.server.parallel:
                    # A daemon: the process should not wait for a silent server when it ends.
                    Thread(target=self._ask_waiting, name="reward request", daemon=True).start()
                    self._threads += 1
        for key in known:
            self._known.move_to_end(key)

        def result() -> list[float]:
            found = known | self._collect(asked)
            return [found[key] for key in keys]

        return result

    def _collect(self, asked: Sequence[tuple[Sequence[str], Future[Any]]]) -> dict[str, float]:
        """Wait for the answers to requests, check and remember them, and return the scores by key."""
        found: dict[str, float] = {}
        try:
            for batch, future in asked:
                while not wait([future], LOOK_S).done:
                    if stop_asked.is_set():  # a try under way may take server.timeout_s
                        self.connection.refuse("a signal ended the wait for its answer")
                scores, model = future.result()
                found |= zip(batch, self._checked(scores, len(batch), model), strict=True)
        except BaseException:
            self._ended.set()  # threads that wait for another try end
            self._ended = Event()
            raise
        self._known |= found
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return found

    def _ask_waiting(self) -> None:
        """Ask for what waits, in a thread, until nothing does."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                rows, future, ended = self._waiting.popleft()
            try:
                future.set_result(([], None) if ended.is_set() else self._ask(rows, ended))
            except BaseException as error:
                future.set_exception(error)

    def _ask(self, rows: Sequence[Row], ended: Event) -> tuple[Sequence[Any], str | None]:
        """Ask for the scores of a batch, in halves where the server refuses so many rows at once."""
        try:
            return self.ask(rows, ended)
        except TooLarge:
            if len(rows) == 1:
                raise
        half = len(rows) // 2
        self.batch_size = min(self.batch_size, half)  # of later requests
        (scores, model), (rest, other) = self._ask(rows[:half], ended), self._ask(rows[half:], ended)
        if model != other:
            self.connection.refuse(f"the model is now {shown(other)}, but was {shown(model)} before")
        return [*scores, *rest], model

    def _checked(self, scores: Sequence[Any], count: int, model: str | None) -> list[float]:
        """Check a reply: as many scores as rows, finite, of the same model as before; raise RemoteError if not."""
        try:
            if len(scores) != count:
                raise InputError(f"{len(scores)} scores came for {count} rows")
            if model is not None and self.model not in (None, model):
                raise InputError(f"the model is now {shown(model)}, but was {shown(self.model)} before")
            numbers = checked(SCORES, [*scores], "score ", REMEDY)
        except InputError as error:
            self.connection.refuse(str(error), error)
        self.model = model or self.model
        return numbers
