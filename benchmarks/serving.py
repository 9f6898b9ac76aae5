"""Measure the overhead of serving a reward model over HTTP, and its behaviour under load; prints Markdown tables.

    python benchmarks/serving.py [throughput] [load] [fuzz] [trajectories] [fuzz_routes] [--size mid_sd35] [--threads 1]

``throughput``  rows per second that 32 clients get from a server, and rows per second of ``RewardModel.score_latents``
                in this process on the same rows in batches of equal size; measured in turn
``trajectories``  seconds for 1 000 trajectories of 8 states, and for their states one by one, by as many clients;
                measured in turn, with equal scores
``load``        1 000 requests, 32 at a time: statuses, rate, the server's memory
``fuzz``        10 000 mutated requests of verl-omni's protocol: statuses, unexpected answers, the server's memory
``fuzz_routes`` the same for each other route; like ``trajectories`` only if asked for

The server runs in its own process. Requests are like those of verl-omni's client: one row, 154 tokens of width 4096.
``--size`` is a network of ``random_pipelines.py`` with random weights; ``load`` and ``fuzz`` use the smallest one.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import torch
from measuring import MIB, Goal, Spread, ratio, table
from safetensors.torch import save
from scoring import random_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latentreward.apps.serving.app import serve_until_stopped
from latentreward.apps.serving.bodies import Accepted, parse_request
from latentreward.apps.serving.service import ScoringService
from latentreward.apps.serving.settings import ServiceSettings, bind
from latentreward.core.contracts import Conditioning
from latentreward.reward import RewardModel, ScoringNoise
from tests.apps.serving.latent_requests import tensors_of
from tests.apps.serving.mutated_bodies import FuzzedRoute, fuzz_route, routes
from tests.apps.serving.processes import Answers, in_one_session, load, server_process
from tests.apps.serving.prompted_requests import body_of, latents_of

SMALLEST = "toy_sd35"
CLIENTS = 32


def run_server(size: str, batch_size: int) -> None:
    """Serve a random model; runs in the server's process."""
    with bind("127.0.0.1", 0) as bound:
        settings = ServiceSettings(batch_size=batch_size, timeout=600.0)
        serve_until_stopped(ScoringService({"reward": random_model(size)}, settings), bound)


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
    accepted = Accepted.of(model, ServiceSettings())
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
            conditioning=(Conditioning.join([row.encoded for row in batch]), None),
        )
    return time.perf_counter() - start


# --- trajectories --------------------------------------------------------------------------------------------------


def trajectories(options: argparse.Namespace) -> list[Any]:
    """Measure whole trajectories against their states one by one, in turn; return a table row."""
    model = random_model(options.size)
    accepted, steps = Accepted.of(model, ServiceSettings()), options.states
    side = model.backbone.native_size[0] // model.backbone.latent_space.downscale
    times = torch.linspace(950.0, 50.0, steps)
    states = [latents_of(accepted, 1, steps, side=side, seed=seed) for seed in range(16)]
    prompts = [f"picture {number}" for number in range(16)]
    whole = [body_of({"latents": one, "timesteps": times}, prompt) for one, prompt in zip(states, prompts, strict=True)]
    single = [
        body_of({"latents": one[:, [step]], "timesteps": times[[step]]}, prompt)
        for one, prompt in zip(states, prompts, strict=True)
        for step in range(steps)
    ]
    seconds: list[tuple[float, float]] = []
    differences: list[float] = []
    count, clients = options.trajectories, options.clients
    with server_process(
        command(options.size, options.threads, options.batch_size), OMP_NUM_THREADS=str(options.threads)
    ) as server:
        ask_states(server.address, whole, 16, clients)
        for _ in range(options.repeats):
            together, scores = ask_states(server.address, whole, count, clients)
            apart, alone = ask_states(server.address, single, count * steps, clients)
            seconds.append((together, apart))
            differences.append((torch.tensor(scores).flatten() - torch.tensor(alone).flatten()).abs().max().item())
    whole_seconds, single_seconds = (Spread(values) for values in zip(*seconds, strict=True))
    faster = ratio(single_seconds, whole_seconds)
    equal = Goal(max(differences), most=2e-5)
    return [whole_seconds, single_seconds, faster, Goal(faster.median, least=1.5), f"{max(differences):.1e}", equal]


def ask_states(address: str, bodies: list[bytes], count: int, clients: int) -> tuple[float, list[Any]]:
    """Ask ``count`` times for scores of states, some at a time; return the seconds and the scores in order."""
    scores: list[Any] = [None] * count
    headers = {"content-type": "application/octet-stream"}

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        body = bodies[number % len(bodies)]
        async with session.post(f"{address}/v1/score_states", data=body, headers=headers) as reply:
            if reply.status != 200:
                raise RuntimeError(await reply.text())
            scores[number] = (await reply.json())["scores"]

    start = time.monotonic()
    asyncio.run(in_one_session(ask, count, clients))
    return time.monotonic() - start, scores


# --- load and fuzz -------------------------------------------------------------------------------------------------


def measure_load(count: int) -> list[str]:
    """Send ``count`` requests to a server, and return the table row of ``load``."""
    bodies = requests_of(Accepted.of(random_model(SMALLEST), ServiceSettings()), 16, 16, 154)
    with server_process(command(SMALLEST, 1)) as server:
        load(server.address, bodies, 100, CLIENTS)
        before = server.rss()
        answers = load(server.address, bodies, count, CLIENTS)
        answers.rss = [before, server.rss()]
        return ["load", *described(answers), str(server.stop())]


def measure_route(route: FuzzedRoute, count: int) -> list[str]:
    """Send ``count`` mutated bodies to a route, and return a table row of ``fuzz``."""
    with server_process(command(SMALLEST, 1)) as server:
        fuzz_route(server.address, route, count // 10)
        answers = fuzz_route(server.address, route, count, server.rss)
        print("\n".join(answers.unexpected[:10]), end="", file=sys.stderr)
        kind = route.headers["content-type"].partition(";")[0].rpartition("/")[2]
        return [f"fuzz {route.path}, {kind}", *described(answers), str(server.stop())]


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
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--states", type=int, default=8, help="states of a trajectory")
    parser.add_argument("--clients", type=int, default=8, help="clients of trajectories")
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
    if "trajectories" in options.parts:
        title = (
            f"{options.trajectories} trajectories of {options.states} states, {options.size}, {options.clients} clients"
        )
        columns = ("whole, s", "state by state, s", "ratio", "goal", "greatest difference of scores", "goal")
        table(title, columns, [trajectories(options)])
    rows = [measure_load(options.requests)] if "load" in options.parts else []
    if {"fuzz", "fuzz_routes"} & {*options.parts}:
        every = [*routes(Accepted.of(random_model(SMALLEST), ServiceSettings()))]
        chosen = every[:1] * ("fuzz" in options.parts) + every[1:] * ("fuzz_routes" in options.parts)
        rows += [measure_route(route, options.mutations) for route in chosen]
    if rows:
        columns = ("part", "statuses", "unexpected", "requests/s", "server's memory, MiB", "exit status")
        table(f"Requests to {SMALLEST}", columns, rows)


if __name__ == "__main__":
    main()
