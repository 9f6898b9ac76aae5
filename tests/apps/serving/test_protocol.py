"""Bytes of the latent-reward protocol: what comes out of good ones, and what is said of bad ones."""

import asyncio
import json
import random
import resource
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastapi import Request
from pydantic import BaseModel
from safetensors.torch import save

from latentreward.apps.serving.batching import RequestError
from latentreward.apps.serving.bodies import (
    JSON,
    Accepted,
    ByteBudget,
    parse_json,
    parse_latents,
    parse_request,
    parse_states,
)
from latentreward.apps.serving.settings import ServiceSettings
from latentreward.diffusion import FlowMatching
from latentreward.reward.remote.schemas import ComputeRequest, ImagesRequest, UniRLRequest
from tests.apps.serving.latent_requests import body_of, mutated, taken_apart, tensors_of
from tests.apps.serving.prompted_requests import TIMES
from tests.apps.serving.prompted_requests import body_of as prompted

ACCEPTED = Accepted(
    4, text_width=6, pooled_width=3, patch=2, max_side=16, max_latent_pixels=128, max_prompt=7, max_rows=3, queue=8
)
PROCESS = FlowMatching()
UNEQUAL = replace(ACCEPTED, pooled_width=None, max_prompt=6, masked=True, frames=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_request_becomes_rows(dtype: torch.dtype) -> None:
    tensors = tensors_of(ACCEPTED, rows=2)
    tensors["u"], tensors["seeds"] = torch.tensor([0.25, 1.0]), torch.tensor([7, -1])
    tensors["latents"] = tensors["latents"].to(dtype)
    rows = parse_request(save(tensors, metadata={"format": "pt"}), ACCEPTED)
    for number, row in enumerate(rows):
        assert row.latents.dtype == torch.float32 and torch.equal(row.latents, tensors["latents"][number].float())
        assert torch.equal(row.encoded.prompt_embeds, tensors["prompt_embeds"][[number]])
        assert torch.equal(row.encoded.pooled_prompt_embeds, tensors["pooled_prompt_embeds"][[number]])
    assert [(row.prompt, row.u, row.seed) for row in rows] == [("", 0.25, 7), ("", 1.0, -1)]


def test_without_seeds_the_seed_is_0() -> None:
    tensors = tensors_of(ACCEPTED, rows=2)
    del tensors["seeds"]
    assert [row.seed for row in parse_request(save(tensors), ACCEPTED)] == [0, 0]


def changed(**tensors: torch.Tensor | None) -> bytes:
    """A request with other tensors; None leaves one out."""
    return save({name: value for name, value in (tensors_of(ACCEPTED) | tensors).items() if value is not None})


def unequal(**tensors: torch.Tensor | None) -> bytes:
    """The same for a model whose prompts have a mask and no pooled vector, and whose latents have a time axis."""
    given = tensors_of(UNEQUAL, rows=2) | tensors
    return save({name: value for name, value in given.items() if value is not None})


def masks(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


UNIRL = '{"requests":[{"history":[{"text":""}%s],"required_rewards":[""],"metadata":{"a":[%s]}}]}'
MANY = 10_000


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((ImagesRequest, '{"images":[%s""]}' % (one * MANY)) for one in ("{},", '"",', '"ab",')),
        *((ImagesRequest, '{"source_images":[%s[]]}' % (one * MANY)) for one in ("{},", "1,", "[],", '["a"],')),
        (ImagesRequest, json.dumps({f"x{number}": 1 for number in range(MANY)})),
        (ImagesRequest, '{"prompt":"%s"}' % ("\N{CAT}" * MANY)),
        (ImagesRequest, '{"prompt":"%s"}' % ("\\ud83d\\ude00" * MANY)),
        (ImagesRequest, "[" * MANY),
        *((UniRLRequest, UNIRL % ("", one * MANY + "1")) for one in ("{},", '{"a":{}},', "[" * 50 + "]" * 50 + ",")),
        *((UniRLRequest, UNIRL % (one * MANY, "")) for one in (",{}", ',{"text":"b"}')),
        (UniRLRequest, '{"requests":[%s{}]}' % ("{}," * MANY)),
        (ComputeRequest, '{"prompt":[],"video":[%s{}]}' % ("{}," * MANY)),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_json_becomes_fits_into_the_memory_that_is_counted(kind: type[BaseModel], text: str) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def peak() -> int:
        async with memory.body(request, ServiceSettings(), JSON):
            tracemalloc.start()
            with suppress(RequestError):
                parse_json(body, kind)
            return tracemalloc.get_traced_memory()[1] - memory.held

    body, memory = text.encode(), ByteBudget(2**30)
    request = Request({"type": "http", "headers": [(b"content-type", JSON.encode())]}, receive)
    try:
        assert asyncio.run(peak()) < 2**20
    finally:
        tracemalloc.stop()


def described(name: str, **values: Any) -> bytes:
    """A request with another description of one tensor."""
    header, data = taken_apart(changed())
    header[name].update(values)
    return body_of(header, data)


GOOD = changed()
HEADER, DATA = taken_apart(GOOD)


OTHER_DESCRIPTIONS: list[dict[str, Any]] = [
    {"shape": [1, 4, 8, True]},
    {"shape": [1, 4, 8, 9]},
    {"shape": [1, 2**62, 8, 8]},
    {"data_offsets": [-1024, 0]},
    {"data_offsets": [10**6, 10**6 + 1024]},
]
HEADERS = (b"[1]", b"{", b'{"u": NaN}', b'{"u": ' + b"9" * 5000 + b"}", b'{"u": ' + b"[" * 9000, b'{"\xff": 1}')


@pytest.mark.parametrize(
    ("body", "key", "status"),
    [
        *((body, "no safetensors file", 400) for body in (b"", GOOD[:7], GOOD[:50], GOOD[:-1], GOOD + b"\0")),
        *((body_of(text, DATA), "no safetensors file", 400) for text in HEADERS),
        *((described("latents", **values), "no safetensors file", 400) for values in OTHER_DESCRIPTIONS),
        (body_of({**HEADER, "__metadata__": {"a": 1}}, DATA), "no safetensors file", 400),
        (body_of(HEADER | {"v": HEADER["u"]}, DATA), "no safetensors file", 400),
        (changed(v=torch.zeros(1)), "'v'", 400),
        (body_of(b'{"u": {}' + b" " * 20000 + b"}", DATA), "at most 16384", 400),
        (changed(latents=None), "'latents'", 400),
        (changed(prompt_mask=masks([1] * 5)), "'prompt_mask'", 400),
        (changed(u=torch.tensor([0.4], dtype=torch.float64)), "u: give F32", 422),
        (changed(latents=torch.zeros(1, 4, 1, 8, 8)), "of shape (B, C, h, w)", 422),
        (changed(prompt_embeds=torch.zeros(1, 0, 6)), "prompt_embeds: give", 422),
        (changed(latents=torch.zeros(1, 16, 8, 8)), "with C = 4", 422),
        (changed(prompt_embeds=torch.zeros(1, 5, 7)), "with D = 6", 422),
        (changed(u=torch.tensor([0.1, 0.2])), "u: give F32 of shape (B), with B = 1", 422),
        (changed(latents=torch.zeros(1, 4, 7, 8)), "multiples of 2", 422),
        (changed(latents=torch.zeros(1, 4, 2, 18)), "at most 16", 422),
        (changed(latents=torch.zeros(1, 4, 16, 16)), "latents: latent pixels 256", 413),
        (changed(prompt_embeds=torch.zeros(1, 8, 6)), "8 tokens", 422),
        (save(tensors_of(ACCEPTED, rows=4)), "rows 4", 413),
        (changed(u=torch.tensor([1.01])), "u holds", 422),
        (changed(latents=torch.full((1, 4, 8, 8), float("inf"))), "latents holds NaN", 422),
        (unequal(prompt_mask=None), "'prompt_mask'", 400),
        (unequal(prompt_mask=torch.ones(2, 5)), "prompt_mask: give", 422),
        (unequal(prompt_mask=masks([1] * 4, [1] * 4)), "with L = 5", 422),
        (unequal(prompt_mask=masks([1] * 5, [0] * 5)), "prompt_mask", 422),
        (unequal(prompt_mask=masks([0, 1, 1, 1, 1], [1] * 5)), "prompt_mask", 422),
        (unequal(prompt_mask=masks([1] * 5, [1, 0, 1, 0, 0])), "prompt_mask", 422),
        (unequal(prompt_mask=masks([1] * 5, [2, 0, 0, 0, 0])), "prompt_mask", 422),
        (unequal(pooled_prompt_embeds=torch.ones(2, 3)), "'pooled_prompt_embeds'", 400),
        (unequal(latents=torch.zeros(2, 4, 8, 8)), "of shape (B, C, T, h, w)", 422),
        (unequal(latents=torch.zeros(2, 4, 3, 8, 8)), "with T = 1", 422),
        (unequal(prompt_embeds=torch.ones(2, 7, 6), prompt_mask=masks([1] * 7, [1] * 7)), "7 tokens", 422),
    ],
)
def test_bad_requests_are_refused_in_one_line(body: bytes, key: str, status: int) -> None:
    rows_of_unequal = b"[2," in body[:200]
    with pytest.raises(RequestError) as caught:
        parse_request(body, UNEQUAL if rows_of_unequal else ACCEPTED)
    assert (caught.value.status_code, key in str(caught.value)) == (status, True), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def of_latents(prompts: Any = "a", **tensors: torch.Tensor) -> bytes:
    """A body of ``/v1/score_latents`` or, with timesteps, of ``/v1/score_states``."""
    return prompted({"latents": torch.zeros(2, *(3,) * ("timesteps" in tensors), 4, 8, 8)} | tensors, prompts)


def with_texts(**texts: str) -> bytes:
    return save({"latents": torch.zeros(1, 4, 8, 8)}, metadata=texts)


HALF = torch.tensor([0.5, 0.5])
LONG = json.dumps({"__metadata__": {"prompt": "a" * 2**20}}).encode()


@pytest.mark.parametrize(
    ("body", "key", "status"),
    [
        (b"", "no safetensors file", 400),
        (struct.pack("<Q", len(LONG)) + LONG, "at most 1048576 are read", 400),
        (of_latents(latents=torch.zeros(2, 5, 8, 8)), "with C = 4", 422),
        (of_latents(latents=torch.zeros(4, 4, 8, 8)), "latents: rows 4 is over", 413),
        (of_latents(u=HALF[:1]), "with B = 2", 422),
        (of_latents(seeds=torch.tensor([1, 2])), "seeds are given without u", 422),
        (of_latents(x=HALF), "no 'x'", 400),
        (of_latents(["a"]), "1 prompts for 2 rows of latents", 422),
        (of_latents(["a", "b" * 10_001]), "prompt 1 has over", 422),
        (of_latents(["a", "\ud800"]), "__metadata__.prompts", 400),
        (with_texts(), "give __metadata__ one of prompt", 400),
        (with_texts(prompt="a", prompts="[]"), "give __metadata__ one of prompt", 400),
        (with_texts(prompts="a cat"), "__metadata__.prompts", 400),
        (with_texts(prompts='["a", 1]'), "__metadata__.prompts.1", 400),
        (with_texts(prompt="a", promt="b"), "__metadata__.promt", 400),
        (of_latents(timesteps=TIMES[:2]), "with S = 3", 422),
        (of_latents(timesteps=TIMES.expand(3, 3)), "with N = 2", 422),
        (of_latents(timesteps=TIMES * 2), "timestep 1800 is out of range", 422),
        (of_latents(timesteps=TIMES, latents=torch.zeros(3, 4, 8, 8)), "of shape (N, S, C, h, w)", 422),
        (of_latents(timesteps=TIMES, latents=torch.zeros(3, 3, 4, 8, 8)), "latents: N · S 9 is over", 413),
    ],
)
def test_bad_latents_with_prompts_are_refused_in_one_line(body: bytes, key: str, status: int) -> None:
    states = b'"timesteps"' in body
    with pytest.raises(RequestError) as caught:
        parse_states(body, ACCEPTED, PROCESS) if states else parse_latents(body, ACCEPTED)
    assert (caught.value.status_code, key in str(caught.value)) == (status, True), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def overlapping() -> bytes:
    """A request in which two tensors share bytes."""
    header, data = taken_apart(GOOD)
    begin = header["pooled_prompt_embeds"]["data_offsets"][0]
    header["u"]["data_offsets"] = [begin, begin + 4]
    return body_of(header, data)


def listing(count: int, dtype: str = "F32", shape: list[int] | None = None) -> bytes:
    """A body that lists many tensors without bytes."""
    return body_of(
        {f"{n:x}": {"dtype": dtype, "shape": shape or [0], "data_offsets": [0, 0]} for n in range(count)}, b""
    )


@pytest.mark.parametrize(
    "body",
    [
        overlapping(),
        listing(16_000),  # just below 1 MiB of header
        listing(100, shape=[2**62, 0]),
        listing(1, shape=[0] * 300_000),
        listing(1, dtype="F" * 900_000),
        body_of(b'{"' + b"x" * 900_000 + b'": 1}', b""),
        body_of(b"[" * 900_000, b""),
        body_of(b'{"a":' * 200_000, b""),
        body_of(b'{"a": ' + b"9" * 900_000 + b"}", b""),
        body_of(b'{"__metadata__": {' + b",".join(b'"%x": ""' % n for n in range(80_000)) + b"}}", b""),
        struct.pack("<Q", 2**64 - 1) + bytes(2**20),
        struct.pack("<Q", 2**20 + 1) + bytes(2**20 + 1),
    ],
    ids=range(12),
)
def test_hostile_headers_are_refused_in_one_short_line_and_little_memory(body: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError) as caught:
        ACCEPTED.read(body, 2**20, "latents=B C h w, u=B")
    assert caught.value.status_code == 400 and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 * 1024  # KiB


@pytest.mark.parametrize(("good", "accepted"), [(GOOD, ACCEPTED), (unequal(), UNEQUAL)])
def test_1_000_mutated_requests_are_judged_as_safetensors_and_the_protocol_judge_them(
    good: bytes, accepted: Accepted
) -> None:
    rng, verdicts = random.Random(0), {True: 0, False: 0}
    for number in range(1_000):
        kind, body, fine = mutated(rng, good, accepted)
        try:
            parse_request(body, accepted)
            found = True
        except RequestError:
            found = False
        assert found == fine, f"number {number}, {kind}: {body[:400]!r}"
        verdicts[fine] += 1
    assert min(verdicts.values()) > 30  # flips in the numbers leave a good request


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_rows_are_cut_to_their_tokens(dtype: torch.dtype) -> None:
    tensors = tensors_of(UNEQUAL, rows=2)
    tensors["prompt_mask"] = tensors["prompt_mask"].to(dtype)
    rows = parse_request(save(tensors), UNEQUAL)
    for number, row in enumerate(rows):
        assert torch.equal(row.latents, tensors["latents"][number]) and row.latents.shape == (4, 1, 8, 8)
        assert torch.equal(row.encoded.prompt_embeds[0], tensors["prompt_embeds"][number, : 5 - number])
        assert row.encoded.pooled_prompt_embeds is None and row.tokens == 64
    padded = {"prompt_embeds": torch.ones(2, 7, 6), "prompt_mask": torch.arange(7).expand(2, 7) < 6}
    assert len(parse_request(save(tensors | padded), UNEQUAL)) == 2  # padding does not count


def test_models_that_pool_tokens_take_a_mask_in_place_of_the_pooled_vector() -> None:
    """FLUX.2-klein: its clients have padded tokens, on either side, and a mask, but no pooled vector."""
    accepted = Accepted(channels=4, text_width=6, pooled_width=6, pools_tokens=True)
    given = tensors_of(accepted, rows=2)
    without = {name: value for name, value in given.items() if name != "pooled_prompt_embeds"}
    mask = masks([0, 0, 1, 1, 1], [1, 1, 0, 0, 0])
    rows, plain = (parse_request(save(body), accepted) for body in (without | {"prompt_mask": mask}, given))
    for row, other in zip(rows, plain, strict=True):
        assert torch.equal(row.encoded.prompt_embeds, other.encoded.prompt_embeds) and row.encoded.prompt_mask is None
    mean = given["prompt_embeds"][0, 2:].float().mean(dim=0)
    torch.testing.assert_close(rows[0].encoded.pooled_prompt_embeds[0], mean)
    assert torch.equal(plain[1].encoded.pooled_prompt_embeds[0], given["pooled_prompt_embeds"][1].float())
    for tensors, message, status in (
        (without, "pooled_prompt_embeds and prompt_mask are missing; give one of them", 400),
        (
            without | {"prompt_mask": masks([1] * 5, [0] * 5)},
            "prompt_mask must hold 0 and 1, with a 1 in each row",
            422,
        ),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            parse_request(save(tensors), accepted)
        assert caught.value.status_code == status
