"""Network of httpcore that ends a request in time, however slowly a server reads and sends.

httpcore limits each read and each write of a socket, not their sum. A server that sends a byte of its headers now and
then would keep a request for ever, and no code of the caller runs in the meantime. httpcore has no setting for the
whole request, but takes a network backend of one's own. So each wait for the socket gets the time that is left. Timers
and the closing of sockets by other threads are not needed.
"""

import socket
import threading
import time
from typing import Any

import httpcore

PART = 16 * 1024  # bytes that are written between two looks at the clock, one record of TLS


class TimedNetwork(httpcore.SyncBackend):
    """Network on which the waiting of each thread ends at a time of its own.

    Names of hosts are looked up by the system, with limits of its own.
    """

    def __init__(self) -> None:
        self._ends = threading.local()

    def start(self, seconds: float) -> None:
        """End the waiting of this thread, which sends a request and reads its answer, after so many seconds."""
        self._ends.at = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, above 0; raise TimeoutException if there are none."""
        left: float = self._ends.at - time.monotonic()
        if left <= 0:
            raise httpcore.TimeoutException
        return left

    def connect_tcp(self, host: str, port: int, *given: Any, **named: Any) -> httpcore.NetworkStream:
        """Connect to a server within the time that is left; each address of the host gets an equal share of it."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        # A single address keeps its name, which may hold the interface of a link-local one.
        addresses = [host] if len(found) == 1 else [str(address[0]) for *_, address in found]
        while True:
            timed = named | {"timeout": self.left() / len(addresses)}
            try:
                return _TimedStream(super().connect_tcp(addresses.pop(0), port, *given, **timed), self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if not addresses:
                    raise


class _TimedStream(httpcore.NetworkStream):
    """Connection on which a wait ends when that of the network does."""

    def __init__(self, stream: httpcore.NetworkStream, network: TimedNetwork) -> None:
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
