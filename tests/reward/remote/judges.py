"""Judges on real sockets, by Python's own HTTP server, that can be told to fail."""

import base64
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

Fault = Callable[["Handler", bytes], None]
"""What is answered in place of scores."""


def judged(prompt: str, image: Image.Image) -> float:
    """Redness of a picture, and a little of its prompt's length."""
    return image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[0] / 255 + len(prompt) / 1000


def opened(text: str) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(text, validate=True)))
    assert image.format in ("PNG", "JPEG")
    assert image.mode == "RGB"
    return image


def plain(request: dict[str, Any]) -> dict[str, Any]:
    """The plain form of a judge of one's own."""
    assert set(request) == {"prompts", "images"}
    rows = zip(request["prompts"], map(opened, request["images"]), strict=True)
    return {"scores": [judged(*row) for row in rows]}


@dataclass
class Judge:
    """A running judge.

    Attributes:
        answer: Function from the JSON of a request to that of the reply.
        faults: What the next requests get in place of scores, in order; None for scores.
        delay_s: Seconds before each answer.
        headers: Headers of the requests so far.
        sizes: Rows of the requests that got scores.
        times: When each request came and was answered, by the monotonic clock.
        url: Address.
    """

    answer: Callable[[dict[str, Any]], dict[str, Any]] = plain
    faults: list[Fault | None] = field(default_factory=list)
    delay_s: float = 0.0
    headers: list[dict[str, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    url: str = ""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    judge: Judge


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        judge, began = self.server.judge, time.monotonic()
        body = self.rfile.read(int(self.headers["content-length"]))
        judge.headers.append({name.lower(): value for name, value in self.headers.items()})
        time.sleep(judge.delay_s)
        fault = judge.faults.pop(0) if judge.faults else None
        if fault is not None:
            fault(self, body)
            return
        request = json.loads(body)
        reply = judge.answer(request)
        judge.sizes.append(len(request.get("images", request.get("requests", []))))
        judge.times.append((began, time.monotonic()))
        self.reply(200, json.dumps(reply).encode())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def says(status: int, body: Any = b"", **headers: str) -> Fault:
    """A fault that answers with a status, a body (bytes, or a value for JSON) and headers."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler, _: handler.reply(status, content, {name.replace("_", "-"): v for name, v in headers.items()})


def hangs_up(handler: Handler, _: bytes) -> None:
    """The connection breaks without an answer."""
    handler.close_connection = True
    handler.connection.close()


def breaks_off(handler: Handler, _: bytes) -> None:
    """The connection breaks within the answer."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [0.')
    handler.close_connection = True


def dies(handler: Handler, _: bytes) -> None:
    """The judge's process is killed while it has a request."""
    os.kill(os.getpid(), signal.SIGKILL)


def trickles(handler: Handler, _: bytes) -> None:
    """An answer of which a byte comes now and then, without end."""
    handler.send_response(200)
    handler.send_header("content-length", "100000")
    handler.end_headers()
    drip(handler, b" ")


def drips_headers(handler: Handler, _: bytes) -> None:
    """An answer whose headers come one by one, without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    drip(handler, b"x: y\r\n")


def drip(handler: Handler, part: bytes) -> None:
    """Send a part of an answer now and then, until the client leaves."""
    try:
        while True:
            handler.wfile.write(part)
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        handler.close_connection = True


@contextmanager
def judging(
    answer: Callable[[dict[str, Any]], dict[str, Any]] = plain, faults: Sequence[Fault | None] = (), port: int = 0
) -> Iterator[Judge]:
    """A judge that answers while the context lasts; at its end connections are closed, as when a process is killed."""
    judge = Judge(answer, list(faults))
    server = Server(("127.0.0.1", port), Handler)
    server.judge, judge.url = judge, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join(300)


if __name__ == "__main__":  # PORT, and the number of requests after which the process is killed (none: it lives on)
    with judging(faults=[None] * int(sys.argv[2]) + [dies] if len(sys.argv) > 2 else (), port=int(sys.argv[1])):
        threading.Event().wait()
