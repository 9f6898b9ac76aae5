"""Passes of the model: who shares one, whose turn it is, who waits how long, what a full queue and a bad row do."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from latentreward.apps.serving.batching import Batcher, RequestError
from latentreward.core.errors import InputError


@dataclass(frozen=True)
class Number:
    value: float
    group: str = "a"


class Model:
    """Doubles numbers; remembers its passes; waits for ``free`` if that is cleared; fails on negative ones."""

    def __init__(self) -> None:
        self.passes: list[list[float]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, rows: Sequence[Number]) -> list[float]:
        self.passes.append([row.value for row in rows])
        assert len({row.group for row in rows}) == 1
        self.free.wait(20)
        if any(row.value < 0 for row in rows):
            raise InputError("negative")
        return [2 * row.value for row in rows]


def run(scenario: Callable[[Batcher, Model], Awaitable[Any]], **options: Any) -> list[list[float]]:
    """Run a scenario on a started batcher, and return the passes of the model."""
    model = Model()

    async def body() -> None:
        given = {"batch_size": 4, "max_wait": 0.05, "queue": 40, "timeout": 60.0, "device": asyncio.Lock(), **options}
        batcher = Batcher(model, **given)
        task = asyncio.create_task(batcher.run())
        try:
            await scenario(batcher, model)
        finally:
            model.free.set()
            task.cancel()
            await asyncio.wait([task])
            assert not batcher.waiting

    asyncio.run(asyncio.wait_for(body(), 30))
    return model.passes


async def busy(batcher: Batcher, model: Model) -> "asyncio.Task[list[float]]":
    """Occupy the thread until ``model.free`` is set."""
    model.free.clear()
    task = asyncio.create_task(batcher.score([Number(1)]))
    while not batcher.busy_seconds:
        await asyncio.sleep(0.001)
    return task


def asked(batcher: Batcher, *values: float, group: str = "a") -> "asyncio.Task[list[float]]":
    return asyncio.create_task(batcher.score([Number(value, group) for value in values]))


async def freed(model: Model, *tasks: "asyncio.Task[list[float]]") -> Any:
    """What comes of the tasks when all of them wait, and the thread is freed."""
    await asyncio.sleep(0.01)
    model.free.set()
    return await asyncio.gather(*tasks)


def test_scores_come_back_to_whom_they_belong() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        rows = [[Number(i), Number(10 + i, "b")] for i in range(5)]
        scores = await asyncio.gather(*map(batcher.score, rows))
        assert scores == [[2 * i, 20 + 2 * i] for i in range(5)]

    assert sorted(map(len, run(scenario))) == [1, 1, 4, 4]


def test_what_arrives_while_the_model_is_busy_becomes_one_pass() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        tasks = [await busy(batcher, model), *(asked(batcher, i) for i in range(6))]
        await freed(model, *tasks)

    assert [*map(len, run(scenario))] == [1, 4, 2]


def test_a_lone_row_waits_for_company_only_so_long() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        start = time.monotonic()
        assert await batcher.score([Number(3)]) == [6]
        assert 0.3 <= time.monotonic() - start < 5
        await asyncio.gather(asked(batcher, 1), asked(batcher, 2, 3, 4))

    assert [*map(len, run(scenario, max_wait=0.3))] == [1, 4]


def test_a_short_request_waits_for_a_pass_of_each_long_one() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        first = await busy(batcher, model)
        long = [asked(batcher, *[value] * 12) for value in (10, 20)]
        await asyncio.sleep(0.01)
        model.free.set()
        while len(model.passes) < 3:
            await asyncio.sleep(0)
        await asyncio.gather(first, *long, asked(batcher, 5, group="b"))

    passes = run(scenario)
    assert passes.index([5]) <= 6 and len(passes) == 8  # though four or five passes of others came first


def test_a_full_queue_refuses_and_tells_when_to_come_back() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        first = await busy(batcher, model)
        waiting = asked(batcher, *range(7))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="7 of 10 places in the queue are taken") as raised:
            await batcher.score([Number(0)] * 4)
        assert raised.value.status_code == 503 and int(raised.value.headers["Retry-After"]) >= 1
        third = asked(batcher, 1, 2, 3)
        await freed(model, first, waiting, third)

    run(scenario, queue=10)


def test_a_request_that_would_wait_too_long_is_refused_at_once() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        await batcher.score([Number(0)])
        batcher._seconds_per_row = 10.0
        first = await busy(batcher, model)
        long = asked(batcher, *range(8))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="8 rows are ahead, which take some 80 seconds") as raised:
            await batcher.score([Number(0)] * 8)
        assert (raised.value.status_code, raised.value.headers) == (503, {"Retry-After": "20"})
        short = asked(batcher, 5)  # its turn comes before that of the last rows
        await freed(model, first, long, short)

    run(scenario)


def test_a_bad_row_fails_alone() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        first = await busy(batcher, model)
        good, bad, other = asked(batcher, 2), asked(batcher, -1, 3), asked(batcher, 4)
        assert await freed(model, first, good, other) == [[2], [4], [8]]
        with pytest.raises(InputError, match="negative"):
            await bad

    assert run(scenario) == [[1], [2, -1, 3, 4], [2], [-1], [3], [4]]


def test_rows_of_a_client_that_left_are_not_scored() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        first = await busy(batcher, model)
        gone, stays = asked(batcher, 7, 8), asked(batcher, 9)
        await asyncio.sleep(0.01)
        gone.cancel()
        assert await freed(model, first, stays) == [[2], [18]]

    assert run(scenario) == [[1], [9]]


def test_rewards_take_turns_on_a_device() -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        other = Batcher(model, 4, 0.0, 40, 60.0, batcher.device)
        task = asyncio.create_task(other.run())
        first = await busy(batcher, model)
        second = asked(other, 2)
        await asyncio.sleep(0.1)
        assert model.passes == [[1]] and len(other.waiting) == 1
        assert await freed(model, first, second) == [[2], [4]]
        task.cancel()
        await asyncio.wait([task])

    run(scenario)
