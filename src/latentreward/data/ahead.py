"""Work that is done by threads before it is asked for."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, threads: int = 1
) -> Generator[Result, None, None]:
    """Yield ``function`` of each item, in order.

    Args:
        function: Called in a thread, such as one that decodes an image.
        items: Arguments; taken by the calling thread.
        ahead: Results to compute before the one that is asked for.
        threads: Threads that compute.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
