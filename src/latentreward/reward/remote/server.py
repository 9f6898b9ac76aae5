"""Requests to a reward server: tries, waiting, limits of time and size, and the token."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_at_least_one, check_range, errors_at, first_line, printable
from latentreward.core.interrupts import stop_asked
from latentreward.core.storage.json_files import checked_token, token_of_file

if TYPE_CHECKING:
    import httpcore

    from latentreward.reward.remote.transport import TimedNetwork

logger = logging.getLogger(__name__)

RETRIED = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which the same request may succeed later
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Seconds before the second try, doubled for each further one up to the limit.

The server's ``Retry-After`` is kept instead, if it is not shorter than the first pause.
"""
LARGEST_REPLY = 16 * 2**20
"""Greatest size of a reply, in bytes; compressed ones, which may be of any size once unpacked, are not taken."""
SHOWN = 200  # number of characters of a server's own words that a message repeats
LOOK_S = 0.2  # seconds between two looks for a signal to stop while waiting


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
        timeout_s: Longest time of one try in seconds, from the connection to the end of the answer.
        retry_s: Longest time from the first failed try to the last, in seconds, under ``on_outage: stop``.
        on_outage: What happens when the tries of ``retry_s`` have failed. ``stop`` ends the run, which saves a
            checkpoint first; ``wait`` goes on trying for ``wait_s``, then stops in the same way.
        wait_s: Longest wait in seconds, under ``on_outage: wait``.
        parallel: Greatest number of requests at the same time, for each process.

    Raises:
        InputError: If the address is no HTTP address, or holds a name and password; if a limit is out of range, or the
            token cannot be read.
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
    def limit_s(self) -> float:
        """Longest time from the first failed try to the last, in seconds."""
        return self.wait_s if self.on_outage == "wait" else self.retry_s


class Unavailable(Exception):
    """A failed try after which the same request may succeed."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s  # seconds after which the server asks to be tried again; None if it does not say


class Connection:
    """Connections of this process to a server, which threads share.

    Environment variables of proxies have no effect: they would also apply to servers of the own network.
    """

    def __init__(self, server: RemoteServer) -> None:
        self.server = server
        self._lock, self._owner = Lock(), 0
        self._failing_since: float | None = None  # by the monotonic clock; None while the server answers
        self._pool: tuple[httpcore.ConnectionPool, TimedNetwork] | None = None

    def ask(
        self,
        method: Literal["GET", "POST"],
        path: str,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        ended: Event | None = None,
    ) -> Any:
        """Send a request, again if need be, and return the JSON of the answer.

        The token's header is added to ``headers``. Another thread sets ``ended`` when it does not need the answer any
        more.

        Raises:
            RemoteError: If there is no answer in time, the server refuses the request, or the answer is no JSON; also
                when a signal to stop arrives between two tries.
        """
        url, began, tries = f"{self.server.url.rstrip('/')}{path}", 0.0, 0
        while True:
            tries += 1
            try:
                answer = self._try(method, url, content, headers or {})
            except Unavailable as error:
                now = time.monotonic()
                began = began or now
                pause = min(FIRST_PAUSE_S * 2 ** min(tries - 1, 10), LONGEST_PAUSE_S)
                pause = pause if error.pause_s is None else max(error.pause_s, FIRST_PAUSE_S)
                left = began + self.server.limit_s - now
                if left <= 0 or (error.pause_s or 0.0) > left:
                    self._give_up(error, tries, now - began)
                self._tell(error)
                self._wait(min(pause, left), ended, f"{error}")
            else:
                self._tell(None)
                return answer

    def _try(self, method: str, url: str, content: bytes, headers: dict[str, str]) -> Any:
        """Send a request once; raise Unavailable if another try may succeed, RemoteError if not."""
        import httpcore
        import httpx

        limit, (pool, network) = self.server.timeout_s, self._connections()
        token, address = self.server.token, str(httpx.URL(url))  # in ASCII
        headers = {"accept-encoding": "identity", "user-agent": "latentreward", **headers}
        headers |= {} if token is None else {"authorization": f"Bearer {token}"}
        network.start(limit)
        try:
            with pool.stream(method, address, headers=headers, content=content) as reply:
                body = bytearray()
                for part in reply.iter_stream():
                    body += part
                    if len(body) > LARGEST_REPLY:
                        self.refuse(f"the answer is longer than {LARGEST_REPLY // 2**20} MiB; is this a reward server?")
        except httpcore.TimeoutException as error:
            raise Unavailable(f"no answer within timeout_s={limit:g} seconds") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise Unavailable(printable(first_line(error))[:SHOWN]) from error
        told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reply.headers}
        return self._content(reply.status, told, bytes(body))

    def _content(self, status: int, headers: Mapping[str, str], body: bytes) -> Any:
        """Return the JSON of a complete answer."""
        packed = headers.get("content-encoding", "identity") != "identity"
        body = b"(compressed)" if packed else body
        words = partial(words_of, body, self.server.token)
        if status in RETRIED:
            raise Unavailable(f"HTTP {status}: {words()}", seconds_of(headers.get("retry-after")))
        if status != 200:
            remedy = {401: "; set token_file or token_env", 404: "; look at server.url and the schema"}.get(status, "")
            if 300 <= status < 400:  # with a redirect, the token would go to another server
                place = words_of(headers.get("location", "").encode(), self.server.token)
                remedy = f"; redirects are not followed: set server.url to the final address; it leads to {place}"
            self.refuse(f"HTTP {status}: {words()}{remedy}", kind=TooLarge if status == 413 else RemoteError)
        if packed:
            self.refuse("the answer is compressed, which was not asked for; look at the proxy before the server")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            self.refuse(f"the answer is no JSON ({type(error).__name__}): {words()}", error)

    def _connections(self) -> tuple[httpcore.ConnectionPool, TimedNetwork]:
        """Return the connections of this process; those that a fork has copied would share their sockets."""
        import httpcore
        import httpx

        from latentreward.reward.remote.transport import TimedNetwork

        with self._lock:
            if self._pool is None or self._owner != os.getpid():
                network, secure = TimedNetwork(), urlsplit(self.server.url).scheme == "https"
                pool = httpcore.ConnectionPool(
                    ssl_context=httpx.create_ssl_context(trust_env=False) if secure else None,
                    max_connections=None,
                    max_keepalive_connections=self.server.parallel,
                    keepalive_expiry=5.0,
                    network_backend=network,
                )
                self._pool, self._owner = (pool, network), os.getpid()
            return self._pool

    def refuse(
        self, problem: str, cause: BaseException | None = None, kind: type[RemoteError] = RemoteError
    ) -> NoReturn:
        """Raise a RemoteError that names the server and the ``problem`` of its answer, without the token."""
        problem = without_token(problem, self.server.token)
        raise kind(f"reward server {self.server.url}: {problem}") from cause

    def _give_up(self, error: Unavailable, tries: int, seconds: float) -> NoReturn:
        counted = "1 try" if tries == 1 else f"{tries} tries"
        limit, allowed = "wait_s" if self.server.on_outage == "wait" else "retry_s", self.server.limit_s
        remedy = f"start the server, or raise {limit}"
        if error.pause_s and error.pause_s > allowed - seconds:
            remedy = f"the server asks for a pause of {error.pause_s:g} seconds; go on after it, or raise {limit}"
        self.refuse(
            f"no scores after {counted} in {seconds:.0f} seconds (server.{limit}={allowed:g}); the last one: {error}; "
            f"{remedy}"
        )

    def _wait(self, seconds: float, ended: Event | None, reason: str) -> None:
        """Wait; raise RemoteError if the answer is not needed any more, or the run should stop."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if ended is not None and ended.is_set():
                self.refuse("the answer is not needed any more")
            if stop_asked.is_set():
                self.refuse(f"a signal ended the wait for it; the last try: {reason}")
            time.sleep(min(left, LOOK_S))

    def _tell(self, error: Unavailable | None) -> None:
        """Log the beginning of an outage by its ``error``, or the end by None; once for all threads."""
        now, url, limit = time.monotonic(), self.server.url, self.server.limit_s
        with self._lock:
            since = self._failing_since
            self._failing_since = None if error is None else since or now
        if error is None and since is not None:
            logger.warning("reward server %s answers again after %.0f seconds", url, now - since)
        if error is not None and since is None:
            logger.warning("reward server %s: %s; tries again for up to %g seconds", url, error, limit)


def words_of(body: bytes, token: str | None = None) -> str:
    """Return the beginning of a server's error message in one printable line, without a ``token`` that it repeats."""
    text = body.decode("utf-8", "replace")
    try:
        values = json.loads(text)
        text = str(next((values[name] for name in ("error", "detail", "message") if name in values), values))
    except (ValueError, TypeError, RecursionError):
        pass
    return printable(" ".join(without_token(text, token).split()))[:SHOWN] or "(no text)"


def without_token(text: str, token: str | None) -> str:
    """Return a text of a server with ``(token)`` for the token, also where it is quoted or cut off at its end."""
    if token is None:
        return text
    text = text.replace(token, "(token)").replace(repr(token)[1:-1], "(token)")
    for length in range(len(token) - 1, 3, -1):
        text = text.replace(f"{token[:length]}…", "(token)…")
    return text


def seconds_of(header: str | None) -> float | None:
    """Return the seconds of a header ``Retry-After``, which holds a number or a date; None without a valid one."""
    if header is None:
        return None
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)
