"""Page to rate own pictures in the browser: two at a time, on this machine only."""

import hmac
import json
import secrets
import sys
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from socket import socket
from threading import Lock
from typing import Any

from PIL import Image

from latentreward.apps.taste.ratings import Ratings
from latentreward.core.errors import InputError, one_line
from latentreward.core.reports.page import render_page
from latentreward.data import ImageError, decode_image
from latentreward.data.images import file_image

HOST = "127.0.0.1"
SIDE, QUALITY = 1024, 90  # longest side in pixels, and JPEG quality, of a picture on the page
MOST_BYTES = 16 * 1024  # longest body of a request
JSON = "application/json"
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
"""Headers of every answer; the address, which holds the token, is told to no page elsewhere."""


class RatingServer(ThreadingHTTPServer):
    """Server of the page at a socket that :func:`~latentreward.apps.serving.settings.bind` bound."""

    daemon_threads = True

    def __init__(self, ratings: Ratings, bound: socket) -> None:
        super().__init__(bound.getsockname(), RatingHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.server_activate()
        port = bound.getsockname()[1]
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://{HOST}:{port}/{self.token}/"
        self.ratings, self.folder, self.lock = ratings, ratings.file.parent, Lock()
        self.places = {path: place for place, path in enumerate(ratings.pictures)}
        self.paths = {f"/picture/{place}": path for path, place in self.places.items()}
        self.page = render_page("rating", served=True, title="Which one do you prefer?")
        self.encode = lru_cache(maxsize=16)(self._encode)

    def state(self) -> dict[str, Any]:
        """Describe the pair to show, and the progress."""
        pair, progress = self.ratings.next, {"done": self.ratings.done, "total": self.ratings.total}
        if pair is None:
            return {"pair": None, "places": None, **progress}
        shown = {"a": pair.a.path, "b": pair.b.path, "prompt": pair.prompt}
        return {"pair": shown, "places": [self.places[path] for path in pair.names], **progress}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a connection that the browser ended, as it does when the next pair comes early."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def _encode(self, path: str) -> bytes:
        """Encode a picture as JPEG, turned upright and shrunk: whatever else the file holds is not given out."""
        image = decode_image(file_image(self.folder, path), exif="apply")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()


class RatingHandler(BaseHTTPRequestHandler):
    """Handler of one connection.

    All addresses begin with a random token, which the page's own relative ones keep: neither other accounts of this
    machine nor pages elsewhere, by whatever name, can see the pictures and answer.
    """

    server: RatingServer
    timeout = 10  # seconds that a connection may be silent
    server_version, sys_version = "latentreward", ""

    def do_GET(self) -> None:
        """Answer with the page, the state, or a picture."""
        path = self._path()
        if path == "/":
            self._answer(self.server.page.encode("utf-8", "replace"), "text/html; charset=utf-8")
        elif path == "/state":
            self._tell()
        elif path in self.server.paths:
            try:
                self._answer(self.server.encode(self.server.paths[path]), "image/jpeg")
            except ImageError as error:  # removed or changed since the start
                self._refuse(one_line(error), HTTPStatus.GONE)
        elif path is not None:
            self._refuse("there is no such page", HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Keep an answer, or take the last one back; the reply is the state after that."""
        if (path := self._path()) is None:
            return
        if (body := self._body()) is None:
            self.close_connection = True
            self._refuse("expected a JSON object", HTTPStatus.BAD_REQUEST)
            return
        try:
            with self.server.lock:
                if path == "/undo":
                    kept = self.server.ratings.undo()
                elif path == "/rate" and body.get("answer") in ("a", "b", "tie"):
                    kept = self.server.ratings.rate((str(body.get("a")), str(body.get("b"))), body["answer"])
                else:
                    self._refuse("expected a rating", HTTPStatus.BAD_REQUEST)
                    return
        except (InputError, OSError) as error:
            self._refuse(one_line(error), HTTPStatus.INSUFFICIENT_STORAGE)
            return
        self._tell(HTTPStatus.OK if kept else HTTPStatus.CONFLICT)

    def _path(self) -> str | None:
        """Return the address behind the token; None after an answer with 403."""
        token, slash, path = self.path.partition("?")[0].removeprefix("/").partition("/")
        if hmac.compare_digest(token.encode(), self.server.token.encode()):
            return slash + path
        self._refuse("open the whole address that the command printed at its last start", HTTPStatus.FORBIDDEN)
        return None

    def _body(self) -> dict[str, Any] | None:
        """Return the JSON object of a request; None if there is none."""
        length = self.headers.get("Content-Length", "")
        sound = length.isdecimal() and len(length) <= len(str(MOST_BYTES))  # Python refuses to convert long digits
        if self.headers.get_content_type() != JSON or not sound or int(length) > MOST_BYTES:
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return body if isinstance(body, dict) else None

    def _tell(self, status: HTTPStatus = HTTPStatus.OK) -> None:
        with self.server.lock:
            state = self.server.state()
        self._answer(json.dumps(state).encode(), JSON, status)

    def _refuse(self, problem: str, status: HTTPStatus) -> None:
        self._answer(problem.encode(), "text/plain; charset=utf-8", status)

    def _answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: each picture would be a line."""


def serve_ratings(ratings: Ratings, bound: socket) -> None:
    """Serve the page until Ctrl-C or SIGTERM; prints its address once it can be opened."""
    with RatingServer(ratings, bound) as server:
        print(f"{ratings.done} of {ratings.total} pairs are rated; Ctrl-C ends")
        print(f"page to rate at {server.url}", flush=True)
        try:
            server.serve_forever()
        finally:
            told = f"{ratings.done} of {ratings.total} pairs are rated in {ratings.file}"
            print(told, file=sys.stderr, flush=True)
