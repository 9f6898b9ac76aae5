"""Passes of the model: who shares one, whose turn it is, who waits how long, what a full queue and a bad row do."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from latentreward.apps.serving.batching import MicroBatcher
from latentreward.apps.serving.refusals import RequestError
from latentreward.core.errors import InputError
from tests.marks import slow_after


@dataclass(frozen=True)
class Number:
    value: float
    group: str = "a"

    @property
    def shape(self) -> str:
        return self.group


class Model:
    """Doubles numbers; remembers its batches; waits for ``free`` if that is cleared; fails on negative ones."""

    def __init__(self, held: int | None = None) -> None:
        self.batches: list[list[Number]] = []
        self.held = held  # number of the batch, from 0, that clears ``free``; None if none does
        self.free = threading.Event()
        self.free.set()

    def __call__(self, rows: Sequence[Number]) -> list[float]:
        if len(self.batches) == self.held:
            self.free.clear()
        self.batches.append(list(rows))
        self.free.wait(20)
        if any(row.value < 0 for row in rows):
            raise InputError("negative")
        return [2 * row.value for row in rows]


def run(scenario: Callable[[MicroBatcher, Model], Awaitable[Any]], model: Model | None = None, **options: Any) -> Model:
    """Run a scenario on a started batcher."""
    model = model or Model()

    async def body() -> None:
        batcher = MicroBatcher(model, **{"batch_size": 4, "max_wait": 0.05, "queue": 10, "max_pass": 60, **options})
        batcher.start()
        try:
            await scenario(batcher, model)
        finally:
            model.free.set()
            await batcher.stop()

    asyncio.run(asyncio.wait_for(body(), 30))
    return model


async def busy(batcher: MicroBatcher, model: Model) -> "asyncio.Task[list[float]]":
    """Occupy the worker until ``model.free`` is set."""
    model.free.clear()
    task = asyncio.create_task(batcher.score([Number(1)]))
    while not batcher.busy_seconds:
        await asyncio.sleep(0.001)
    return task


def seconds_of(monkeypatch: pytest.MonkeyPatch, model: Model, **seconds: float) -> None:
    """Tell the batcher how long a row of each group takes; how long it does depends on what else the machine does."""
    told = property(lambda batcher: sum(seconds.get(row.group, 0.1) for row in model.batches[-1]))
    monkeypatch.setattr(MicroBatcher, "busy_seconds", told)


def test_scores_come_back_to_whom_they_belong() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        asked = [[Number(i), Number(10 + i, "b")] for i in range(5)]
        scores = await asyncio.gather(*(batcher.score(rows) for rows in asked))
        assert scores == [[2 * i, 20 + 2 * i] for i in range(5)]

    model = run(scenario)
    assert all(len({row.group for row in batch}) == 1 for batch in model.batches)
    assert sum(map(len, model.batches)) == 10 and max(map(len, model.batches)) == 4


def test_what_arrives_while_the_model_is_busy_becomes_one_batch() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        first = await busy(batcher, model)
        others = [asyncio.create_task(batcher.score([Number(i)])) for i in range(6)]
        await asyncio.sleep(0.01)
        assert batcher.waiting == 6
        model.free.set()
        await asyncio.gather(first, *others)

    assert list(map(len, run(scenario).batches)) == [1, 4, 2]


def test_a_lone_row_waits_for_company_only_so_long() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        await batcher.score([Number(0)])
        start = time.monotonic()
        assert await batcher.score([Number(3)]) == [6]
        assert 0.2 <= time.monotonic() - start < 2

    run(scenario, max_wait=0.2)


def test_a_full_batch_does_not_wait() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        await asyncio.wait_for(batcher.score([Number(0)]), 5)  # now the shape is measured
        await asyncio.wait_for(batcher.score([Number(i) for i in range(4)]), 5)

    assert list(map(len, run(scenario, max_wait=60).batches)) == [1, 4]


@pytest.mark.parametrize(
    ("max_pass", "sizes"), slow_after(1, [(0.25, [1, 2, 2, 2]), (60, [1, 4, 2]), (0.001, [1] * 7)])
)
def test_a_pass_holds_what_its_time_limit_allows(
    max_pass: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    seconds_of(monkeypatch, model)

    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        assert await batcher.score([Number(i) for i in range(7)]) == [2 * i for i in range(7)]

    assert list(map(len, run(scenario, model, max_pass=max_pass).batches)) == sizes


@pytest.mark.parametrize("groups", ["aaab", "aaaa", "abcd"])
@pytest.mark.parametrize("client", ["first", "second"])
@pytest.mark.parametrize("served", slow_after(1, [1, 40]))
def test_a_short_request_starts_within_two_passes_of_three_long_ones(
    groups: str, client: str, served: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(held=served)
    seconds_of(monkeypatch, model)

    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        long = [asyncio.create_task(batcher.score([Number(1, group)] * 64, "first")) for group in groups[:3]]
        while len(model.batches) <= served:
            await asyncio.sleep(0.001)
        short = asyncio.create_task(batcher.score([Number(7, groups[3])], client))
        await asyncio.sleep(0.001)
        model.free.set()
        assert await short == [14]
        started = [Number(7, groups[3]) in batch for batch in model.batches[served:]].index(True) + 1
        assert started <= 2
        assert (await asyncio.gather(*long)) == [[2] * 64] * 3

    run(scenario, model, queue=200, max_pass=0.2)


def test_clients_share_the_model_by_seconds_not_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    seconds_of(monkeypatch, model, large=1.0)

    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        for group in ("large", "small"):  # measured
            await batcher.score([Number(0, group)], "first")
        await asyncio.gather(
            batcher.score([Number(0, "large")] * 5, "large"), batcher.score([Number(0, "small")] * 20, "small")
        )

    groups = [batch[0].group for batch in run(scenario, model, batch_size=1, queue=30).batches[2:]]
    assert groups.index("large") >= 10  # as many rows later as a large one takes longer
    assert groups[:20].count("small") >= 18


def test_a_stream_of_short_requests_does_not_starve_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    seconds_of(monkeypatch, model)

    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        async def keep_asking(group: str) -> None:
            while not long.done():
                await batcher.score([Number(0, group)], group)

        long = asyncio.create_task(batcher.score([Number(1, "long")] * 8, "long"))
        await asyncio.gather(long, *(keep_asking(group) for group in "abcd"))

    rows = [row.group for batch in run(scenario, model, batch_size=1, queue=20).batches for row in batch]
    last = max(number for number, group in enumerate(rows) if group == "long")
    assert last < 8 * 5 + 10  # as if five clients were served at once, and some


def test_a_client_of_many_requests_leaves_others_their_turn() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        first = await busy(batcher, model)
        many = [asyncio.create_task(batcher.score([Number(i, str(i))], "greedy")) for i in range(50)]
        await asyncio.sleep(0.06)
        other = asyncio.create_task(batcher.score([Number(0, "other")], "other"))
        await asyncio.sleep(0.01)
        model.free.set()
        await asyncio.gather(first, other, *many)

    groups = [batch[0].group for batch in run(scenario, queue=100).batches]
    assert groups.index("other") <= 3


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        first = await busy(batcher, model)
        waiting = asyncio.create_task(batcher.score([Number(i) for i in range(9)]))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="9 of 10 places") as caught:
            await batcher.score([Number(1), Number(2)])
        assert caught.value.status == 503 and caught.value.retry_after >= 1
        last = asyncio.create_task(batcher.score([Number(5)]))
        model.free.set()
        await asyncio.gather(first, waiting, last)

    run(scenario)


def test_cancelled_rows_are_never_scored_and_leave_the_queue() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        first = await busy(batcher, model)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.score([Number(8), Number(9, "b")]), 0.02)
        assert batcher.waiting == 0
        model.free.set()
        await first
        assert await batcher.score([Number(2)]) == [4]

    assert run(scenario).batches == [[Number(1)], [Number(2)]]


def test_a_bad_row_spoils_no_other() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        first = await busy(batcher, model)
        good = asyncio.create_task(batcher.score([Number(2)]))
        bad = asyncio.create_task(batcher.score([Number(4), Number(-1)]))
        await asyncio.sleep(0.01)
        model.free.set()
        assert await good == [4]
        with pytest.raises(InputError, match="negative"):
            await bad
        assert await first == [2] and await batcher.score([Number(5)]) == [10]

    run(scenario)


def test_rows_of_a_failed_batch_that_nobody_waits_for_are_not_tried_again() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        await batcher.score([Number(1)])
        model.free.clear()
        gone = asyncio.create_task(batcher.score([Number(2), Number(3)]))
        good = asyncio.create_task(batcher.score([Number(4), Number(-1)]))
        while not batcher.busy_seconds:
            await asyncio.sleep(0.001)
        gone.cancel()
        await asyncio.sleep(0.01)
        model.free.set()
        with pytest.raises(InputError, match="negative"):
            await good

    batches = run(scenario).batches
    assert len(batches[1]) == 4 and batches[2:] == [[Number(4)], [Number(-1)]]


class OneScoreTooFew(Model):
    """Forgets the last row, unless all numbers are 7."""

    def __call__(self, rows: Sequence[Number]) -> list[float]:
        scores = super().__call__(rows)
        return scores if {row.value for row in rows} == {7} else scores[:-1]


def test_a_model_that_forgets_a_row_fails_its_batch_but_not_the_worker() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        for rows in ([Number(1)], [Number(1), Number(2), Number(3)]):
            with pytest.raises(ValueError, match="0 scores for 1 rows"):
                await asyncio.wait_for(batcher.score(rows), 5)
        assert batcher.running
        assert await asyncio.wait_for(batcher.score([Number(7)]), 5) == [14]

    run(scenario, OneScoreTooFew())


def test_an_observer_that_raises_fails_its_batch_but_not_the_worker() -> None:
    def observe(size: int) -> None:
        if size == 2:
            raise KeyError(size)

    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        await batcher.score([Number(0)])
        with pytest.raises(KeyError):
            await asyncio.wait_for(batcher.score([Number(1), Number(2)]), 5)
        assert batcher.running and await asyncio.wait_for(batcher.score([Number(3)]), 5) == [6]

    run(scenario, observe=observe)


class Exits(Model):
    def __call__(self, rows: Sequence[Number]) -> list[float]:
        raise asyncio.CancelledError


def test_a_batcher_that_is_not_started_or_dead_is_not_running() -> None:
    async def scenario(batcher: MicroBatcher, model: Model) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.score([Number(1)]), 0.5)
        assert not batcher.running

    assert not MicroBatcher(Model(), batch_size=1, max_wait=0, queue=1, max_pass=1).running
    run(scenario, Exits())
