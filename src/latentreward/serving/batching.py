"""Rows of many requests through one model: passes form by themselves while the model is busy."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from latentreward.serving.errors import RequestError

SHAPES_KEPT = 1024
"""Shapes whose seconds per row are remembered."""


class GroupedRow(Protocol):
    """A row that can be scored with others of its group."""

    @property
    def shape(self) -> Hashable:
        """Rows of equal shapes take the same time."""

    @property
    def group(self) -> Hashable:
        """Rows of equal groups may share a pass; they have the same shape."""


Row = TypeVar("Row", bound=GroupedRow)


@dataclass(frozen=True)
class _Waiting(Generic[Row]):
    future: asyncio.Future[float]
    row: Row
    group: Hashable
    turn: float
    since: float


class MicroBatcher(Generic[Row]):
    """Collects rows into passes for one worker thread.

    A pass starts as soon as the worker is free and a group fills a pass or its oldest row has waited ``max_wait``.

    Requests take turns by fair queueing (Demers, Keshav and Shenker 1989): a request's turn is the time, counted in
    rows, at which it would be done if all clients were served at once, each at the same rate, and each client's
    requests likewise. A request of one row is therefore next, whatever waits of long ones, and a long one is done no
    later than if all were served at once. Other rows of its group share the pass of the request whose turn it is.

    Lives in one event loop.

    Args:
        score: Scores of 1 to ``batch_size`` rows of one group; runs in the worker thread, one call at a time.
        batch_size: Rows per pass, at most.
        max_wait: Seconds that a row waits for others at most, while the worker is free.
        queue: Rows that may wait; further ones are refused.
        max_pass: Seconds that a pass may take, by what a row of the same shape took last. A pass of a shape that was
            not measured yet, or that takes longer, holds one row.
        observe: Told the size of each pass.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Row]], Sequence[float]],
        batch_size: int,
        max_wait: float,
        queue: int,
        max_pass: float,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.batch_size, self.max_wait, self.queue, self.max_pass = batch_size, max_wait, queue, max_pass
        self._score, self._observe = score, observe
        self._waiting: dict[asyncio.Future[float], _Waiting[Row]] = {}
        self._requests: Counter[Hashable] = Counter()
        self._served = 0.0
        self._seconds_per_row: dict[Hashable, float] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._arrived = asyncio.Event()
        self._busy_since: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Rows in the queue; those in the worker do not count."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether rows of the queue are being scored: started, and neither stopped nor dead."""
        return self._task is not None and not self._task.done()

    @property
    def busy_seconds(self) -> float:
        """How long the worker has been at its present pass; 0 if it is free."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def start(self) -> None:
        """Begin to score, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Score no more; rows in the queue are forgotten, a pass that runs is waited for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await asyncio.to_thread(self._worker.shutdown)

    async def score(self, rows: Sequence[Row], client: Hashable = None) -> list[float]:
        """Score the rows, of any groups, of one request by ``client``. If this is cancelled, waiting rows are dropped.

        Raises:
            RequestError: If the queue is too full for them (503).
            Exception: What the model raised for one of them.
        """
        if self.waiting + len(rows) > self.queue:
            seconds = sum(self._seconds_per_row.get(waiting.row.shape, 0.0) for waiting in self._waiting.values())
            message = f"{self.waiting} of {self.queue} places in the queue are taken; try later"
            raise RequestError(message, 503, max(1, math.ceil(seconds)))
        self._requests[client] += 1
        turn = self._served + len(rows) * self._requests[client]
        futures = [self._enqueue(row, turn) for row in rows]
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()
                self._waiting.pop(future, None)
            self._requests -= Counter([client])  # which drops counts of 0

    def _enqueue(self, row: Row, turn: float) -> asyncio.Future[float]:
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[future] = _Waiting(future, row, row.group, turn, time.monotonic())
        self._arrived.set()
        return future

    async def _run(self) -> None:
        while True:
            rows = await self._next_pass()
            self._served += len(rows) / max(1, len(self._requests))
            try:
                await self._score_pass(rows)
            except Exception as error:
                for waiting in rows:
                    _settle(waiting.future, error)

    async def _next_pass(self) -> list[_Waiting[Row]]:
        """Rows of one group, once any group is due; the first one's turn it is."""
        while True:
            self._arrived.clear()
            groups: dict[Hashable, list[_Waiting[Row]]] = defaultdict(list)
            for waiting in sorted(self._waiting.values(), key=lambda waiting: waiting.turn):
                groups[waiting.group].append(waiting)
            left = min((self._due(rows) for rows in groups.values()), default=math.inf) - time.monotonic()
            if left <= 0:
                rows = next(iter(groups.values()))
                return rows[: self._capacity(rows[0].row)]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), None if left == math.inf else left)

    def _due(self, rows: Sequence[_Waiting[Row]]) -> float:
        """When rows of a group may be scored: at once if they fill a pass."""
        since = min(waiting.since for waiting in rows)
        return since if len(rows) >= self._capacity(rows[0].row) else since + self.max_wait

    def _capacity(self, row: Row) -> int:
        """Rows of a group that a pass holds."""
        seconds = self._seconds_per_row.get(row.shape, math.inf)
        return max(1, min(self.batch_size, int(self.max_pass / seconds)))

    async def _score_pass(self, rows: Sequence[_Waiting[Row]]) -> None:
        """Give each row its score; if they fail, each waits for a pass of its own, so that one spoils no other."""
        for waiting in rows:
            del self._waiting[waiting.future]
        self._observe(len(rows))
        self._busy_since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            scores = await loop.run_in_executor(self._worker, self._score, [waiting.row for waiting in rows])
            if len(scores) != len(rows):
                raise ValueError(f"{len(scores)} scores for {len(rows)} rows")
        except Exception as error:
            if len(rows) == 1:
                _settle(rows[0].future, error)
            for waiting in rows:
                if not waiting.future.done():
                    self._waiting[waiting.future] = replace(waiting, group=waiting.future)
        else:
            self._measure(rows[0].row.shape, self.busy_seconds / len(rows))
            for waiting, score in zip(rows, scores, strict=True):
                _settle(waiting.future, score)
        finally:
            self._busy_since = None

    def _measure(self, shape: Hashable, seconds: float) -> None:
        self._seconds_per_row.pop(shape, None)
        self._seconds_per_row[shape] = max(seconds, 1e-6)
        if len(self._seconds_per_row) > SHAPES_KEPT:
            del self._seconds_per_row[next(iter(self._seconds_per_row))]


def _settle(future: asyncio.Future[float], result: float | Exception) -> None:
    if future.done():  # its request was cancelled
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
