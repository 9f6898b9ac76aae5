"""Scores from a server: tries and waiting, batches, requests at the same time, and a cache by content."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import Field

from latentreward.core.contracts import PathText, identity_of
from latentreward.core.errors import InputError, check_range, errors_at, first_line, one_line, printable
from latentreward.core.interrupts import stop_asked
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import checked, checked_token, shown, token_of_file
from latentreward.reward.remote.schemas import PlainJSON, png_text

if TYPE_CHECKING:
    import httpx
    from PIL import Image

logger = logging.getLogger(__name__)

RETRIED = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which the same request may succeed later
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Seconds before the second try, doubled for each further one up to the limit, unless ``Retry-After`` asks for more."""
LARGEST_REPLY = 16 * 2**20  # bytes; compressed replies, which may be of any size once unpacked, are not taken
SHOWN = 200  # number of characters of a server's own words that a message repeats
LOOK_S = 0.2  # seconds between two looks for a signal to stop while waiting
CACHED = 65536  # number of scores that a process remembers; a score takes about 150 bytes
SCORES = list[Annotated[float, Field(ge=-3.4028235e38, le=3.4028235e38)]]
"""Scores of a reply: finite numbers in the range of float32; a truth value or a text is none."""

PendingScores = Callable[[], list[float]]
"""Function that waits for the scores of rows that have been asked for, and returns one for each row; RemoteError if a
request fails, or a signal asks the run to stop."""


class RemoteError(InputError):
    """A reward server that does not answer, or answers something else than scores.

    Attributes:
        resume: Text on what was saved and how to go on, added to the message once a run has been saved.
    """

    resume: str = ""

    def __str__(self) -> str:
        """Return the message, with :attr:`resume` if it is set."""
        return f"{super().__str__()}; {self.resume}" if self.resume else super().__str__()


class Unavailable(Exception):
    """A failed try after which the same request may succeed, after the pause that the server asks for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason + f"; it asks for a pause of {pause_s:g} seconds" * bool(pause_s))
        self.pause_s = pause_s


def raise_together(failure: RemoteError | None, agree: Callable[[bool], bool]) -> None:
    """Raise RemoteError on all ranks if one of them has met a ``failure``; all ranks call ``agree``."""
    if not agree(failure is None):
        raise failure or RemoteError("the reward server of another rank gave no scores; see that rank's message")


@dataclass(frozen=True)
class RemoteServer:
    """A reward server, and how long to try when it fails.

    A try that meets no server, a broken connection, the end of ``timeout_s``, or one of the statuses 408, 425, 429,
    500, 502, 503 and 504 is followed by another, after a pause that grows and is at least the server's ``Retry-After``.
    Any other wrong answer ends the run at once.

    Attributes:
        url: Address with scheme, such as ``http://judge:8000``; a path before the schema's own may follow.
        token_file: File with a token, sent as ``Authorization: Bearer TOKEN``.
        token_env: Environment variable with the token.
        timeout_s: Seconds that a try may take, from the connection to the end of the answer.
        retry_s: Longest time from the first failed try to the last, in seconds; 86400 waits for a day. Then the run
            ends, which saves a checkpoint first.
        parallel: Greatest number of requests at the same time, for each process.
    """

    url: str
    token_file: PathText | None = None
    token_env: str | None = None
    timeout_s: float = 300.0
    retry_s: float = 120.0
    parallel: int = 4
    token: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings, and read the token."""
        if not re.fullmatch(r"https?://([\w.-]+|\[[\w:.]+\])(:\d{1,5})?(/[\w./~%-]*)?", self.url):
            remedy = "give one such as http://127.0.0.1:8000, and a token by token_file or token_env"
            # The message does not show the address, which may hold a password.
            raise InputError(f"server.url is no HTTP address of host, port and path; {remedy}")
        with errors_at("server."):
            check_range("(0, inf)", timeout_s=self.timeout_s, parallel=self.parallel)
            check_range("[0, inf)", retry_s=self.retry_s)
        if self.token_file is not None and self.token_env is not None:
            raise InputError("server: give either token_file or token_env")
        token = None if self.token_file is None else token_of_file(self.token_file, "server.token_file")
        if self.token_env is not None:
            token = checked_token(os.environ.get(self.token_env, ""), f"server.token_env={self.token_env}")
        object.__setattr__(self, "token", token)


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Start the event loop of all requests of a process, in a thread; that of a fork's parent has no thread here."""
    loop = asyncio.new_event_loop()
    # A daemon: the process should not wait for a silent server when it ends.
    Thread(target=loop.run_forever, name="reward requests", daemon=True).start()
    return loop


@cache
def _opened(server: RemoteServer, process: int) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
    """Return the connections of a process to a server, and places for requests; a fork would share its sockets."""
    import httpx

    # Variables of proxies have no effect: they would also apply to servers of the own network.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=server.parallel)
    return httpx.AsyncClient(timeout=None, trust_env=False, limits=limits), asyncio.Semaphore(server.parallel)


class Connection:
    """Requests of this process to a server."""

    def __init__(self, server: RemoteServer) -> None:
        self.server, self._failing = server, False

    def start(self, ask: Callable[..., Coroutine[Any, Any, Any]], *given: Any) -> Future[Any]:
        """Start asking, in the thread of requests, once fewer than ``server.parallel`` others do."""

        async def placed() -> Any:
            async with _opened(self.server, os.getpid())[1]:
                return await ask(*given)

        return asyncio.run_coroutine_threadsafe(placed(), _loop(os.getpid()))

    def result(self, future: Future[Any]) -> Any:
        """Wait for what was started; raise RemoteError if a signal asks the run to stop."""
        try:
            while not wait([future], LOOK_S).done:
                if stop_asked.is_set():
                    self.refuse("a signal ended the wait for its answer")
            return future.result()
        except CancelledError:
            self.refuse("the request was given up, since another failed")
        finally:
            future.cancel()

    async def asked(self, path: str, content: bytes) -> Any:
        """Post JSON, again if need be, and return the JSON of the answer; RemoteError if there is none."""
        tries, began, server = 0, 0.0, self.server
        while True:
            try:
                answer = await self._try(f"{server.url.rstrip('/')}{path}", content)
            except Unavailable as error:
                now, pause = time.monotonic(), min(FIRST_PAUSE_S * 2 ** min(tries, 10), LONGEST_PAUSE_S)
                tries, began = tries + 1, began or now
                left = began + server.retry_s - now
                if left <= 0 or error.pause_s > left:
                    counted = f"{tries} {'try' if tries == 1 else 'tries'} in {now - began:.0f} seconds"
                    told = f"no scores after {counted} (server.retry_s={server.retry_s:g}); the last one: {error}"
                    self.refuse(f"{told}; start the server, or raise retry_s")
                if not self._failing:  # once for all requests
                    logger.warning("reward server %s: %s; tries for %g seconds", server.url, error, server.retry_s)
                self._failing = True
                await asyncio.sleep(min(max(pause, error.pause_s), left))
            else:
                if self._failing:
                    logger.warning("reward server %s answers again", server.url)
                self._failing = False
                return answer

    async def _try(self, url: str, content: bytes) -> Any:
        """Send a request once; raise Unavailable if another try may succeed, RemoteError if not."""
        import httpx

        token, body, client = self.server.token, bytearray(), _opened(self.server, os.getpid())[0]
        headers = {"accept-encoding": "identity", "user-agent": "latentreward", "content-type": "application/json"}
        headers |= {} if token is None else {"authorization": f"Bearer {token}"}
        try:  # one limit for all: httpx's own begin anew with each byte, and for each address of a host
            async with (
                asyncio.timeout(self.server.timeout_s),
                client.stream("POST", url, headers=headers, content=content) as reply,
            ):
                async for part in reply.aiter_raw():
                    body += part
                    if len(body) > LARGEST_REPLY:
                        self.refuse(f"the answer is longer than {LARGEST_REPLY // 2**20} MiB; is this a reward server?")
        except TimeoutError as error:
            raise Unavailable(f"no answer within timeout_s={self.server.timeout_s:g} seconds") from error
        except httpx.TransportError as error:
            raise Unavailable(printable(first_line(error))[:SHOWN]) from error
        text = body.decode("utf-8", "replace")
        try:
            found, problem = json.loads(text), None
        except (ValueError, RecursionError) as error:
            found, problem = text, error
        told: Any = found
        if isinstance(found, dict):
            told = next((found[name] for name in ("error", "detail", "message") if name in found), found)
        words, status = self._hidden(printable(" ".join(str(told).split())))[:SHOWN] or "(no text)", reply.status_code
        if status in RETRIED:
            asked = reply.headers.get("retry-after", "")
            raise Unavailable(f"HTTP {status}: {words}", float(asked) if asked.isascii() and asked.isdigit() else 0.0)
        if status != 200:  # also a redirect, with which the token would go to another server
            self.refuse(f"HTTP {status}: {words}; look at server.url, its token, and the schema")
        if problem:
            self.refuse(f"the answer is no JSON ({type(problem).__name__}): {words}", problem)
        return found

    def refuse(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        """Raise a RemoteError that names the server and the ``problem`` of its answer."""
        raise RemoteError(f"reward server {self.server.url}: {self._hidden(problem)}") from cause

    def _hidden(self, text: str) -> str:
        """Return a text of the server without the token that it may repeat."""
        return text.replace(self.server.token or "\0", "(token)")


class RemoteImages:
    """Scores of RGB images with prompts from a server, ``batch_size`` of them in a request of the form ``schema``.

    Equal rows are asked for once. A score is remembered, so that a row gets the same score again.
    """

    def __init__(self, server: RemoteServer, schema: PlainJSON, batch_size: int) -> None:
        self.connection, self.schema, self.batch_size = Connection(server), schema, batch_size
        self.model: str | None = None  # that the server has named so far
        self._known: dict[str, float] = {}

    def begin(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> PendingScores:
        """Ask for the scores of N RGB images, each for its prompt, and return before they are there."""
        rows = [*zip(prompts, images, strict=True)]
        keys = [digest([f"{identity_of(text)}\n{image.mode} {image.size}\n", image.tobytes()]) for text, image in rows]
        known = {key: self._known[key] for key in keys if key in self._known}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        batches = [[*new][start : start + self.batch_size] for start in range(0, len(new), self.batch_size)]
        asked = [(batch, self.connection.start(self._ask, [new[key] for key in batch])) for batch in batches]

        def result() -> list[float]:
            found: dict[str, float] = {}
            try:
                for batch, future in asked:
                    scores, model = self.connection.result(future)
                    found |= zip(batch, self._checked(scores, model, len(batch)), strict=True)
            except BaseException:
                for _, future in asked:
                    future.cancel()
                raise
            self._known |= found
            while len(self._known) > CACHED:
                del self._known[next(iter(self._known))]
            found |= known
            return [found[key] for key in keys]

        return result

    async def _ask(self, rows: Sequence[tuple[str, Image.Image]]) -> tuple[Sequence[Any], str | None]:
        """Ask for the scores of a batch; return them, unchecked, and the model that the server names."""

        def encoded() -> tuple[dict[str, Any], bytes]:
            prompts, images = zip(*rows, strict=True)
            request = self.schema.request(prompts, [png_text(image) for image in images])
            return request, json.dumps(request).encode()

        try:
            request, content = await asyncio.to_thread(encoded)
            reply = await self.connection.asked(self.schema.path, content)
            return [*self.schema.scores(reply, request)], self.schema.model(reply)
        except RemoteError:
            raise
        except Exception as error:  # also of a schema of the user's; other ranks wait for scores or a refusal
            told = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {one_line(error)}"
            self.connection.refuse(f"{type(self.schema).__name__} cannot read the answer ({shown(told)})", error)

    def _checked(self, scores: Sequence[Any], model: str | None, count: int) -> list[float]:
        """Check a reply: as many scores as rows, finite, of the same model as before; raise RemoteError if not."""
        if len(scores) != count:
            self.connection.refuse(f"{len(scores)} scores came for {count} rows")
        if model is not None and self.model not in (None, model):
            self.connection.refuse(f"the model is now {shown(model)}, but was {shown(self.model)} before")
        self.model = model or self.model
        try:
            numbers: list[float] = checked(SCORES, [*scores], "score ", "look at the schema")
        except InputError as error:
            self.connection.refuse(str(error), error)
        return numbers
