"""A hub on this machine: enough of its HTTP interface for the real client to download a model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


class StubHub(ThreadingHTTPServer):
    """Repositories by name and branch: files by path.

    Attributes:
        repositories: (``owner/name``, branch) → path → content.
        requests: Method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def at(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Files of a repository at a branch or commit."""
        for (known, branch), files in self.repositories.items():
            if known == name and revision in (branch, commit_of(name, branch)):
                return files
        return None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def commit_of(name: str, revision: str) -> str:
    """Name of the last commit of a branch, or the commit itself."""
    return revision if len(revision) == 40 else sha1(f"{name} {revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for pattern, respond in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                respond(self, *match.groups())
                return
        self.reply({})

    do_GET = do_HEAD = _answer

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def info(self, name: str, branch: str | None = None) -> None:
        files = self.server.at(name, branch or "main")
        if files is None:
            kind = "RepoNotFound" if branch is None else "RevisionNotFound"
            self.reply({"error": "not found"}, 404, X_Error_Code=kind)
            return
        siblings = [{"rfilename": path} for path in files]
        self.reply(
            {"id": name, "sha": commit_of(name, branch or "main"), "siblings": siblings, "tags": [], "private": False}
        )

    def tree(self, name: str, branch: str) -> None:
        found = self.server.at(name, branch) or {}
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
            for path, data in found.items()
        ]
        self.reply(entries)

    def resolve(self, name: str, branch: str, path: str) -> None:
        data = (self.server.at(name, branch) or {}).get(path)
        if data is None:
            self.reply({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        self.reply(data, ETag=f'"{sha1(data).hexdigest()}"', X_Repo_Commit=commit_of(name, branch))


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    rf"/api/models/{ID}/revision/(.+)": _Handler.info,
    rf"/api/models/{ID}/tree/(.+)": _Handler.tree,
    rf"/api/models/{ID}": _Handler.info,
    rf"/{ID}/resolve/([^/]+)/(.+)": _Handler.resolve,
}


def set_hub(patch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Have the client ask ``address``, as ``HF_ENDPOINT`` and ``HF_HUB_CACHE`` do that are set at the start."""
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[StubHub]:
    """A hub that the client asks."""
    stub = StubHub()
    set_hub(patch, stub.address, cache)
    yield stub
    stub.shutdown()
    stub.server_close()
