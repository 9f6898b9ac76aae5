"""Bodies of requests: size and time are limited while they come in, and the memory of all of them together."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from latentreward.serving.errors import RequestError


class MemoryBudget:
    """Bytes that all requests together may hold.

    Args:
        total: Number of bytes.
    """

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0

    def take(self, size: int, beside: int = 0) -> None:
        """Hold ``size`` more bytes for a request that holds ``beside`` bytes already.

        Raises:
            RequestError: If there are not so many left (503), or the request alone needs more than there are (413).
        """
        if beside + size > self.total:
            needed = f"the request needs {beside + size} bytes of memory, and this server has {self.total} for requests"
            raise RequestError(f"{needed}; send fewer or smaller images or latents", 413)
        if self.held + size > self.total:
            raise RequestError("requests of this size fill the server's memory just now; try later", 503, 1)
        self.held += size

    @contextmanager
    def hold(self, size: int, beside: int = 0) -> Iterator[None]:
        """Hold ``size`` more bytes while the context lasts; see :meth:`take`."""
        self.take(size, beside)
        try:
            yield
        finally:
            self.held -= size


class BodyReader:
    """Reads bodies into memory.

    Args:
        max_bytes: Longest body.
        timeout: Seconds that a body may take to arrive.
        memory: What they are held in.
    """

    def __init__(self, max_bytes: int, timeout: float, memory: MemoryBudget) -> None:
        self.max_bytes, self.timeout, self.memory = max_bytes, timeout, memory

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body, whose memory is held while the context lasts.

        Raises:
            RequestError: If it is too long (413), too slow (408), cut off (400), or there is no memory for it (503).
        """
        body = bytearray()
        try:
            await self._collect(request, body)
            yield body
        finally:
            self.memory.held -= len(body)

    async def _collect(self, request: Request, body: bytearray) -> None:
        if int(request.headers.get("content-length", "0")) > self.max_bytes:
            raise self._too_long()
        try:
            async with asyncio.timeout(self.timeout):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self.max_bytes:
                        raise self._too_long()
                    self.memory.take(len(chunk))
                    body += chunk
        except TimeoutError as error:
            raise RequestError(f"the body took more than {self.timeout:g} seconds to arrive", 408) from error
        except ClientDisconnect as error:
            raise RequestError("the connection ended before the body did") from error

    def _too_long(self) -> RequestError:
        return RequestError(f"the body is longer than this server's limit of {self.max_bytes} bytes", 413)
