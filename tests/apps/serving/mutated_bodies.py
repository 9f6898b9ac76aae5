"""Mutated bodies of every route but verl-omni's (see latent_requests.py), and a server's answers to them."""

import asyncio
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch
from PIL import Image
from safetensors.torch import load, save

from latentreward.apps.serving.bodies import Accepted
from tests.apps.serving import latent_requests
from tests.apps.serving.framework_clients import FlowFactoryClient, UniRLClient, encoded
from tests.apps.serving.processes import Answers, in_one_session
from tests.apps.serving.prompted_requests import TIMES, body_of, latents_of

JSON = "application/json"
BINARY = "application/octet-stream"
BOUNDARY = "b0und4ry"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
Mutation = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class FuzzedRoute:
    """A route with a good body.

    Attributes:
        path: Path.
        kind: Content type.
        good: A body that is answered 200.
        mutations: Changes.
        refused: Changes after which 200 would be wrong.
    """

    path: str
    kind: str
    good: bytes
    mutations: tuple[Mutation, ...]
    refused: tuple[Mutation, ...] = ()


def routes(accepted: Accepted, reward: str = "reward") -> Iterator[FuzzedRoute]:
    """All routes of a server whose first reward takes ``accepted``."""
    image = Image.effect_noise((20, 24), 60.0).convert("RGB")
    latents = body_of({"latents": latents_of(accepted, 2), "u": torch.tensor([0.2, 0.6])}, ["a cat", "two dogs"])
    states = body_of({"latents": latents_of(accepted, 2, 3), "timesteps": TIMES}, ["a cat", "two dogs"])
    for path, body in (("/v1/score_latents", latents), ("/v1/score_states", states)):
        yield FuzzedRoute(path, BINARY, body, (*BYTES, *latent_requests.MUTATIONS[1:14], *TENSORS), TENSORS)
    texts = {"prompts": ["a cat", "two dogs"], "images": [encoded(image), encoded(image, "jpeg")]}
    unirl = UniRLClient("", {reward: 1.0}).payload(texts["prompts"], [image, image])
    flow_factory = FlowFactoryClient("").payload(texts["prompts"], [image, image])
    for path, content in (("/v1/score_images", texts), ("/score", unirl), ("/compute", flow_factory)):
        yield FuzzedRoute(path, JSON, json.dumps(content).encode(), (*BYTES, *VALUES))
    yield FuzzedRoute("/v1/score_images", FORM, form(image), (*BYTES, swapped_lines))


def form(image: Image.Image) -> bytes:
    """A form with a prompt and an image."""
    stream = io.BytesIO()
    image.save(stream, "png")
    head = b'\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n'
    file = b'\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + stream.getvalue()
    mark = f"--{BOUNDARY}".encode()
    return mark + head + mark + file + b"\r\n" + mark + b"--\r\n"


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


def swapped_lines(rng: random.Random, body: bytes) -> bytes:
    lines = body.split(b"\r\n")
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return b"\r\n".join(lines)


BYTES: tuple[Mutation, ...] = (latent_requests.truncated, latent_requests.nonsense, flipped, cut_out, doubled)

JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    10**400,
    float("nan"),
    "",
    "%",
    "aaaa",
    "\ud800",
    "\x00",
    "x" * 200_000,
    "\u00e4" * 130_000,
    [],
    {},
    [[]],
    ["a"] * 3_000,
    [None] * 5_000,
    {"a": {"b": [1]}},
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values in JSON."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*place, key))


def _parent(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


def other_value(rng: random.Random, body: bytes) -> bytes:
    content = json.loads(body)
    place = rng.choice([place for place in _places(content) if place])
    _parent(content, place)[place[-1]] = rng.choice(JUNK)
    return json.dumps(content).encode()


def missing_value(rng: random.Random, body: bytes) -> bytes:
    content = json.loads(body)
    place = rng.choice([place for place in _places(content) if place])
    del _parent(content, place)[place[-1]]
    return json.dumps(content).encode()


def moved_value(rng: random.Random, body: bytes) -> bytes:
    content = json.loads(body)
    places = [place for place in _places(content) if place]
    to, of = rng.choice(places), rng.choice(places)
    copied = json.loads(json.dumps(_parent(content, of)[of[-1]]))
    _parent(content, to)[to[-1]] = copied
    return json.dumps(content).encode()


def deep_value(rng: random.Random, body: bytes) -> bytes:
    depth = rng.randint(100, 50_000)
    return body.replace(b"null", b"[" * depth + b"]" * depth, 1) if b"null" in body else b"[" * depth


VALUES: tuple[Mutation, ...] = (other_value, missing_value, moved_value, deep_value)


def _with_tensors(change: Callable[[random.Random, dict[str, torch.Tensor], dict[str, str]], None]) -> Mutation:
    def mutate(rng: random.Random, body: bytes) -> bytes:
        tensors, texts = load(body), {"prompts": json.dumps(["a cat", "two dogs"])}
        change(rng, tensors, texts)
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=texts)

    mutate.__name__ = change.__name__
    return mutate


Tensors = dict[str, torch.Tensor]


@_with_tensors
def not_finite(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    values = tensors[rng.choice(sorted(tensors))].view(-1)
    values[rng.randrange(len(values))] = rng.choice((torch.nan, torch.inf, -torch.inf))


@_with_tensors
def other_dtype(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(rng.choice((torch.float64, torch.int32, torch.bool, torch.uint8)))


@_with_tensors
def other_rows(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    tensors["latents"] = torch.cat([tensors["latents"]] * rng.choice((2, 100)))


@_with_tensors
def other_sizes(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    latents = tensors["latents"]
    choices = (latents[..., :-1], latents[..., None], latents.flatten(-2), latents.repeat_interleave(40, dim=-1))
    tensors["latents"] = rng.choice(choices)


@_with_tensors
def out_of_range(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    name = next(name for name in tensors if name != "latents")
    tensors[name].view(-1)[0] = rng.choice((-1.0, 1e4, 3e38))


@_with_tensors
def other_tensors(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((f"{name} ", "x" * 300, "\x00"))] = tensors.pop(name)


@_with_tensors
def other_prompts(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    wrong = (
        "",
        "a",
        "[]",
        "null",
        '["a"]',
        '["a", 1]',
        '["a", "\\ud800"]',
        "[" * 3_000,
        json.dumps(["a" * 10_001] * 2),
    )
    texts["prompts"] = rng.choice(wrong)


@_with_tensors
def other_texts(rng: random.Random, tensors: Tensors, texts: dict[str, str]) -> None:
    texts[rng.choice(("prompt", "x", ""))] = "a"


TENSORS: tuple[Mutation, ...] = (
    not_finite,
    other_dtype,
    other_rows,
    other_sizes,
    out_of_range,
    other_tensors,
    other_prompts,
    other_texts,
)


def fuzz_route(address: str, route: FuzzedRoute, count: int, rss: Callable[[], int] = lambda: 0) -> Answers:
    """Send ``count`` mutated bodies, 8 at a time; each must be answered 200, or 4xx with one line of JSON."""
    answers, rng = Answers(), random.Random(1)

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        mutate = rng.choice(route.mutations)
        body, headers = mutate(rng, route.good), {"content-type": route.kind}
        try:
            async with session.post(f"{address}{route.path}", data=body, headers=headers) as reply:
                status, told = reply.status, await reply.json()
        except TimeoutError:
            answers.unexpected.append(f"{number} {mutate.__name__}: no answer to {body[:2000]!r}")
            return
        answers.statuses[status] += 1
        problem = told.get("error", "") if status != 200 else "answered"
        fine = (status == 200 and mutate not in route.refused) or 400 <= status < 500
        if not fine or not problem or "\n" in problem:
            answers.unexpected.append(f"{number} {mutate.__name__}: {status} {problem}")
        if number % 500 == 0:
            answers.rss.append(rss())

    start = time.monotonic()
    asyncio.run(in_one_session(ask, count, 8))
    answers.seconds = time.monotonic() - start
    answers.rss.append(rss())
    return answers
