"""Reading of request bodies with limits on size, on time, and on the memory of all requests together."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from latentreward.apps.serving.refusals import RequestError

JSON = "application/json"
FORM = "multipart/form-data"
SAFETENSORS = "application/octet-stream"
SLOW_S = 2.0  # seconds after which a body may have to make room for others


def check_type(request: Request, *types: str) -> str:
    """Return the content type of a request; RequestError (415) if it is not one of ``types``, or is compressed."""
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise RequestError(f"content-encoding is {encoding[:40]!r}; send the body uncompressed", 415)
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in types:
        raise RequestError(f"content-type is {found[:40]!r}; send {' or '.join(types)}", 415)
    return found


class MemoryBudget:
    """A budget of memory for all requests together, in bytes."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0  # bytes taken at present

    def take(self, size: int, beside: int = 0) -> None:
        """Take ``size`` bytes for a request that has already taken ``beside`` bytes.

        Raises:
            RequestError: With status 503 if too few bytes are left at present; with status 413 if the request alone
                exceeds the whole budget.
        """
        if beside + size > self.total:
            needed = f"the request needs {beside + size} bytes of memory, and this server has {self.total} for requests"
            raise RequestError(f"{needed}; send fewer or smaller images or latents, or raise --max_body_mb", 413)
        if self.held + size > self.total:
            raise RequestError("requests of this size fill the server's memory just now; try later", 503, 1)
        self.held += size

    @contextmanager
    def hold(self, size: int, beside: int = 0) -> Iterator[None]:
        """Take ``size`` bytes for the duration of the context; see :meth:`take`."""
        self.take(size, beside)
        try:
            yield
        finally:
            self.held -= size


class BodyReader:
    """Reads bodies of requests into memory.

    Where requests or memory are used up, the body that arrives most slowly makes room: a client that sends headers and
    no bodies should not keep others out. A body may have ``max_bytes``, and ``timeout`` seconds to arrive.
    """

    def __init__(self, max_bytes: int, timeout: float, memory: MemoryBudget) -> None:
        self.max_bytes, self.timeout, self.memory = max_bytes, timeout, memory
        self._arriving: dict[asyncio.Timeout, tuple[float, bytearray]] = {}

    def make_room(self, besides: asyncio.Timeout | None = None) -> bool:
        """Give up the body that arrives most slowly, if it has had :data:`SLOW_S`; return whether there is one."""
        now = asyncio.get_running_loop().time()
        rates = {
            limit: len(body) / (now - began)
            for limit, (began, body) in self._arriving.items()
            if now - began >= SLOW_S and limit is not besides
        }
        if not rates:
            return False
        slowest = min(rates, key=lambda limit: rates[limit])
        del self._arriving[slowest]
        slowest.reschedule(now)
        return True

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body; its bytes count against the memory budget until the context ends.

        Raises:
            RequestError: With status 413 if the body is too long, 408 if it arrives too slowly, 400 if the connection
                ends too early, 503 if memory is used up, also by the faster bodies of others.
        """
        arrived, body = bytearray(), b""
        try:
            await self._collect(request, arrived)
            body = bytes(arrived)  # what parsers of other libraries take
            arrived.clear()
            yield body
        finally:
            self.memory.held -= len(body) + len(arrived)

    async def _collect(self, request: Request, body: bytearray) -> None:
        most = f"this server's limit of {self.max_bytes} bytes"
        remedy = "send less at once, or raise the server's --max_body_mb"

        def too_long() -> RequestError:
            # Not made before it is raised: an error that its own frame knows keeps the body until a full collection.
            return RequestError(f"the body is longer than {most}; {remedy}", 413)

        if int(request.headers.get("content-length", "0")) > self.max_bytes:
            raise too_long()
        loop = asyncio.get_running_loop()
        began, limit = loop.time(), asyncio.timeout(self.timeout)
        try:
            async with limit:
                self._arriving[limit] = began, body
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self.max_bytes:
                        raise too_long()
                    await self._take(len(chunk), limit)
                    body += chunk
        except TimeoutError as error:
            if loop.time() < began + self.timeout:
                raise RequestError("the body arrived more slowly than others that need its room", 503, 1) from error
            raise RequestError(f"the body took more than {self.timeout:g} seconds to arrive", 408) from error
        except ClientDisconnect as error:
            raise RequestError("the connection ended before the body did") from error
        finally:
            self._arriving.pop(limit, None)

    async def _take(self, size: int, limit: asyncio.Timeout) -> None:
        """Take memory for a part of a body, after that of a slower one if there is no other."""
        try:
            self.memory.take(size)
        except RequestError:
            if not self.make_room(besides=limit):
                raise
            await asyncio.sleep(0.05)  # in which the request that was given up frees its memory
            self.memory.take(size)
