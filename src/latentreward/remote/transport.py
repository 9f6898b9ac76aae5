"""Transport of httpx that ends a request in time, however slowly a server reads and sends.

httpx limits each read and each write of a socket, not their sum. A server that sends a byte of its headers now and then
would keep a request for ever, and no code of the caller runs in the meantime. httpx has no setting for the whole
request, but takes a transport of one's own; httpcore, on which httpx stands, takes a network backend of one's own. So
each wait for the socket gets the time that is left. Timers and the closing of sockets by other threads are not needed.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpcore
import httpx

PART = 16 * 1024
"""Bytes that are written between two looks at the clock, one record of TLS."""


class TimedTransport(httpx.BaseTransport):
    """Connections of which each request, up to the end of its answer, takes as long as its timeout at most.

    Errors are those of httpcore. Names of hosts are looked up by the system, with limits of its own.

    Args:
        secure: Whether the server speaks TLS; certificates are not read without it, which takes a while.
        kept: Number of connections that stay open for later requests.
    """

    def __init__(self, secure: bool, kept: int) -> None:
        self._network = _TimedNetwork()
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False) if secure else None,
            max_connections=None,
            max_keepalive_connections=kept,
            keepalive_expiry=5.0,
            network_backend=self._network,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the thread that sends it also reads the answer."""
        self._network.start(request.extensions["timeout"]["read"])
        url = request.url
        sent = httpcore.Request(
            request.method,
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        reply = self._pool.handle_request(sent)
        return httpx.Response(reply.status, headers=reply.headers, stream=_Body(reply), extensions=reply.extensions)

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """Body of an answer, as httpx takes it."""

    def __init__(self, reply: httpcore.Response) -> None:
        self._reply = reply

    def __iter__(self) -> Iterator[bytes]:
        return self._reply.iter_stream()

    def close(self) -> None:
        self._reply.close()


class _TimedNetwork(httpcore.SyncBackend):
    """Network on which each thread has a time at which its waiting ends."""

    def __init__(self) -> None:
        self._ends = threading.local()

    def start(self, seconds: float) -> None:
        self._ends.at = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, above 0; raise TimeoutException if there are none."""
        left: float = self._ends.at - time.monotonic()
        if left <= 0:
            raise httpcore.TimeoutException
        return left

    def connect_tcp(self, *given: Any, **named: Any) -> httpcore.NetworkStream:
        return _TimedStream(super().connect_tcp(*given, **named | {"timeout": self.left()}), self)


class _TimedStream(httpcore.NetworkStream):
    """Connection on which a wait ends when that of the network does."""

    def __init__(self, stream: httpcore.NetworkStream, network: _TimedNetwork) -> None:
        self._stream, self._network = stream, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._network.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PART):  # httpcore begins the timeout anew whenever the socket took some
            self._stream.write(buffer[start : start + PART], self._network.left())

    def start_tls(self, *given: Any, **named: Any) -> httpcore.NetworkStream:
        return _TimedStream(self._stream.start_tls(*given, **named | {"timeout": self._network.left()}), self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()
