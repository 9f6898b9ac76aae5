"""Endpoints of ``latentreward serve``, what is refused before them, and how the server starts and ends."""

import asyncio
import base64
import contextlib
import hmac
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentreward import __version__
from latentreward.apps.serving import bodies
from latentreward.apps.serving.batching import RequestError
from latentreward.apps.serving.bodies import JSON, SAFETENSORS, check_limit
from latentreward.apps.serving.dialects import flow_factory_routes, unirl_routes
from latentreward.apps.serving.service import ScoringService
from latentreward.apps.serving.settings import is_loopback

CONNECTIONS = 512  # least limit on the number of connections; twice the queues if that is more
IDLE_SECONDS = 10  # that a client may take to send the headers of a request, or leave a connection idle
LOGGED_EVERY_S = 60.0  # seconds after which a refusal of the same path and status is printed again
VERSION = "x-drm-protocol-version"  # header of verl-omni's protocol
OPEN_PATH = "/healthz"  # path that needs no token
OF_REWARD = re.compile(r"^/rewards/[^/]+(?=/)")  # start of the path of a route of one reward


def reward_routes(service: ScoringService) -> APIRouter:
    """Return the routes of a reward, which may stand below ``/rewards/NAME``."""
    router = APIRouter()

    @router.get("/v1/model", summary="What a reward takes")
    async def model(request: Request) -> JSONResponse:
        return JSONResponse(service.model_of(request).describe())

    async def scored(request: Request, parse: Callable[..., Any], *given: Any) -> tuple[Any, dict[str, list[float]]]:
        """Return what ``parse`` makes of the body, rows or a pair that begins with them, and the rows' scores."""
        model = service.model_of(request)
        async with service.memory.body(request, service.settings, SAFETENSORS) as (body, _):
            parsed = await asyncio.to_thread(parse, body, model.accepted, *given)
            rows = parsed if isinstance(parsed, list) else parsed[0]
            return parsed, model.columns(await model.score(request, rows))

    @router.post("/v1/score", summary="verl-omni's latent-reward protocol, version 1")
    async def score(request: Request) -> JSONResponse:
        # verl_omni/utils/reward_score/latent_http_scorer_client.py (Apache-2.0); it sends one row.
        if (version := request.headers.get(VERSION)) != "1":
            raise RequestError(f"header {VERSION} is {version!r:.20}; this server speaks version 1")
        _, columns = await scored(request, bodies.parse_request)
        return JSONResponse({"protocol_version": "1", "raw_scores": columns.pop("scores"), **columns})

    @router.post("/v1/score_latents", summary="Score clean latents for raw prompts")
    async def score_latents(request: Request) -> JSONResponse:
        reward = service.model_of(request).reward
        rows, columns = await scored(request, bodies.parse_latents)
        noise = str(reward.noise) if rows[0].u is None else "u"
        return JSONResponse({**columns, "noise": noise, "model": reward.identity})

    @router.post("/v1/score_states", summary="Score the noisy states of trajectories")
    async def score_states(request: Request) -> JSONResponse:
        reward = service.model_of(request).reward
        (rows, steps), columns = await scored(request, bodies.parse_states, reward.backbone.noise_process)
        starts = range(0, len(rows), steps)
        parted = {name: [one[start : start + steps] for start in starts] for name, one in columns.items()}
        return JSONResponse({**parted, "model": reward.identity})

    @router.post("/v1/score_images", summary="Score images for prompts")
    async def score_images(request: Request) -> JSONResponse:
        model = service.model_of(request)
        async with service.memory.body(request, service.settings, JSON) as (body, take):
            images = await asyncio.to_thread(bodies.images_of_json, body)
            check_limit("images: rows", len(images), model.accepted.max_rows)
            columns = model.columns(await model.score_images(request, images, take))
        return JSONResponse({**columns, "noise": str(model.reward.noise), "model": model.reward.identity})

    return router


def server_routes(service: ScoringService) -> APIRouter:
    """Return the routes of the whole server."""
    router = APIRouter()

    @router.get("/v1/rewards", summary="What each reward takes")
    async def rewards() -> JSONResponse:
        return JSONResponse({"rewards": [model.describe() for model in service.models.values()]})

    @router.get(OPEN_PATH, summary="Whether the server is ready; needs no token")
    async def health() -> JSONResponse:
        """Answer 503 if one pass takes longer than the request timeout, or scoring has stopped."""
        return JSONResponse({"live": True, "ready": service.ready}, 200 if service.ready else 503)

    @router.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def create_app(service: ScoringService) -> FastAPI:
    """Create the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in service.models.values():
            model.task = asyncio.create_task(model.batcher.run())
        yield
        tasks = [model.task for model in service.models.values() if model.task]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    app = FastAPI(title="latentreward serve", version=__version__, lifespan=lifespan, redoc_url=None)
    general = server_routes(service)
    app.include_router(general)
    routers = [make(service) for make in (reward_routes, unirl_routes, flow_factory_routes)]
    for router in routers:
        app.include_router(router)
        app.include_router(router, prefix="/rewards/{reward}")
    paths = {str(getattr(route, "path", "")) for router in (general, *routers) for route in router.routes}

    @app.exception_handler(RequestError)
    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: RequestError | HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)  # uvicorn prints the traceback
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"the server failed ({type(error).__name__})"}, 500)

    app.add_middleware(Gate, service=service, paths=paths)
    return app


class Gate:
    """ASGI middleware that refuses requests before their bodies are read, and counts all of them.

    All ``paths`` that are not known are counted together as ``other``. A refusal is printed, since some clients never
    show it: one of a path and status in :data:`LOGGED_EVERY_S`.
    """

    def __init__(self, app: ASGIApp, service: ScoringService, paths: set[str]) -> None:
        self.app, self.service, self.paths = app, service, paths
        self._told: dict[tuple[str, int], float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection, as the ASGI specification defines."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, start, path = 500, time.monotonic(), OF_REWARD.sub("", scope["path"])
        path = path if path in self.paths else "other"

        async def send_counted(message: Message) -> None:
            nonlocal status
            status, now = message.get("status", status), time.monotonic()
            refused = status >= 400 and message["type"] == "http.response.body"
            if refused and now - self._told.get((path, status), -LOGGED_EVERY_S) >= LOGGED_EVERY_S:
                self._told[path, status] = now
                print(f"refused with {status}: {path} {message['body'].decode()[:300]}", file=sys.stderr, flush=True)
            await send(message)

        if scope["method"] == "HEAD":  # answered as GET; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        try:
            await (self._refusal(scope) or self.app)(scope, receive, send_counted)
        finally:
            self.service.requests.labels(path, status).inc()
            self.service.seconds.labels(path).observe(time.monotonic() - start)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, token = dict(scope["headers"]), self.service.settings.token
        if {b"transfer-encoding", b"content-length"} <= headers.keys():
            error = "give either Transfer-Encoding or Content-Length; a request with both may hide another"
            return JSONResponse({"error": error}, 400, {"Connection": "close"})
        if scope["path"] == OPEN_PATH:
            return None
        if token is None:
            places = headers.get(b"host", b"localhost"), headers.get(b"origin", b"//localhost").partition(b"//")[2]
            if not is_loopback((scope["server"] or ("",))[0]) or all(map(names_this_machine, places)):
                return None
            error = (
                "the header Host or Origin names another machine; without a token this server answers only localhost, "
                "loopback addresses and the machine's own name: set token_file or LATENTREWARD_TOKEN, or let a proxy "
                "send Host: localhost and no Origin"
            )
            return JSONResponse({"error": error}, 403)
        if not hmac.compare_digest(token_of(headers.get(b"authorization", b"")), token.encode()):
            error = "give this server's token in the header Authorization: Bearer TOKEN, or as password in the URL"
            return JSONResponse({"error": error}, 401, {"WWW-Authenticate": 'Bearer, Basic realm="latentreward"'})
        return None


@lru_cache
def names_this_machine(place: bytes) -> bool:
    """Tell whether a place, with or without a port, is ``localhost``, a loopback address, or this machine's own name.

    A page elsewhere may ask this machine (its ``Origin`` tells), or reach the server by a name of its own that it lets
    point to this machine (the ``Host``), and then read the answers too.
    """
    found = re.fullmatch(r"([\w.-]+|\[([\w:.%-]+)\])(:\d+)?", place.decode("latin-1"))
    host = found and (found[2] or found[1].lower())  # no user, path or blank
    return bool(host) and (host in ("localhost", socket.gethostname().lower()) or is_loopback(host))


def token_of(authorization: bytes) -> bytes:
    """Return the token of the header ``Authorization``: that after ``Bearer``, or the password after ``Basic``.

    HTTP clients send ``Basic`` for addresses such as ``http://:TOKEN@host:8000``, which clients of other frameworks
    take where they have no setting for a token.
    """
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":  # in whatever case, RFC 9110, section 11.1
        return value
    with contextlib.suppress(ValueError):
        return base64.b64decode(value, validate=True).partition(b":")[2] if kind.lower() == b"basic" else b""
    return b""


class Protocol(H11Protocol):
    """HTTP protocol of uvicorn, which would wait without a limit for headers that have begun, or never do."""

    def connection_made(self, transport: Any) -> None:
        """Close the connection if no request begins in time."""
        super().connection_made(transport)
        self.loop.call_later(IDLE_SECONDS, self._close_after, self.cycle)

    def on_response_complete(self) -> None:
        """Close the connection if no other request begins in time."""
        self.loop.call_later(IDLE_SECONDS, self._close_after, self.cycle)
        super().on_response_complete()

    def _close_after(self, last: Any) -> None:
        if self.cycle is last:  # no request has begun since
            self.transport.close()


def configuration(service: ScoringService) -> uvicorn.Config:
    """Return uvicorn's settings for a service."""
    return uvicorn.Config(
        create_app(service),
        http=Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_level=logging.ERROR,
        limit_concurrency=max(CONNECTIONS, 2 * len(service.models) * service.settings.queue),
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(service.settings.timeout) + 1,
    )


def serve_until_stopped(service: ScoringService, bound: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish requests in progress, for up to the request timeout.

    Prints each reward, and ``serving NAMES at URL`` once clients can connect.
    """
    server = uvicorn.Server(configuration(service))
    # Until uvicorn sets this handler itself, and after its shutdown, when it raises the caught signal again.
    previous = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        bound.listen()
        host, port = bound.getsockname()[:2]
        for model in service.models.values():
            print(f"{model.name}: {model.reward.identity}, on {model.reward.device}")
        names = ", ".join(service.models)
        print(f"serving {names} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, previous)
