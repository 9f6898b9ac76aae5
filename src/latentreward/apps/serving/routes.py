"""Routes of the server, and their description: as OpenAPI, and as a page that loads nothing from elsewhere."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, TypeAdapter, create_model

from latentreward.apps.serving.bodies import JSON
from latentreward.core.reports.page import render_page

Handler = Callable[[Request], Awaitable[Response]]
ERRORS = {
    400: "the request cannot be read",
    401: "the token is missing or wrong",
    404: "no such address, or no such reward",
    413: "over a limit of the server",
    415: "wrong content type",
    422: "does not fit the reward",
    503: "no room just now; try again after Retry-After seconds",
    504: "no score in time",
}
"""Status of an error → what it says; all have the same JSON."""


@dataclass(frozen=True)
class Route:
    """A route of the server."""

    method: str  # HTTP method
    path: str  # path
    handler: Handler  # function that answers a request
    summary: str  # one line on what the route does
    # Content type → type of a request's body, such as a pydantic model; empty for a route without one
    bodies: Mapping[str, Any] = field(default_factory=dict)
    answer: Any = None  # type of the JSON of an answer with status 200; None for an answer that is no JSON
    # Header → what it says, for headers that a request may have
    headers: Mapping[str, str] = field(default_factory=dict)
    # Whether the route is one of a single reward, so that ``/rewards/NAME`` may stand before its path
    of_reward: bool = False


class Refusal(BaseModel):
    """JSON of an error."""

    error: str


def fields(**types: Any) -> type[BaseModel]:
    """Return the type of a JSON object with fields of these types."""
    required: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
    return create_model("Fields", **required)


def add_routes(app: FastAPI, routes: Sequence[Route], names: Sequence[str]) -> None:
    """Add routes to an application, those of a reward also below ``/rewards/NAME``, and the page ``/docs``."""

    async def named(reward: Annotated[str, Path(description=f"one of {', '.join(names)}")]) -> None:
        """Describe the name in the path; handlers read it."""

    async def page(request: Request) -> HTMLResponse:
        paths, title = app.openapi()["paths"], f"{app.title} {app.version}"
        text = render_page("routes", title=title, errors=ERRORS, paths=paths, example=example)
        nothing = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"  # is loaded or run
        return HTMLResponse(text, 200, {"Content-Security-Policy": nothing})

    general, of_reward = APIRouter(), APIRouter()
    for route in routes:
        statuses = ERRORS if route.method == "POST" else [401]
        answers: dict[int | str, Any] = {n: {"description": ERRORS[n], "model": Refusal} for n in statuses}
        if route.answer is not None:
            answers[200] = {"content": contents({JSON: route.answer})}
        headers = [
            {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
            for name, text in route.headers.items()
        ]
        body = {"requestBody": {"required": True, "content": contents(route.bodies)}} if route.bodies else {}
        (of_reward if route.of_reward else general).add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            summary=route.summary,
            response_model=None,
            response_class=PlainTextResponse if route.answer is None else JSONResponse,
            responses=answers,
            openapi_extra={"parameters": headers, **body},
        )
    app.include_router(general)
    app.include_router(of_reward)
    app.include_router(of_reward, prefix="/rewards/{reward}", dependencies=[Depends(named)])
    app.add_route("/docs", page)


def contents(types: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAPI's description of bodies by content type, with definitions in place of references to them."""

    def filled(schema: Any, definitions: Mapping[str, Any]) -> Any:
        if isinstance(schema, list):
            return [filled(part, definitions) for part in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return filled(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {name: filled(part, definitions) for name, part in schema.items() if name != "$defs"}

    schemas = {kind: TypeAdapter(of).json_schema() for kind, of in types.items()}
    return {kind: {"schema": filled(schema, schema.get("$defs", {}))} for kind, schema in schemas.items()}


def example(schema: dict[str, Any]) -> str:
    """Write a JSON schema as an example of the JSON with types for values."""
    schema = next(iter(schema.get("anyOf", [])), schema)  # of an optional value the type, not null
    kind = schema.get("type")
    if kind == "array":
        return f"[{example(schema['items'])}, ...]"
    if kind == "object":
        named = [f'"{name}": {example(value)}' for name, value in schema.get("properties", {}).items()]
        if isinstance(schema.get("additionalProperties"), dict):
            named.append(f"NAME: {example(schema['additionalProperties'])}")
        return "{" + ", ".join(named) + "}"
    return schema.get("format") or kind or "text, number or null"
