"""Dynamic batching: rows of many requests are collected into batches while the model is busy."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from latentreward.apps.serving.batch_scorer import Row, Scores
from latentreward.apps.serving.refusals import RequestError


@dataclass(frozen=True, eq=False)
class _Request:
    """What the finishing time of a request depends on."""

    begun: float  # seconds that each client had been served when the request came
    shapes: Counter[Hashable]  # number of rows by shape
    among: int  # number of requests of its client, with this one


@dataclass(frozen=True)
class _Waiting:
    future: asyncio.Future[Scores]
    row: Row
    group: Hashable
    request: _Request
    since: float


class MicroBatcher:
    """Collects rows of requests into batches, and scores the batches in one worker thread.

    A batch starts when the worker is free and some group either fills a batch or has a row that has waited
    ``max_wait`` seconds.

    The order of requests is fair queueing (Demers, Keshav and Shenker 1989). Each request gets a finishing time,
    the time at which it would be finished if all clients were served simultaneously at equal rates, and the requests
    of each client at equal rates too. It is counted in seconds of the worker, as estimated from the last batch of rows
    of equal shape, so that few large rows count as much as many small ones. The request with the earliest finishing
    time is scored first, and other rows of its group fill its batch. Short requests therefore overtake long ones, and a
    long request is finished no later than under simultaneous service.

    A batch holds a single row if its shape was not measured yet, or if one row takes longer than ``max_pass``. An
    object belongs to one event loop.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Row]], Sequence[Scores]],  # of up to batch_size rows of a group, in the worker
        batch_size: int,  # greatest number of rows per batch
        max_wait: float,  # seconds that a row waits for other rows at most, while the worker is free
        queue: int,  # greatest number of waiting rows; requests beyond it are refused
        max_pass: float,  # seconds that a batch should take at most, as estimated from the last rows of equal shape
        observe: Callable[[int], None] = lambda size: None,  # called with the number of rows of each batch
        turns: asyncio.Semaphore | None = None,  # on the device, shared with other batchers; None waits for no other
    ) -> None:
        self.batch_size, self.max_wait, self.queue, self.max_pass = batch_size, max_wait, queue, max_pass
        self._score, self._observe = score, observe
        self._turns = turns or asyncio.Semaphore()
        self._waiting: dict[asyncio.Future[Scores], _Waiting] = {}
        self._requests: Counter[Hashable] = Counter()
        self._served = 0.0
        self._seconds_per_row: dict[Hashable, float] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._arrived = asyncio.Event()
        self._busy_since: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of rows in the queue, without the rows that are being scored."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether the batcher has been started, and has neither been stopped nor crashed."""
        return self._task is not None and not self._task.done()

    @property
    def busy_seconds(self) -> float:
        """Seconds since the current batch started; 0 if the worker is free."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def start(self) -> None:
        """Start scoring, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop scoring: wait for the current batch, and drop the rows in the queue."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await asyncio.to_thread(self._worker.shutdown)

    def require_room(self, rows: int) -> None:
        """Raise RequestError with status 503 if the queue has no room for so many rows just now."""
        if self.waiting + rows > self.queue:
            seconds = sum(self._seconds_per_row.get(waiting.row.shape, 0.0) for waiting in self._waiting.values())
            message = f"{self.waiting} of {self.queue} places in the queue are taken; try later"
            raise RequestError(message, 503, max(1, math.ceil(seconds)))

    async def score(self, rows: Sequence[Row], client: Hashable = None) -> list[Scores]:
        """Score the rows of one request by ``client``; cancelling the call drops the rows that still wait.

        Raises:
            RequestError: With status 503 if the queue has no room for the rows.
            Exception: The model's error if it fails on one of the rows.
        """
        self.require_room(len(rows))
        self._requests[client] += 1
        request = _Request(self._served, Counter(row.shape for row in rows), self._requests[client])
        loop, now = asyncio.get_running_loop(), time.monotonic()
        futures = [loop.create_future() for _ in rows]
        for future, row in zip(futures, rows, strict=True):
            self._waiting[future] = _Waiting(future, row, row.group, request, now)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()
                self._waiting.pop(future, None)
            self._requests -= Counter([client])  # subtraction of Counters removes entries of 0

    async def _run(self) -> None:
        while True:
            await self._until_due()
            async with self._turns:
                # Chosen now: clients may have come or left while another reward computed.
                rows = next(iter(self._groups()), [])
                rows = rows[: self._capacity(rows[0].row)] if rows else []
                try:
                    await self._score_pass(rows)
                except Exception as error:
                    for waiting in rows:
                        _finish(waiting.future, error)

    async def _until_due(self) -> None:
        """Wait until a group is due."""
        while True:
            self._arrived.clear()
            due = math.inf
            for rows in self._groups():  # due at once if they fill a batch, else after a wait
                wait = 0.0 if len(rows) >= self._capacity(rows[0].row) else self.max_wait
                due = min(due, wait + min(waiting.since for waiting in rows))
            left = due - time.monotonic()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), None if left == math.inf else left)

    def _groups(self) -> list[list[_Waiting]]:
        """Return the waiting rows by group, both sorted by finishing time.

        A row of a shape that was not measured counts as the mean of others; without any measurement, as a second.
        """
        groups: dict[Hashable, list[_Waiting]] = defaultdict(list)
        known = self._seconds_per_row
        other = sum(known.values()) / len(known) if known else 1.0
        finishing = {}
        for request in {waiting.request for waiting in self._waiting.values()}:
            seconds = sum(count * known.get(shape, other) for shape, count in request.shapes.items())
            finishing[request] = request.begun + seconds * request.among
        for waiting in sorted(self._waiting.values(), key=lambda waiting: finishing[waiting.request]):
            groups[waiting.group].append(waiting)
        return list(groups.values())

    def _capacity(self, row: Row) -> int:
        """Return the greatest number of rows, of the shape of ``row``, that a batch may hold."""
        seconds = self._seconds_per_row.get(row.shape, math.inf)
        return max(1, min(self.batch_size, int(self.max_pass / seconds)))

    async def _score_pass(self, rows: Sequence[_Waiting]) -> None:
        """Score a batch; if scoring fails, put each row back as a batch of its own, so that only bad rows fail."""
        if not rows:
            return
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
                _finish(rows[0].future, error)
            for waiting in rows:
                if not waiting.future.done():
                    self._waiting[waiting.future] = replace(waiting, group=waiting.future)
        else:
            known, shape = self._seconds_per_row, rows[0].row.shape
            known.pop(shape, None)  # the shapes of the last batches stay
            known[shape] = max(self.busy_seconds / len(rows), 1e-6)
            if len(known) > 1024:
                del known[next(iter(known))]
            for waiting, score in zip(rows, scores, strict=True):
                _finish(waiting.future, score)
        finally:
            self._served += self.busy_seconds / max(1, len(self._requests))
            self._busy_since = None


def _finish(future: asyncio.Future[Scores], result: Scores | Exception) -> None:
    if future.done():  # its request was cancelled
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
