"""Scores from a server: tries and waiting, batches, requests at the same time, and a cache by content."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from latentreward.core.contracts import Conditioning, LatentSpace, PathText, identity_of
from latentreward.core.errors import (
    InputError,
    check_at_least_one,
    check_range,
    errors_at,
    first_line,
    one_line,
    printable,
)
from latentreward.core.interrupts import stop_asked
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import checked, checked_token, shown, token_of_file
from latentreward.reward.remote.schemas import (
    ANSWER,
    REMEDY,
    ImageSchema,
    LatentsReply,
    Schema,
    ServedLatents,
    ServedReward,
    png_text,
)

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
LATENT_HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}

Row = TypeVar("Row")
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


class TooLarge(RemoteError):
    """A request over a limit of the server, HTTP 413."""


class Unavailable(Exception):
    """A failed try after which the same request may succeed, after the pause that the server asks for."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def raise_together(failure: RemoteError | None, agree: Callable[[bool], bool]) -> None:
    """Raise RemoteError on all ranks if one of them has met a ``failure``; all ranks call ``agree``."""
    if not agree(failure is None):
        raise failure or RemoteError("the reward server of another rank gave no scores; see that rank's message")


@dataclass(frozen=True)
class RemoteServer:
    """A reward server, and what to do when it fails.

    A try that meets no server, a broken connection, the end of ``timeout_s``, or one of the statuses 408, 425, 429,
    500, 502, 503 and 504 is followed by another, after the server's ``Retry-After`` or growing pauses. Any other wrong
    answer ends the run at once.

    Attributes:
        url: Address with scheme, such as ``http://judge:8000``; a path before the schema's own may follow.
        token_file: File with a token, sent as ``Authorization: Bearer TOKEN``.
        token_env: Environment variable with the token.
        timeout_s: Seconds that a try may take, from the connection to the end of the answer.
        retry_s: Longest time from the first failed try to the last, in seconds, under ``on_outage: stop``.
        on_outage: What happens when the tries of ``retry_s`` have failed. ``stop`` ends the run, which saves a
            checkpoint first; ``wait`` goes on trying for ``wait_s``, then stops in the same way.
        wait_s: Longest wait in seconds, under ``on_outage: wait``.
        parallel: Greatest number of requests at the same time, for each process.
    """

    url: str
    token_file: PathText | None = None
    token_env: str | None = None
    timeout_s: float = 300.0
    retry_s: float = 120.0
    on_outage: Literal["stop", "wait"] = "stop"
    wait_s: float = 86400.0
    parallel: int = 4
    token: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings, and read the token."""
        if {*"@?#"} & {*self.url}:  # first: other messages show the address
            raise InputError("server.url holds more than address and path; give a token by token_file or token_env")
        try:
            address = urlsplit(self.url)
            known = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:  # brackets without an IPv6 address, or a port that is none
            known = False
        if not known or not self.url.isprintable():
            raise InputError(f"server.url={self.url!r} is no HTTP address; give one such as http://127.0.0.1:8000")
        with errors_at("server."):
            check_range("(0, inf)", timeout_s=self.timeout_s, wait_s=self.wait_s)
            check_range("[0, inf)", retry_s=self.retry_s)
        check_at_least_one("server.", parallel=self.parallel)
        if self.token_file is not None and self.token_env is not None:
            raise InputError("server: give either token_file or token_env")
        token = None if self.token_file is None else token_of_file(self.token_file, "server.token_file")
        if self.token_env is not None:
            token = checked_token(os.environ.get(self.token_env, ""), f"server.token_env={self.token_env}")
        object.__setattr__(self, "token", token)

    @property
    def limit(self) -> tuple[str, float]:
        """Name and value of the longest time from the first failed try to the last, in seconds."""
        return ("wait_s", self.wait_s) if self.on_outage == "wait" else ("retry_s", self.retry_s)


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Start the event loop of all requests of a process, in a thread; that of a fork's parent has no thread here."""
    loop = asyncio.new_event_loop()
    # A daemon: the process should not wait for a silent server when it ends.
    Thread(target=loop.run_forever, name="reward requests", daemon=True).start()
    return loop


class Connection:
    """Connections of this process to a server.

    Environment variables of proxies have no effect: they would also apply to servers of the own network.
    """

    def __init__(self, server: RemoteServer) -> None:
        self.server, self._owner = server, 0
        self._failing_since: float | None = None  # by the monotonic clock; None while the server answers
        self._client: httpx.AsyncClient
        self._places: asyncio.Semaphore

    def start(self, ask: Callable[..., Coroutine[Any, Any, Any]], *given: Any) -> Future[Any]:
        """Start asking, in the thread of requests, once fewer than ``server.parallel`` others do."""

        async def placed() -> Any:
            self._open()
            async with self._places:
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

    def ask(self, method: Literal["GET", "POST"], path: str, content: bytes = b"") -> Any:
        """Ask and wait; see :meth:`asked`."""
        return self.result(self.start(self.asked, method, path, content))

    async def asked(
        self, method: Literal["GET", "POST"], path: str, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Any:
        """Send a request, again if need be, and return the JSON of the answer.

        The token's header is added to ``headers``.

        Raises:
            RemoteError: If there is no answer in time, the server refuses the request, or the answer is no JSON.
        """
        url, began, tries, (limit, allowed) = f"{self.server.url.rstrip('/')}{path}", 0.0, 0, self.server.limit
        while True:
            tries += 1
            try:
                answer = await self._try(method, url, content, headers or {})
            except Unavailable as error:
                now = time.monotonic()
                began = began or now
                pause = min(FIRST_PAUSE_S * 2 ** min(tries - 1, 10), LONGEST_PAUSE_S)
                pause = pause if error.pause_s is None else max(error.pause_s, FIRST_PAUSE_S)
                left = began + allowed - now
                asks = error.pause_s is not None and error.pause_s > max(left, 0.0)
                if left <= 0 or asks:
                    later = f"it asks for a pause of {error.pause_s or 0:g} seconds; go on after it, or " * asks
                    remedy = f"{later}start the server, or raise {limit}"
                    counted = f"{tries} {'try' if tries == 1 else 'tries'} in {now - began:.0f} seconds"
                    told = f"no scores after {counted} (server.{limit}={allowed:g}); the last one: {error}; {remedy}"
                    self.refuse(told)
                self._tell(error)
                await asyncio.sleep(min(pause, left))
            else:
                self._tell(None)
                return answer

    async def _try(self, method: str, url: str, content: bytes, headers: Mapping[str, str]) -> Any:
        """Send a request once; raise Unavailable if another try may succeed, RemoteError if not."""
        import httpx

        limit, token = self.server.timeout_s, self.server.token
        headers = {"accept-encoding": "identity", "user-agent": "latentreward", **headers}
        headers |= {} if token is None else {"authorization": f"Bearer {token}"}
        try:  # one limit for all: httpx's own begin anew with each byte, and for each address of a host
            async with (
                asyncio.timeout(limit),
                self._client.stream(method, url, headers=headers, content=content) as reply,
            ):
                body = bytearray()
                async for part in reply.aiter_raw():
                    body += part
                    if len(body) > LARGEST_REPLY:
                        self.refuse(f"the answer is longer than {LARGEST_REPLY // 2**20} MiB; is this a reward server?")
        except TimeoutError as error:
            raise Unavailable(f"no answer within timeout_s={limit:g} seconds") from error
        except httpx.TransportError as error:
            raise Unavailable(printable(first_line(error))[:SHOWN]) from error
        return self._content(reply.status_code, reply.headers, bytes(body))

    def _content(self, status: int, headers: Mapping[str, str], body: bytes) -> Any:
        """Return the JSON of a complete answer, without the token if it repeats that."""
        packed = headers.get("content-encoding", "identity") != "identity"
        text, problem = "(compressed)" if packed else body.decode("utf-8", "replace"), None
        try:
            content = without(self.server.token, json.loads(text))  # so that no later message can show it
        except (ValueError, RecursionError) as error:
            content, problem = None, error
        told = without(self.server.token, text) if problem else content
        if isinstance(content, dict):
            told = next((content[name] for name in ("error", "detail", "message") if name in content), content)
        words = printable(" ".join(str(told).split()))[:SHOWN] or "(no text)"
        if status in RETRIED:
            raise Unavailable(f"HTTP {status}: {words}", seconds_of(headers.get("retry-after")))
        if status != 200:
            remedy = {401: "; set token_file or token_env", 404: "; look at server.url and the schema"}.get(status, "")
            if 300 <= status < 400:  # with a redirect, the token would go to another server
                place = printable(headers.get("location", ""))[:SHOWN]
                remedy = f"; redirects are not followed: set server.url to the final address; it leads to {place}"
            self.refuse(f"HTTP {status}: {words}{remedy}", kind=TooLarge if status == 413 else RemoteError)
        if packed:
            self.refuse("the answer is compressed, which was not asked for; look at the proxy before the server")
        if problem:
            self.refuse(f"the answer is no JSON ({type(problem).__name__}): {words}", problem)
        return content

    def _open(self) -> None:
        """Open the connections of this process; those that a fork has copied would share their sockets."""
        import httpx

        if self._owner != os.getpid():
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.server.parallel)
            self._client = httpx.AsyncClient(timeout=None, trust_env=False, limits=limits)
            self._places, self._owner = asyncio.Semaphore(self.server.parallel), os.getpid()

    def refuse(
        self, problem: str, cause: BaseException | None = None, kind: type[RemoteError] = RemoteError
    ) -> NoReturn:
        """Raise a RemoteError that names the server and the ``problem`` of its answer."""
        raise kind(f"reward server {self.server.url}: {problem}") from cause

    def _tell(self, error: Unavailable | None) -> None:
        """Log the beginning of an outage by its ``error``, or the end by None; once for all requests."""
        now, url, since = time.monotonic(), self.server.url, self._failing_since
        self._failing_since = None if error is None else since or now
        if error is None and since is not None:
            logger.warning("reward server %s answers again after %.0f seconds", url, now - since)
        if error is not None and since is None:
            logger.warning("reward server %s: %s; tries again for up to %g seconds", url, error, self.server.limit[1])


def without(token: str | None, value: Any) -> Any:
    """Replace a token in the texts of a JSON value; numbers may hold it by chance."""
    if isinstance(value, str) and token:
        return value.replace(json.dumps(token)[1:-1], "(token)").replace(token, "(token)")
    if isinstance(value, list):
        return [without(token, one) for one in value]
    if isinstance(value, dict):
        return {without(token, key): without(token, one) for key, one in value.items()}
    return value


def seconds_of(header: str | None) -> float | None:
    """Return the seconds of a header ``Retry-After``, which holds a number or a date; None without a valid one."""
    if header is None or (header.isascii() and header.strip().isdigit()):
        return None if header is None else float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


class RemoteScores(ABC, Generic[Row]):
    """Base class of sources of scores from a server.

    Rows with equal keys are asked for once. A score is remembered, so that a row gets the same score again.
    """

    def __init__(self, server: RemoteServer, batch_size: int, model: str | None = None) -> None:
        self.connection, self.batch_size = Connection(server), batch_size
        self.model = model  # that the server has named so far; None if it has not
        self._known: OrderedDict[str, float] = OrderedDict()
        self._open: set[Future[Any]] = set()

    @abstractmethod
    async def ask(self, rows: Sequence[Row]) -> tuple[Sequence[Any], str | None]:
        """Ask for the scores of a batch; return them, unchecked, and the model that the server names."""

    def begin_rows(self, rows: Sequence[Row], keys: Sequence[str]) -> PendingScores:
        """Ask for the scores of N rows, and return before they are there.

        Rows with the same content have the same key.
        """
        known = {key: self._known[key] for key in keys if key in self._known}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        names, asked, size = list(new), [], self.batch_size
        for start in range(0, len(names), size):
            batch = names[start : start + size]
            future = self.connection.start(self._asked, [new[key] for key in batch])
            self._open.add(future)
            future.add_done_callback(self._open.discard)
            asked.append((batch, future))
        for key in known:
            self._known.move_to_end(key)

        def result() -> list[float]:
            found = known | self._collect(asked)
            return [found[key] for key in keys]

        return result

    def _collect(self, asked: Sequence[tuple[Sequence[str], Future[Any]]]) -> dict[str, float]:
        """Wait for the answers to requests, check and remember them, and return the scores by key."""
        found: dict[str, float] = {}
        try:
            for batch, future in asked:
                scores, model = self.connection.result(future)
                found |= zip(batch, self._checked(scores, len(batch), model), strict=True)
        except BaseException:
            for future in [*self._open]:
                future.cancel()
            raise
        self._known |= found
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return found

    async def _asked(self, rows: Sequence[Row]) -> tuple[Sequence[Any], str | None]:
        """Ask for the scores of a batch, in halves where the server refuses so many rows at once."""
        try:
            return await self.ask(rows)
        except TooLarge:
            if len(rows) == 1:
                raise
        half = len(rows) // 2
        self.batch_size = min(self.batch_size, half)  # of later requests
        (scores, model), (rest, other) = await self._asked(rows[:half]), await self._asked(rows[half:])
        if model != other:
            self.connection.refuse(f"the model is now {shown(other)}, but was {shown(model)} before")
        return [*scores, *rest], model

    def _checked(self, scores: Sequence[Any], count: int, model: str | None) -> list[float]:
        """Check a reply: as many scores as rows, finite, of the same model as before; raise RemoteError if not."""
        try:
            if len(scores) != count:
                raise InputError(f"{len(scores)} scores came for {count} rows")
            if model is not None and self.model not in (None, model):
                raise InputError(f"the model is now {shown(model)}, but was {shown(self.model)} before")
            numbers: list[float] = checked(SCORES, [*scores], "score ", REMEDY)
        except InputError as error:
            self.connection.refuse(str(error), error)
        self.model = model or self.model
        return numbers


class RemoteImages(RemoteScores[tuple[str, "Image.Image"]]):
    """Scores of RGB images with prompts from a server, ``batch_size`` of them in a request of the form ``schema``."""

    def __init__(self, server: RemoteServer, schema: ImageSchema, batch_size: int) -> None:
        super().__init__(server, batch_size)
        self.schema = schema

    def begin(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> PendingScores:
        """Ask for the scores of N RGB images, each for its prompt, and return before they are there."""
        rows = [*zip(prompts, images, strict=True)]
        keys = [digest([f"{identity_of(text)}\n{image.mode} {image.size}\n", image.tobytes()]) for text, image in rows]
        return self.begin_rows(rows, keys)

    async def ask(self, rows: Sequence[tuple[str, Image.Image]]) -> tuple[Sequence[Any], str | None]:
        def encoded() -> tuple[dict[str, Any], bytes]:
            prompts, images = zip(*rows, strict=True)
            request = self.schema.request(prompts, [png_text(image) for image in images])
            return request, json.dumps(request).encode()

        request, content = await asyncio.to_thread(encoded)
        headers = {"content-type": "application/json"}
        reply = await self.connection.asked("POST", self.schema.path, content, headers)
        try:
            if not isinstance(reply, dict):
                raise InputError("the answer is no JSON object; look at the schema")
            return [*self.schema.scores(reply, request)], self.schema.model(reply)
        except InputError as error:
            self.connection.refuse(str(error), error)
        except Exception as error:  # of a schema of the user's; other ranks wait for scores or a refusal
            kind, told = type(self.schema).__name__, f"{type(error).__name__}: {one_line(error)}"
            self.connection.refuse(f"{kind} cannot read the answer {shown(reply)} ({shown(told)})", error)


@dataclass(frozen=True, eq=False)
class LatentRow:
    """Clean latents with an encoded prompt, all float32 on the CPU."""

    latents: Tensor  # ``(C, ...)``, scaled
    prompt: Conditioning  # encoded prompt, one row
    sigma: float  # noise level in [0, 1]
    seed: int  # seed of the noise


class RemoteLatents(RemoteScores[LatentRow]):
    """Scores of clean latents from ``latentreward serve``, which :func:`describe` describes as ``reward``."""

    def __init__(self, server: RemoteServer, schema: ServedLatents, batch_size: int, reward: ServedReward) -> None:
        super().__init__(server, batch_size, reward.model)
        self.schema, self.reward = schema, reward

    def begin(self, rows: Sequence[LatentRow], texts: Sequence[str]) -> PendingScores:
        """Ask for the scores of N rows with latents of one shape, whose prompts are ``texts``; see ``begin_rows``."""
        keys = [
            digest([f"{identity_of(text)}\n{row.sigma} {row.seed} {tuple(row.latents.shape)}\n", row.latents.numpy()])
            for row, text in zip(rows, texts, strict=True)
        ]
        return self.begin_rows(rows, keys)

    async def ask(self, rows: Sequence[LatentRow]) -> tuple[Sequence[Any], str | None]:
        body = await asyncio.to_thread(self._body, rows)
        reply = await self.connection.asked("POST", self.schema.path, body, LATENT_HEADERS)
        try:
            scores = checked(LatentsReply, reply, ANSWER, REMEDY).raw_scores
        except InputError as error:
            self.connection.refuse(str(error), error)
        # The reply does not name the model, and a server that was started again meanwhile may have another one.
        return scores, (await described(self.connection, self.schema)).model

    def _body(self, rows: Sequence[LatentRow]) -> bytes:
        prompts, takes = Conditioning.join([row.prompt for row in rows]).trimmed(), self.reward
        tensors = {
            "latents": torch.stack([row.latents for row in rows]),
            "prompt_embeds": prompts.prompt_embeds,
            "u": torch.tensor([row.sigma for row in rows]),
            "seeds": torch.tensor([row.seed for row in rows]),
            "pooled_prompt_embeds": prompts.pooled_prompt_embeds if takes.pooled_prompt_embeds_width else None,
            "prompt_mask": prompts.prompt_mask if takes.prompt_mask or takes.pools_tokens else None,
            **{f"source_{place}": latents for place, latents in enumerate(prompts.source_latents)},
        }
        return save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})


def describe(connection: Connection, schema: Schema) -> ServedReward:
    """Ask for a description and wait; see :func:`described`."""
    served: ServedReward = connection.result(connection.start(described, connection, schema))
    return served


async def described(connection: Connection, schema: Schema) -> ServedReward:
    """Ask ``latentreward serve`` for the description of a reward, beside the path of the schema.

    Raises:
        RemoteError: If the server gives none.
    """
    path = f"{schema.path.rpartition('/')[0]}/model"
    told = await connection.asked("GET", path)
    try:
        served: ServedReward = checked(ServedReward, told, ANSWER, REMEDY)
        LatentSpace.from_record(served.latent_space)
    except (InputError, TypeError) as error:
        what = f"{path} answers {shown(told)}; schema: {type(schema).__name__} is for latentreward serve"
        connection.refuse(what, error)
    return served
