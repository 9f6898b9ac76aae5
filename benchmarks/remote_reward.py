"""Measure what a reward on a server costs its client beyond the server's own work; prints a Markdown table.

    python benchmarks/remote_reward.py [--size mid_sd35] [--threads 1]

A step asks for the scores of new rows, as a rollout does, and waits for all of them: from pictures to
numbers, with PNG files, requests, parsing, checks and the cache in between. The overhead is the step's time minus the
time in which the server's model scores with the VAE, as a share of the step.

The server runs in a process of its own, with as many threads as the client. ``--size`` is a network of
``random_pipelines.py`` with random weights.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from measuring import Goal, Spread, table
from PIL import Image
from prometheus_client import Counter
from scoring import random_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latentreward.apps.serving.app import serve_until_stopped
from latentreward.apps.serving.service import ScoringService
from latentreward.apps.serving.settings import ServiceSettings, bind
from latentreward.reward import RemoteServer, ServedImages
from latentreward.reward.remote.client import RemoteImages
from tests.apps.serving.processes import server_process

BUSY = "busy_seconds"

Step = Callable[[int], Any]
"""Function that asks for the scores of new rows, drawn with a seed."""


def run_server(size: str, batch_size: int) -> None:
    """Serve a random model that counts the seconds in which it scores; runs in the server's process."""
    settings = ServiceSettings(batch_size=batch_size, timeout=600.0)
    service = ScoringService({"reward": random_model(size)}, settings)
    batcher = service.default.batcher
    busy = Counter(BUSY, "Seconds in which the model scores.", registry=service.registry)
    score = batcher._score

    def timed(rows: Sequence[Any]) -> Sequence[Any]:
        began = time.perf_counter()
        try:
            return score(rows)
        finally:
            busy.inc(time.perf_counter() - began)

    batcher._score = timed
    with bind("127.0.0.1", 0) as bound:
        serve_until_stopped(service, bound)


def busy_seconds(address: str) -> float:
    """Return the seconds in which the server's model has scored so far."""
    return float(re.search(rf"^{BUSY}_total (\S+)$", httpx.get(f"{address}/metrics").text, re.MULTILINE)[1])


def pictures_step(server: RemoteServer, size: str, rows: int, batch_size: int) -> Step:
    """Return a step of pictures, in the size of the network."""
    height, width = random_model(size).backbone.native_size
    remote = RemoteImages(server, ServedImages(), batch_size)

    def step(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        small = torch.randint(256, (rows, height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
        images = [Image.fromarray(one.numpy()).resize((width, height), Image.Resampling.BICUBIC) for one in small]
        remote.begin(["a cat"] * rows, images)()

    return step


def measure(address: str, options: argparse.Namespace) -> list[Any]:
    """Measure steps, and return a row of the table; the first step is a warm-up."""
    server = RemoteServer(address, timeout_s=600.0)
    step = pictures_step(server, options.size, options.rows, options.batch_size)
    whole, busy = [], []
    for number in range(options.rounds + 1):
        before, began = busy_seconds(address), time.perf_counter()
        step(number)
        whole.append(time.perf_counter() - began)
        busy.append(busy_seconds(address) - before)
    shares = [1 - within / seconds for within, seconds in zip(busy[1:], whole[1:], strict=True)]
    share = Spread(shares, ".3f")
    return ["pictures", Spread(whole[1:], ".3f"), Spread(busy[1:], ".3f"), share, Goal(share.median, most=0.1)]


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mid_sd35")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        run_server(options.size, options.batch_size)
        return
    settings = [f"--size={options.size}", f"--threads={options.threads}", f"--batch_size={options.batch_size}"]
    threads = str(options.threads)
    with server_process([sys.executable, __file__, "--serve", *settings], OMP_NUM_THREADS=threads) as server:
        title = f"Reward on a server, {options.size}, {options.rows} rows a step, {threads} threads each"
        columns = ("part", "step, s", "server busy, s", "overhead / step", "goal")
        table(title, columns, [measure(server.address, options)])


if __name__ == "__main__":
    main()
