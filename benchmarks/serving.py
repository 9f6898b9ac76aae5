"""Measure the overhead of serving a reward model over HTTP, and its behaviour under load; prints Markdown tables.

    python benchmarks/serving.py [throughput] [load] [fuzz] [--size mid_sd35] [--threads 1]

``throughput``  rows per second that 32 clients get from a server, and rows per second of ``RewardModel.score_latents``
                in this process on the same rows in batches of equal size; measured in turn
``load``        1 000 requests, 32 at a time: statuses, rate, the server's memory
``fuzz``        10 000 mutated requests: statuses, unexpected answers, the server's memory

The server runs in its own process. Requests are like those of verl-omni's client: one row, 154 tokens of width 4096.
``--size`` is a network of ``random_pipelines.py`` with random weights; ``load`` and ``fuzz`` use the smallest one.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, Goal, Spread, ratio, table
from safetensors.torch import save
from scoring import random_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latentreward.contracts import Conditioning
from latentreward.scoring import RewardModel, ScoringNoise
from latentreward.serving.addresses import bind
from latentreward.serving.protocol import Accepted, parse_request
from latentreward.serving.resources import Resources
from latentreward.serving.served import ServedModel, accepted_by
from latentreward.serving.server import serve
from latentreward.serving.service import ScoringService
from latentreward.serving.settings import ServiceSettings
from tests.serving.latent_requests import tensors_of
from tests.serving.processes import Answers, fuzz, load, server_process

SMALLEST = "toy_sd35"
CLIENTS = 32


def run_server(size: str, batch_size: int) -> None:
    """Serve a random model; runs in the server's process."""
    with bind("127.0.0.1", 0) as bound:
        resources = Resources(ServiceSettings(batch_size=batch_size, timeout=600.0))
        serve(ScoringService([ServedModel(random_model(size), resources)], resources), bound)


def command(size: str, threads: int, batch_size: int = 8) -> list[str]:
    """Return the command that starts the server's process."""
    options = [f"--serve={size}", f"--threads={threads}", f"--batch_size={batch_size}"]
    return [sys.executable, __file__, *options]


def requests_of(accepted: Accepted, count: int, side: int, tokens: int) -> list[bytes]:
    """Return the bodies of ``count`` distinct requests."""
    return [save(tensors_of(accepted, seed=seed, side=side, tokens=tokens)) for seed in range(count)]


# --- throughput ----------------------------------------------------------------------------------------------------


def throughput(size: str, threads: int, count: int, repeats: int, batch_size: int) -> list[Any]:
    """Measure rows per second in process and over HTTP, in turn; return a table row."""
    model = random_model(size)
    accepted = accepted_by(model, ServiceSettings())
    side = model.backbone.native_size[0] // model.backbone.latent_space.downscale
    bodies = requests_of(accepted, 16, side, 154)
    rates: list[tuple[float, float]] = []
    with server_process(command(size, threads, batch_size), OMP_NUM_THREADS=str(threads)) as server:
        load(server.address, bodies, CLIENTS, CLIENTS)
        for _ in range(repeats):
            within = count / in_process(model, bodies, accepted, count, batch_size)
            answers = load(server.address, bodies, count, CLIENTS)
            if answers.unexpected:
                raise RuntimeError(answers.unexpected[0])
            rates.append((within, count / answers.seconds))
    within, over = (Spread(values) for values in zip(*rates, strict=True))
    share = ratio(over, within)
    return [within, over, share, Goal(share.median, least=0.8)]


def in_process(model: RewardModel, bodies: list[bytes], accepted: Accepted, count: int, batch_size: int) -> float:
    """Score ``count`` rows in this process, and return the seconds; requests are parsed before the clock starts."""
    rows = [parse_request(body, accepted)[0] for body in bodies]
    rows = [rows[number % len(rows)] for number in range(count)]
    start = time.perf_counter()
    for first in range(0, count, batch_size):
        batch = rows[first : first + batch_size]
        model.score_latents(
            [row.prompt for row in batch],
            torch.stack([row.latents for row in batch]),
            noise=ScoringNoise(sigmas=(0.4,)),
            conditioning=(
                conditioning([row.prompt_embeds for row in batch], [row.pooled_prompt_embeds for row in batch]),
                None,
            ),
        )
    return time.perf_counter() - start


def conditioning(embeds: list[Tensor], pooled: list[Tensor]) -> Conditioning:
    """Stack the encoded prompts of several rows."""
    return Conditioning(torch.stack(embeds), torch.stack(pooled))


# --- load and fuzz -------------------------------------------------------------------------------------------------


def measure_load(count: int) -> list[str]:
    """Send ``count`` requests to a server, and return the table row of ``load``."""
    bodies = requests_of(accepted_by(random_model(SMALLEST), ServiceSettings()), 16, 16, 154)
    with server_process(command(SMALLEST, 1)) as server:
        load(server.address, bodies, 100, CLIENTS)
        before = server.rss()
        answers = load(server.address, bodies, count, CLIENTS)
        answers.rss = [before, server.rss()]
        return ["load", *described(answers), str(server.stop())]


def measure_fuzz(count: int) -> list[str]:
    """Send ``count`` mutated requests to a server, and return the table row of ``fuzz``."""
    accepted = accepted_by(random_model(SMALLEST), ServiceSettings())
    good = requests_of(accepted, 1, 8, 5)[0]
    with server_process(command(SMALLEST, 1)) as server:
        fuzz(server.address, good, accepted, count // 10, server.rss)
        answers = fuzz(server.address, good, accepted, count, server.rss)
        print("\n".join(answers.unexpected[:10]), end="", file=sys.stderr)
        return ["fuzz", *described(answers), str(server.stop())]


def described(answers: Answers) -> list[str]:
    """Format answers as cells of a table: statuses, unexpected answers, requests per second, memory."""
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(answers.statuses.items()))
    memory = f"{answers.rss[0] / MIB:.0f} → {answers.rss[-1] / MIB:.0f}, at most {max(answers.rss) / MIB:.0f}"
    rate = sum(answers.statuses.values()) / answers.seconds
    return [statuses, str(len(answers.unexpected)), f"{rate:.0f}", memory]


def main() -> None:
    """Run the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["throughput", "load", "fuzz"], metavar="PART")
    parser.add_argument("--size", default="mid_sd35")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128, help="rows per turn of throughput")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        run_server(options.serve, options.batch_size)
        return
    if "throughput" in options.parts:
        row = throughput(options.size, options.threads, options.rows, options.repeats, options.batch_size)
        title = f"Throughput, {options.size}, batches of {options.batch_size}, {options.threads} threads"
        columns = ("in process, rows/s", f"server, {CLIENTS} clients, rows/s", "server / in process", "goal")
        table(title, columns, [row])
    measures = [("load", measure_load, options.requests), ("fuzz", measure_fuzz, options.mutations)]
    if rows := [measure(count) for part, measure, count in measures if part in options.parts]:
        columns = ("part", "statuses", "unexpected", "requests/s", "server's memory, MiB", "exit status")
        table(f"Requests to {SMALLEST}", columns, rows)


if __name__ == "__main__":
    main()
