"""OpenAPI description of the server, and a page made of it that loads nothing from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse

from latentreward import __version__
from latentreward.serving.routes import TEXT, Route, fields

ERRORS = {
    "400": "the request cannot be read",
    "401": "the token is missing or wrong",
    "404": "no such address, or no such reward",
    "413": "over a limit of the server",
    "415": "wrong content type",
    "422": "does not fit the reward",
    "503": "no room just now; try again after Retry-After seconds",
    "504": "no score in time",
}
"""Status of an error → what it says; all have the same JSON."""
STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2rem 0 0; font-size: 1.1rem; overflow-wrap: anywhere }
pre { overflow-x: auto; padding: .6rem; border: 1px solid }
"""
"""Style of the page."""
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
"""Headers of the page: a browser loads and runs nothing."""


class Description:
    """Handlers of the description's routes.

    Args:
        routes: Routes to describe.
        names: Names of the rewards.
    """

    def __init__(self, routes: Sequence[Route], names: Sequence[str]) -> None:
        own = [
            Route("GET", "/openapi.json", self.document, "This description, OpenAPI 3.1", answer={"type": "object"}),
            Route("GET", "/docs", self.page, "This description as a page"),
        ]
        self.routes = own
        self._document = describe([*routes, *own], names)

    async def document(self, request: Request) -> JSONResponse:
        """Answer with the OpenAPI document."""
        return JSONResponse(self._document)

    async def page(self, request: Request) -> HTMLResponse:
        """Answer with the page."""
        return HTMLResponse(page_of(self._document), headers=HEADERS)


def describe(routes: Sequence[Route], names: Sequence[str]) -> dict[str, Any]:
    """Return the OpenAPI document of routes on a server of rewards with these names."""
    paths: dict[str, dict[str, Any]] = {}
    parameter = {"name": "reward", "in": "path", "required": True, "schema": {"type": "string", "enum": list(names)}}
    for route in routes:
        operation = _operation(route)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
        if route.of_reward:
            copy = {**operation, "parameters": [parameter, *operation.get("parameters", [])]}
            paths.setdefault(f"/rewards/{{reward}}{route.path}", {})[route.method.lower()] = copy
    schemes = {"token": {"type": "http", "scheme": "bearer"}, "password": {"type": "http", "scheme": "basic"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "latentreward serve", "version": __version__},
        "paths": paths,
        "security": [{}, {"token": []}, {"password": []}],
        "components": {"securitySchemes": schemes, "schemas": {"Error": fields(error=TEXT)}},
    }


def _operation(route: Route) -> dict[str, Any]:
    answer = {"application/json": {"schema": dict(route.answer)}} if route.answer else {"text/plain": {"schema": TEXT}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    failures = ERRORS if route.method == "POST" else {"401": ERRORS["401"]}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "the answer", "content": answer},
            **{status: {"description": text, "content": error} for status, text in failures.items()},
        },
    }
    if route.headers:
        operation["parameters"] = [
            {"name": name, "in": "header", "description": text, "schema": TEXT} for name, text in route.headers.items()
        ]
    if route.bodies:
        content = {kind: {"schema": dict(schema)} for kind, schema in route.bodies.items()}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def page_of(document: dict[str, Any]) -> str:
    """Return a page of HTML that shows an OpenAPI document, without scripts."""
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(
                f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
            )
            for header in operation.get("parameters", []):
                told = header.get("description") or "one of " + ", ".join(header["schema"].get("enum", []))
                parts.append(f"<p>{escape(header['in'])} <code>{escape(header['name'])}</code>: {escape(told)}</p>")
            bodies = operation.get("requestBody", {}).get("content", {})
            answers = operation["responses"]["200"]["content"]
            for title, contents in (("request", bodies), ("answer", answers)):
                for kind, content in contents.items():
                    shown = escape(_shown(content["schema"]))
                    parts.append(f'<p>{title}, <code>{escape(kind)}</code></p><pre tabindex="0">{shown}</pre>')
    errors = "".join(f"<li>{status}: {escape(text)}</li>" for status, text in ERRORS.items())
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body><main><h1>{title}</h1>'
        f'<p>As JSON: <a href="openapi.json">openapi.json</a>. An error is <code>{{"error": TEXT}}</code>:</p>'
        f"<ul>{errors}</ul>{''.join(parts)}</main></body></html>"
    )


def _shown(schema: dict[str, Any]) -> str:
    """Write a JSON schema as an example of the JSON with types for values."""
    kind = schema.get("type")
    if kind == "array":
        return f"[{_shown(schema['items'])}, ...]"
    if kind == "object":
        named = [f'"{name}": {_shown(value)}' for name, value in schema.get("properties", {}).items()]
        if isinstance(schema.get("additionalProperties"), dict):
            named.append(f"NAME: {_shown(schema['additionalProperties'])}")
        return "{" + ", ".join(named) + "}"
    return schema.get("format") or kind or "text, number or null"
