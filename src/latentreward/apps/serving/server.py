"""HTTP server of the application: sockets, limits on slow clients, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentreward.apps.serving.app import HEADER_BYTES, create_app, requests_at_once
from latentreward.apps.serving.served import ScoringService

HEADER_SECONDS = 10.0  # seconds that a client may take to send the headers of a request, or leave a connection idle
STALL_SECONDS = 5.0  # seconds that a client may take to read what uvicorn keeps at most of answers for it, 64 KiB
CHUNKS, CHUNK_BYTES = 512, 64
"""Number of chunks in one read of a connection from which on they must have so many bytes on average."""


class IdleTimeoutProtocol(H11Protocol):
    """HTTP protocol of uvicorn that closes idle connections after a timeout, or when too many are open.

    Uvicorn itself waits without a limit for the headers of a request, and for a client that does not read its answers.
    Its ``limit_concurrency`` would not help: it counts idle connections too and, once reached, refuses all requests,
    those to /healthz included. Here a new connection beyond the limit closes the connection that has been idle longest.
    A client that sends many requests ahead of their answers, or a body in tiny chunks, is cut off: each request and
    each chunk takes time of the event loop, in which nobody else is served.
    """

    max_connections: int  # greatest number of open connections
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the idle timeout; if too many connections are open, close the longest idle one, or else this one."""
        super().connection_made(transport)
        self._restart()
        still_open = [connection for connection in self.connections if not connection.transport.is_closing()]
        if len(still_open) > self.max_connections:
            idle = [connection for connection in still_open if connection.idle and connection is not self]
            min(idle, key=lambda connection: connection._deadline.when(), default=self)._close()

    def data_received(self, data: bytes) -> None:
        """Refuse a body in tiny chunks, each of which has two line breaks."""
        chunked = str(self.conn.their_state) == "SEND_BODY" and (b"transfer-encoding", b"chunked") in self.headers
        if chunked and (lines := data.count(b"\r\n")) > 2 * CHUNKS and len(data) < lines // 2 * CHUNK_BYTES:
            self.transport.abort()
            return
        super().data_received(data)

    def pause_writing(self) -> None:
        """Give the client a limited time to read its answers."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """End that time."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    @property
    def idle(self) -> bool:
        """Whether no request of this connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Restart the idle timeout for the next request; close a connection that sends on but reads no answers."""
        waiting = len(self.conn.trailing_data[0])
        if waiting > 4096 or (waiting and self.transport.get_write_buffer_size()):
            self._close()
        super().on_response_complete()
        self._restart()

    def _restart(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEADER_SECONDS, lambda: self._close() if self.idle else None)

    def _close(self) -> None:
        """Close the connection, in limited time: asyncio would wait for the client to read the rest of its answers."""
        self.transport.close()
        self.loop.call_later(STALL_SECONDS, self.transport.abort)


def configuration(service: ScoringService) -> uvicorn.Config:
    """Return uvicorn's settings for a service."""

    class LimitedProtocol(IdleTimeoutProtocol):
        max_connections = 2 * requests_at_once(service)

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a line for each faulty form would fill the log
    return uvicorn.Config(
        create_app(service),
        http=LimitedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_level=logging.ERROR,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=int(HEADER_SECONDS),
        timeout_graceful_shutdown=int(service.settings.timeout) + 1,
    )


def serve(service: ScoringService, bound: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish requests in progress, for up to the request timeout.

    Prints ``serving MODEL at URL`` once clients can connect, with the names of several rewards for the model, and under
    ``fresh_noise`` the first seed of each.
    """
    server = uvicorn.Server(configuration(service))
    # Until uvicorn sets this handler itself, and after its shutdown, when it raises the caught signal again.
    previous = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        bound.listen()
        tell_address(service, bound)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, previous)


def tell_address(service: ScoringService, bound: socket.socket) -> None:
    """Print the models, the address, and the first seeds of fresh noise; see :func:`serve`."""
    host, port = bound.getsockname()[:2]
    models = list(service.models.values())
    several = len(models) > 1
    for model in models if several else ():
        print(f"{model.name}: {model.reward.identity}, on {model.reward.device}", flush=True)
    served = ", ".join(service.models) if several else models[0].reward.identity
    print(f"serving {served} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    for model in models:
        if model.first_seed is not None:
            told = f"{model.name}: " if several else ""
            print(f"{told}latents without a seed get fresh noise, by the seeds from {model.first_seed} on", flush=True)
