"""The HTTP server around the application: sockets, limits on slow clients, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentreward.serving.app import HEADER_BYTES, create_app, requests_at_once
from latentreward.serving.service import ScoringService

HEADER_SECONDS = 10.0
"""How long a client may take over the head of a request, and a connection may lie idle."""
CONNECTIONS_PER_REQUEST = 2
"""Connections open for each request that may be under way; beyond them, that which is idle longest is closed."""


class IdleTimeoutProtocol(H11Protocol):
    """Closes connections on which no request begins in time; uvicorn itself would wait for ever for a header.

    Uvicorn's ``limit_concurrency`` counts idle connections too, and then refuses all requests, /healthz included: here
    a connection too many takes the place of an idle one instead.
    """

    max_connections: int
    """Connections open at once."""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock, and make room."""
        super().connection_made(transport)
        self._restart()
        still_open = [connection for connection in self.connections if not connection.transport.is_closing()]
        if len(still_open) > self.max_connections:
            idle = [connection for connection in still_open if connection.idle and connection is not self]
            min(idle, key=lambda connection: connection._deadline.when(), default=self).transport.close()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Start the clock again for the next request."""
        super().on_response_complete()
        self._restart()

    def _restart(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.idle:
            self.transport.close()


def configuration(service: ScoringService) -> uvicorn.Config:
    """Settings of uvicorn for a service."""

    class LimitedProtocol(IdleTimeoutProtocol):
        max_connections = CONNECTIONS_PER_REQUEST * requests_at_once(service)

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
    """Answer requests until SIGTERM or SIGINT; what is under way then is finished, for up to the request timeout.

    Prints ``serving MODEL at URL`` as soon as clients can connect, then the first seed of fresh noise.
    """
    host, port = bound.getsockname()[:2]
    bound.listen()
    print(f"serving {service.reward.identity} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if service.first_seed is not None:
        print(f"latents without a seed get fresh noise, by the seeds from {service.first_seed} on", flush=True)
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn raises what it caught again, once it is done
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(configuration(service)).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, previous)
