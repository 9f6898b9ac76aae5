"""A server in a process of its own, and many requests to it."""

import asyncio
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.apps.serving.latent_requests import HEADERS
from tests.processes import Forked, start


class ServerProcess:
    """A running ``latentreward serve``, or another command that prints ``... at http://...``."""

    def __init__(self, process: "subprocess.Popen[str] | Forked", address: str) -> None:
        self.process, self.address = process, address

    def rss(self) -> int:
        """Bytes of memory that it has resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(sent)
        return self.process.wait(60)


@contextmanager
def server_process(command: Sequence[str], **environment: str) -> Iterator[ServerProcess]:
    """Start a server, wait until it serves, and end it with the context if it still runs then."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        for line in process.stdout:
            if match := re.search(r" at (http://\S+)$", line.strip()):
                yield ServerProcess(process, match[1])
                break
        else:
            raise RuntimeError(f"the server ended: {process.stderr.read()[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def forked_server(*arguments: str, **options: Any) -> Iterator[ServerProcess]:
    """The same of ``latentreward`` with these arguments, in a process that need not import everything again."""
    process, end = start(arguments, **options), time.monotonic() + 300
    try:
        while not (match := re.search(r" at (http://\S+)$", process.stdout, re.MULTILINE)):
            assert process.poll() is None, process.stderr[-2000:]
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.02)
        yield ServerProcess(process, match[1])
    finally:
        process.kill()


@dataclass
class Answers:
    """What came back: statuses, answers other than they should be, and the server's resident memory now and then."""

    statuses: Counter[int] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    seconds: float = 0.0
    rss: list[int] = field(default_factory=list)


def load(address: str, bodies: Sequence[bytes], count: int, concurrency: int) -> Answers:
    """Ask for scores ``count`` times, ``concurrency`` at a time; all must be given."""
    answers = Answers()

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        body = bodies[number % len(bodies)]
        async with session.post(f"{address}/v1/score", data=body, headers=HEADERS) as reply:
            answers.statuses[reply.status] += 1
            if reply.status != 200:
                answers.unexpected.append(await reply.text())

    start = time.monotonic()
    asyncio.run(in_one_session(ask, count, concurrency))
    answers.seconds = time.monotonic() - start
    return answers


async def in_one_session(
    ask: Callable[[aiohttp.ClientSession, int], Awaitable[None]], count: int, concurrency: int
) -> None:
    """Ask ``count`` times, a number of them at a time."""
    numbers, timeout = iter(range(count)), aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def work() -> None:
            for number in numbers:
                await ask(session, number)

        await asyncio.gather(*(work() for _ in range(concurrency)))
