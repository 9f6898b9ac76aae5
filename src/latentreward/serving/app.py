"""HTTP endpoints of ``latentreward serve``."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentreward.serving import protocol
from latentreward.serving.batch_scorer import standing
from latentreward.serving.errors import RequestError
from latentreward.serving.image_requests import EncodedImages, images_of_form, images_of_json, parsing_bytes
from latentreward.serving.service import Scores, ScoringService

DECODERS = 4
"""Number of requests whose images are decoded at the same time."""
HEADER_BYTES = 16 * 1024
"""Greatest total length of a request's headers, in bytes."""
REQUESTS = 256
"""Least limit on the number of requests in progress; see :func:`requests_at_once`."""
OPEN_PATH = "/healthz"
"""Path that needs no token and is answered also when too many requests are in progress."""


def create_app(service: ScoringService) -> FastAPI:
    """Create the application, without FastAPI's documentation pages, which load scripts from the network."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    endpoints = Endpoints(service)
    for method, path, endpoint in (
        ("POST", "/v1/score", endpoints.score),
        ("POST", "/v1/score_images", endpoints.score_images),
        ("GET", "/v1/model", endpoints.model),
        ("GET", "/healthz", endpoints.health),
        ("GET", "/metrics", endpoints.metrics),
    ):
        app.add_route(path, endpoint, methods=[method])
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen_error)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(AuthMiddleware, service=service, paths=paths)
    return app


class Endpoints:
    """Handlers of the endpoints, one method each.

    Args:
        service: Service that scores the rows of requests.
    """

    def __init__(self, service: ScoringService) -> None:
        self.service = service
        self._decoders = asyncio.Semaphore(DECODERS)

    async def score(self, request: Request) -> JSONResponse:
        """Score latents by the latent-reward protocol; see :mod:`latentreward.serving.protocol`."""
        service = self.service
        protocol.check_version(request.headers.get(protocol.VERSION_HEADER))
        prompt = protocol.read_prompt(request.headers.getlist(protocol.PROMPT_HEADER))
        _check_type(request, "application/octet-stream")
        async with service.bodies.read(request) as body:
            with service.memory.hold(protocol.parsing_bytes(body, service.accepted), len(body)):
                rows = await asyncio.to_thread(protocol.parse_request, body, service.accepted, prompt, service.seeds)
                scores = await service.score(request, rows)
        totals, axes = self._columns(scores)
        return JSONResponse({"protocol_version": protocol.VERSION, "raw_scores": totals, **axes})

    async def score_images(self, request: Request) -> JSONResponse:
        """Score images for prompts; see :mod:`latentreward.serving.image_requests`."""
        kind = _check_type(request, "application/json", "multipart/form-data")
        async with self.service.bodies.read(request) as body:
            with self.service.memory.hold(parsing_bytes(body, kind), len(body)):
                images = await self._parse_images(request, body, kind)
            scores = await self._score_images(request, images, len(body))
        return JSONResponse(self._reply(scores))

    async def _parse_images(self, request: Request, body: bytearray, kind: str) -> EncodedImages:
        limit = self.service.accepted.max_rows
        if kind == "application/json":
            return await asyncio.to_thread(images_of_json, body, limit)
        return await images_of_form(request, body, limit)

    async def _score_images(self, request: Request, images: EncodedImages, beside: int) -> list[Scores]:
        with self.service.memory.hold(await asyncio.to_thread(images.memory_bytes), beside):
            async with self._decoders:
                rows = await asyncio.to_thread(images.decode, self.service.reward.exif)
            return await self.service.score(request, rows)

    def _reply(self, scores: list[Scores]) -> dict[str, Any]:
        reward, (totals, axes) = self.service.reward, self._columns(scores)
        z_scores, quantiles = standing(reward, torch.tensor(totals)) or (None, None)
        told = {"noise": str(reward.noise), "model": reward.identity}
        return {"scores": totals, **axes, "z_scores": z_scores, "quantiles": quantiles, **told}

    def _columns(self, scores: Sequence[Scores]) -> tuple[list[float], dict[str, list[float]]]:
        """Return the scores of all rows, and those of each axis of a model with two by name."""
        totals, *axes = ([*column] for column in zip(*scores, strict=True))
        return totals, dict(zip(self.service.reward.axes, axes, strict=True))

    async def model(self, request: Request) -> JSONResponse:
        """Answer with a description of the model and the server's limits."""
        return JSONResponse(self.service.describe())

    async def health(self, request: Request) -> JSONResponse:
        """Answer 200 if ready; 503 if one batch takes longer than the request timeout, or scoring has stopped."""
        ready = self.service.ready
        return JSONResponse({"live": True, "ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus' text format."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class AuthMiddleware:
    """ASGI middleware that refuses bad or excess requests before their bodies are read, and counts all requests.

    Refused are: requests with both Transfer-Encoding and Content-Length (400), with too long headers (431), beyond the
    number of requests in progress (503), and without the token (401).

    Args:
        app: Application behind the middleware.
        service: Service with the token and the metrics.
        paths: Known paths; all other paths are counted together as ``other``.
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

        answer = self._refusal(scope) or self.app
        self._under_way += 1
        try:
            await answer(scope, receive, send_counted)
        finally:
            self._under_way -= 1
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.service.metrics.count_request(path, status, time.monotonic() - start)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, is_open = scope["headers"], scope["path"] == OPEN_PATH
        if {b"transfer-encoding", b"content-length"} <= {name for name, _ in headers}:
            error = "give either Transfer-Encoding or Content-Length; a request with both may hide another"
            return JSONResponse({"error": error}, 400, {"Connection": "close"})
        if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            return JSONResponse({"error": f"the headers are longer than {HEADER_BYTES} bytes"}, 431)
        if self._under_way >= self._max_requests and not is_open:
            error = f"{self._max_requests} requests are under way; try later"
            return JSONResponse({"error": error}, 503, {"Retry-After": "1"})
        token, given = self.service.settings.token, dict(headers).get(b"authorization", b"")
        if is_open or token is None or hmac.compare_digest(given, f"Bearer {token}".encode()):
            return None
        error = "give this server's token in the header Authorization: Bearer TOKEN"
        return JSONResponse({"error": error}, 401, {"WWW-Authenticate": "Bearer"})


def requests_at_once(service: ScoringService) -> int:
    """Return the limit on requests in progress, high enough that requests of one row each can fill the queue."""
    return max(REQUESTS, service.settings.queue)


def _check_type(request: Request, *types: str) -> str:
    """Return the content type of a request; raise RequestError with status 415 if it is not one of ``types``."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in types:
        raise RequestError(f"content-type is {found[:40]!r}; send {' or '.join(types)}", 415)
    return found


async def _request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"error": " ".join(str(error).split())}, error.status, headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = str(error.detail) or HTTPStatus(error.status_code).phrase
    return JSONResponse({"error": " ".join(detail.split())}, error.status_code, error.headers)


async def _unforeseen_error(request: Request, error: Exception) -> JSONResponse:
    """Answer 500 with the type of the error only; uvicorn prints the traceback."""
    return JSONResponse({"error": f"the server failed ({type(error).__name__})"}, 500)
