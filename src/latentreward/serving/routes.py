"""Description of a route: its handler, and what its OpenAPI entry says."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from latentreward.serving.errors import RequestError

Handler = Callable[[Request], Awaitable[Response]]
JSON = "application/json"
FORM = "multipart/form-data"
SAFETENSORS = "application/octet-stream"


@dataclass(frozen=True)
class Route:
    """A route of the server.

    Attributes:
        method: HTTP method.
        path: Path.
        handler: Function that answers a request.
        summary: One line on what the route does.
        bodies: Content type → JSON schema of a request's body; empty for a route without one.
        answer: JSON schema of the answer with status 200; None for an answer that is no JSON.
        headers: Header → what it says, for headers that a request may have.
        of_reward: Whether the route is one of a single reward, so that ``/rewards/NAME`` may stand before its path.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    of_reward: bool = False


def check_type(request: Request, *types: str) -> str:
    """Return the content type of a request; raise RequestError with status 415 if it is not one of ``types``."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in types:
        raise RequestError(f"content-type is {found[:40]!r}; send {' or '.join(types)}", 415)
    return found


def listed(of: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a list."""
    return {"type": "array", "items": dict(of)}


def fields(**schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object with the given fields."""
    return {"type": "object", "properties": {name: dict(schema) for name, schema in schemas.items()}}


NUMBERS = listed({"type": "number"})
TEXT = {"type": "string"}
BINARY = {"type": "string", "format": "binary"}
