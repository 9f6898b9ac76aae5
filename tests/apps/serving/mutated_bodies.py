"""Mutated bodies of every route, and a server's answers to them."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import aiohttp
import torch
from PIL import Image
from safetensors.torch import save

from latentreward.apps.serving.bodies import Accepted
from tests.apps.serving.framework_clients import FlowFactoryClient, UniRLClient, encoded
from tests.apps.serving.latent_requests import BYTES, HEADERS, TENSORS, mutated, nonsense, tensors_of, truncated
from tests.apps.serving.processes import Answers, in_one_session
from tests.apps.serving.prompted_requests import TIMES, body_of, latents_of

Mutation = Callable[[random.Random, bytes], bytes]
Kind = tuple[str, bytes, bool | None]


@dataclass(frozen=True)
class FuzzedRoute:
    """A route with a good body, and what changes it: how, the result, and whether it is good, or None if it may be."""

    path: str
    headers: dict[str, str]
    good: bytes
    mutate: Callable[[random.Random, bytes], Kind]


def routes(accepted: Accepted, reward: str = "reward") -> Iterator[FuzzedRoute]:
    """All routes of a server whose first reward takes ``accepted``, verl-omni's first."""

    def one_of(mutations: tuple[Mutation, ...], refused: tuple[Mutation, ...] = ()) -> Callable[..., Kind]:
        def mutate(rng: random.Random, body: bytes) -> Kind:
            chosen = rng.choice(mutations + refused)
            return chosen.__name__, chosen(rng, body), False if chosen in refused else None

        return mutate

    yield FuzzedRoute("/v1/score", HEADERS, save(tensors_of(accepted)), lambda rng, body: mutated(rng, body, accepted))
    image = Image.effect_noise((20, 24), 60.0).convert("RGB")
    latents = body_of({"latents": latents_of(accepted, 2), "u": torch.tensor([0.2, 0.6])}, ["a cat", "two dogs"])
    states = body_of({"latents": latents_of(accepted, 2, 3), "timesteps": TIMES}, ["a cat", "two dogs"])
    for path, body in (("/v1/score_latents", latents), ("/v1/score_states", states)):
        yield FuzzedRoute(path, HEADERS, body, one_of((*BYTES, cut_out, doubled), TENSORS))
    texts = {"prompts": ["a cat", "two dogs"], "images": [encoded(image), encoded(image, "jpeg")]}
    unirl = UniRLClient("", {reward: 1.0}).payload(texts["prompts"], [image, image])
    flow_factory = FlowFactoryClient("").payload(texts["prompts"], [image, image])
    bytewise = (truncated, nonsense, flipped, cut_out, doubled)
    for path, content in (("/v1/score_images", texts), ("/score", unirl), ("/compute", flow_factory)):
        kind, body = {"content-type": "application/json"}, json.dumps(content).encode()
        yield FuzzedRoute(path, kind, body, one_of(bytewise, (doubled_key,)))


def flipped(rng: random.Random, body: bytes) -> bytes:
    changed = bytearray(body)
    for _ in range(rng.choice((1, 1, 8))):
        changed[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_out(rng: random.Random, body: bytes) -> bytes:
    start = rng.randrange(len(body))
    return body[:start] + body[start + rng.randint(1, 200) :]


def doubled(rng: random.Random, body: bytes) -> bytes:
    start = rng.randrange(len(body))
    return body[:start] + body[start : start + rng.randint(1, 400)] * rng.randint(2, 50) + body[start:]


def doubled_key(rng: random.Random, body: bytes) -> bytes:
    """A key is given twice; the last value might win."""
    name = rng.choice(sorted(json.loads(body)))
    return f"{body.decode()[:-1]}, {json.dumps(name)}: null}}".encode()


def fuzz_route(address: str, route: FuzzedRoute, count: int, rss: Callable[[], int] = lambda: 0) -> Answers:
    """Send ``count`` mutated bodies, 8 at a time; each must be answered 200 if good, or 4xx with one line of JSON."""
    answers, rng = Answers(), random.Random(1)

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        kind, body, good = route.mutate(rng, route.good)
        async with session.post(f"{address}{route.path}", data=body, headers=route.headers) as reply:
            status, problem = reply.status, (await reply.json()).get("error", "")
        answers.statuses[status] += 1
        refused = 400 <= status < 500 and problem and "\n" not in problem
        # A flipped exponent may make a number of a good request too large for the network.
        overflow = status == 422 and "not finite" in problem
        if not ((status == 200 and good is not False) or (refused and (not good or overflow))):
            answers.unexpected.append(f"{number} {kind}: {status} {problem}")
        if number % 500 == 0:
            answers.rss.append(rss())

    start = time.monotonic()
    asyncio.run(in_one_session(ask, count, 8))
    answers.seconds = time.monotonic() - start
    answers.rss.append(rss())
    return answers
