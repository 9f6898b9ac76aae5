"""HTTP endpoints of ``latentreward serve``."""

import asyncio
import base64
import hmac
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentreward import __version__
from latentreward.apps.serving.addresses import is_loopback, names_this_machine
from latentreward.apps.serving.dialects import Dialect
from latentreward.apps.serving.dialects.flow_factory import FlowFactory
from latentreward.apps.serving.dialects.unirl import UniRL
from latentreward.apps.serving.images import Images
from latentreward.apps.serving.prompted_latents import PromptedLatents
from latentreward.apps.serving.protocol import VerlOmni
from latentreward.apps.serving.refusals import RefusalLog, RequestError
from latentreward.apps.serving.routes import Route, add_routes
from latentreward.apps.serving.served import ScoringService
from latentreward.core.errors import InputError, printable
from latentreward.core.registry import import_class

HEADER_BYTES = 16 * 1024  # greatest total length of a request's headers, in bytes
REQUESTS = 256  # least limit on the number of requests in progress; see requests_at_once
OPEN_PATH = "/healthz"  # path that needs no token
OF_REWARD = re.compile(r"^/rewards/[^/]+(?=/)")  # start of the path of a route of one reward

LOG = RefusalLog()


def create_app(service: ScoringService) -> FastAPI:
    """Create the application, without FastAPI's documentation pages, which load scripts from the network."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in service.models.values():
            model.batcher.start()
        yield
        await asyncio.gather(*(model.batcher.stop() for model in service.models.values()))

    title, secured = "latentreward serve", Security(HTTPBearer(auto_error=False))  # for the description
    app = FastAPI(
        title=title, version=__version__, dependencies=[secured], lifespan=lifespan, docs_url=None, redoc_url=None
    )
    routes = routes_of(service)
    add_routes(app, routes, list(service.models))

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _answer(" ".join(str(error).split()), error.status, headers)

    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> JSONResponse:
        detail = " ".join((str(error.detail) or HTTPStatus(error.status_code).phrase).split())
        LOG.tell(error.status_code, f"{request.method} {request.url.path}: {detail}")
        return JSONResponse({"error": detail}, error.status_code, error.headers)

    @app.exception_handler(Exception)  # uvicorn prints the traceback
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"the server failed ({type(error).__name__})"}, 500)

    paths = {"/docs", "/openapi.json", *(route.path for route in routes)}
    app.add_middleware(AuthMiddleware, service=service, paths=paths)
    return app


def routes_of(service: ScoringService) -> list[Route]:
    """Return all routes of a server; raise InputError if two dialects have one route."""
    own = [import_class("dialects", path, Dialect) for path in service.settings.dialects]
    kinds = (VerlOmni, About, Images, PromptedLatents, UniRL, FlowFactory, *own)
    routes = [route for kind in kinds for route in kind(service).routes()]
    for number, route in enumerate(routes):
        if any((route.method, route.path) == (one.method, one.path) for one in routes[:number]):
            raise InputError(f"dialects: there are two routes {route.method} {route.path}; give one another path")
    return routes


class About(Dialect):
    """Handlers of what a server tells of itself."""

    def routes(self) -> list[Route]:
        """Return the routes."""
        about = dict[str, Any]
        return [
            Route("GET", "/v1/model", self.model, "What a reward takes", answer=about, of_reward=True),
            Route("GET", "/v1/rewards", self.rewards, "The rewards, their devices and limits", answer=about),
            Route("GET", "/healthz", self.health, "Whether the server is ready; needs no token", answer=about),
            Route("GET", "/metrics", self.metrics, "Metrics for Prometheus"),
        ]

    async def model(self, request: Request) -> JSONResponse:
        """Answer with a description of a reward and the server's limits."""
        return JSONResponse(self.service.model_of(request).describe())

    async def rewards(self, request: Request) -> JSONResponse:
        """Answer with the rewards of the server, the first of which scores requests that name none."""
        return JSONResponse({"rewards": [model.limits() for model in self.service.models.values()]})

    async def health(self, request: Request) -> JSONResponse:
        """Answer 200 if ready; 503 if one batch takes longer than the request timeout, or scoring has stopped."""
        ready = self.service.ready
        return JSONResponse({"live": True, "ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus' text format."""
        return Response(generate_latest(self.service.resources.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class AuthMiddleware:
    """ASGI middleware that refuses bad or excess requests before their bodies are read, and counts all requests.

    Refused are: requests with both Transfer-Encoding and Content-Length (400), with too long headers (431), without the
    token (401), on a server without one from a page elsewhere that a browser of this machine shows (403), and beyond
    the number of requests in progress (503) if no body arrives slowly. All ``paths`` that are not known are counted
    together as ``other``.
    """

    def __init__(self, app: ASGIApp, service: ScoringService, paths: set[str]) -> None:
        self.app, self.service, self.paths = app, service, paths
        self._under_way, self._max_requests = 0, requests_at_once(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection, as the ASGI specification defines."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, start = 500, time.monotonic()

        async def send_counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        refusal = self._refusal(scope)
        self._under_way += refusal is None
        if scope["method"] == "HEAD":  # answered as GET; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        try:
            await (refusal or self.app)(scope, receive, send_counted)
        finally:
            self._under_way -= refusal is None
            path = OF_REWARD.sub("", scope["path"])
            path = path if path in self.paths else "other"
            metrics = self.service.resources.metrics
            metrics.requests.labels(path, status).inc()
            metrics.seconds.labels(path).observe(time.monotonic() - start)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, is_open = scope["headers"], scope["path"] == OPEN_PATH
        if {b"transfer-encoding", b"content-length"} <= {name for name, _ in headers}:
            error = "give either Transfer-Encoding or Content-Length; a request with both may hide another"
            return _answer(error, 400, {"Connection": "close"})
        if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            return _answer(f"the headers are longer than {HEADER_BYTES} bytes", 431)
        token, given = self.service.settings.token, dict(headers).get(b"authorization", b"")
        if token is None and not is_open and (foreign := _foreign(scope)):
            error = (
                f"{foreign}; without a token this server answers only localhost, loopback addresses and the machine's "
                "own name: set token_file or LATENTREWARD_TOKEN, or let a proxy send Host: localhost and no Origin"
            )
            return _answer(error, 403)
        if not (is_open or token is None or hmac.compare_digest(_token_of(given), token.encode())):
            error = "give this server's token in the header Authorization: Bearer TOKEN, or as password in the URL"
            return _answer(error, 401, {"WWW-Authenticate": 'Bearer, Basic realm="latentreward"'})
        # Last: a request that is refused for another reason takes nobody's place.
        is_health = OF_REWARD.sub("", scope["path"]) in (OPEN_PATH, "/health")  # answered however many there are
        full = self._under_way >= self._max_requests and not is_health
        if full and not self.service.resources.bodies.make_room():
            error = f"{self._max_requests} requests are under way; try later"
            return _answer(error, 503, {"Retry-After": "1"})
        return None


def requests_at_once(service: ScoringService) -> int:
    """Return the limit on requests in progress, high enough that requests of one row each can fill the queue."""
    return max(REQUESTS, sum(model.settings.queue for model in service.models.values()))


def _foreign(scope: Scope) -> str | None:
    """Return the header by which a request on a loopback address comes from a page elsewhere; None without one.

    Such a page may send a form to this machine (its ``Origin`` tells), or reach the server by a name of its own that it
    lets point to this machine (the ``Host``), and then read the answers too.
    """
    if not is_loopback((scope["server"] or ("",))[0]):
        return None
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = headers.get(b"host"), headers.get(b"origin")
    if host is not None and not names_this_machine(host):
        return f"the header Host is {printable(host)[:100]!r}"
    if origin is not None and not names_this_machine(origin.partition("://")[2]):
        return f"the header Origin is {printable(origin)[:100]!r}"
    return None


def _token_of(authorization: bytes) -> bytes:
    """Return the token of the header ``Authorization``: that after ``Bearer``, or the password after ``Basic``.

    HTTP clients send ``Basic`` for addresses such as ``http://:TOKEN@host:8000``, which clients of other frameworks
    take where they have no setting for a token.
    """
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":  # in whatever case, RFC 9110, section 11.1
        return value
    if kind.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _answer(error: str, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer to a request that is refused, and print a line about it."""
    LOG.tell(status, error)
    return JSONResponse({"error": error}, status, headers)
