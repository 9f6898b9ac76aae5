"""Bytes of the latent-reward protocol: what comes out of good ones, and what is said of bad ones."""

import random
import resource
import struct
from itertools import count
from typing import Any

import pytest
import torch
from safetensors.torch import save

from latentreward.apps.serving.protocol import check_version, parse_request
from latentreward.apps.serving.refusals import RequestError
from latentreward.apps.serving.tensors import Accepted, Expected, read_tensors
from tests.apps.serving.latent_requests import body_of, mutated, taken_apart, tensors_of

ACCEPTED = Accepted(
    channels=4, text_width=6, pooled_width=3, patch=2, max_side=16, max_pixels=128, max_tokens=7, max_rows=3
)


def test_a_request_becomes_rows() -> None:
    tensors = tensors_of(ACCEPTED, rows=2)
    tensors["u"], tensors["seeds"] = torch.tensor([0.25, 1.0]), torch.tensor([7, -1])
    rows = parse_request(save(tensors), ACCEPTED)
    for number, row in enumerate(rows):
        assert torch.equal(row.latents, tensors["latents"][number])
        assert torch.equal(row.encoded.prompt_embeds, tensors["prompt_embeds"][[number]])
        assert torch.equal(row.encoded.pooled_prompt_embeds, tensors["pooled_prompt_embeds"][[number]])
    assert [(row.u, row.seed) for row in rows] == [(0.25, 7), (1.0, -1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_what_it_says(dtype: torch.dtype) -> None:
    tensors = tensors_of(ACCEPTED)
    tensors["latents"] = tensors["latents"].to(dtype)
    row = parse_request(save(tensors), ACCEPTED)[0]
    assert row.latents.dtype == torch.float32 and torch.equal(row.latents, tensors["latents"][0].float())


def test_noise_is_named_by_the_header_alone() -> None:
    for seed in (0, 1):
        assert parse_request(save(tensors_of(ACCEPTED, seed=seed)), ACCEPTED)[0].prompt == ""
        assert parse_request(save(tensors_of(ACCEPTED, seed=seed)), ACCEPTED, "a cat")[0].prompt == "a cat"


def test_without_seeds_the_seed_is_0_or_the_next_fresh_one() -> None:
    tensors, fresh = tensors_of(ACCEPTED, rows=2), count(5)
    assert [row.seed for row in parse_request(save(tensors), ACCEPTED, seeds=fresh)] == [0, 0]
    del tensors["seeds"]
    assert [row.seed for row in parse_request(save(tensors), ACCEPTED)] == [0, 0]
    assert [row.seed for row in parse_request(save(tensors), ACCEPTED, seeds=fresh)] == [5, 6]
    assert [row.seed for row in parse_request(save(tensors), ACCEPTED, seeds=fresh)] == [7, 8]


def test_metadata_is_ignored() -> None:
    assert parse_request(save(tensors_of(ACCEPTED), metadata={"format": "pt"}), ACCEPTED)


@pytest.mark.parametrize("version", [None, "", "2", "1.0", "x" * 1000])
def test_another_version_is_refused(version: str | None) -> None:
    with pytest.raises(RequestError, match="speaks version 1"):
        check_version(version)


def changed(**tensors: torch.Tensor | None) -> bytes:
    """A request with other tensors; None leaves one out."""
    return save({name: value for name, value in (tensors_of(ACCEPTED) | tensors).items() if value is not None})


def described(name: str, **values: Any) -> bytes:
    """A request with another description of one tensor."""
    header, data = taken_apart(changed())
    header[name].update(values)
    return body_of(header, data)


GOOD = changed()
HEADER, DATA = taken_apart(GOOD)


@pytest.mark.parametrize(
    ("body", "message", "status"),
    [
        (b"", "no safetensors file", 400),
        (GOOD[:7], "no safetensors file", 400),
        (GOOD[:50], "no safetensors file", 400),
        (GOOD[:-1], "no safetensors file", 400),
        (GOOD + b"\0", "no safetensors file", 400),
        (body_of(b"[1]", DATA), "no safetensors file", 400),
        (body_of(b"{", DATA), "no safetensors file", 400),
        (body_of(b'{"u": NaN}', DATA), "no safetensors file", 400),
        (body_of(b'{"u": ' + b"9" * 5000 + b"}", DATA), "no safetensors file", 400),
        (body_of(b'{"u": ' + b"[" * 9000, DATA), "no safetensors file", 400),
        (body_of(b'{"u": 1, "u": 1}', DATA), "no safetensors file", 400),
        (body_of(b'{"\xff": 1}', DATA), "no safetensors file", 400),
        (body_of({**HEADER, "__metadata__": {"a": 1}}, DATA), "no safetensors file", 400),
        (body_of(HEADER | {"v": HEADER["u"]}, DATA), "no safetensors file", 400),
        (save(tensors_of(ACCEPTED) | {"v": torch.zeros(1)}), "unknown tensor 'v'; the protocol has latents", 400),
        (body_of(b'{"u": {}' + b" " * 20000 + b"}", DATA), "at most 16384", 400),
        (body_of({**HEADER, "u": []}, DATA), "no safetensors file", 400),
        (changed(latents=None), "lacks 'latents'", 400),
        (changed(u=None), "lacks 'u'", 400),
        (changed(u=torch.tensor([0.4], dtype=torch.float64)), "u: dtype must be F32", 400),
        (changed(seeds=torch.tensor([1], dtype=torch.int32)), "seeds: dtype must be I64", 400),
        (changed(latents=torch.zeros(1, 4, 8, 8, dtype=torch.float64)), "latents: dtype", 400),
        (changed(latents=torch.zeros(4, 8, 8)), r"latents: shape must be \(B, C, h, w\), whole numbers from 1 on", 400),
        (changed(prompt_embeds=torch.zeros(1, 0, 6)), "prompt_embeds: shape", 400),
        (described("latents", shape=[1, 4, 8, True]), "no safetensors file", 400),
        (described("latents", shape=[1, 4, 8, 9]), "no safetensors file", 400),
        (described("latents", shape=[1, 2**62, 8, 8]), "no safetensors file", 400),
        (described("latents", data_offsets=[-1024, 0]), "no safetensors file", 400),
        (described("latents", data_offsets=[10**6, 10**6 + 1024]), "no safetensors file", 400),
        (described("u", data_offsets=HEADER["pooled_prompt_embeds"]["data_offsets"]), "no safetensors file", 400),
        (changed(latents=torch.zeros(1, 16, 8, 8)), r"latents: C of \(B, C, h, w\) is 16, but 4 in this model", 422),
        (changed(prompt_embeds=torch.zeros(1, 5, 7)), r"prompt_embeds: D of \(B, L, D\) is 7, but 6", 422),
        (changed(pooled_prompt_embeds=torch.zeros(1, 2)), "pooled_prompt_embeds: P .* is 2, but 3 .* give P = 3", 422),
        (changed(u=torch.tensor([0.1, 0.2])), r"u: B of \(B\) is 2, but 1", 422),
        (changed(seeds=torch.tensor([1, 2])), r"seeds: B of \(B\) is 2", 422),
        (changed(latents=torch.zeros(1, 4, 7, 8)), "latents: 7 is no multiple of the 2 .*; make it 6 or 8", 422),
        (changed(latents=torch.zeros(1, 4, 2, 18)), "a side over 16", 422),
        (changed(latents=torch.zeros(1, 4, 16, 16)), "h · w 256 is over this server's limit of 128", 413),
        (changed(prompt_embeds=torch.zeros(1, 8, 6)), "tokens 8 is over", 413),
        (save(tensors_of(ACCEPTED, rows=4)), "rows 4 is over", 413),
        (changed(u=torch.tensor([1.01])), "u holds 1.01", 422),
        (changed(u=torch.tensor([-0.1])), "u holds -0.1", 422),
        (changed(u=torch.tensor([float("nan")])), "u holds NaN", 422),
        (changed(latents=torch.full((1, 4, 8, 8), float("inf"))), "latents holds NaN or infinity", 422),
        (changed(prompt_embeds=torch.full((1, 5, 6), float("nan"))), "prompt_embeds holds NaN", 422),
    ],
)
def test_bad_requests_are_refused_in_one_line(body: bytes, message: str, status: int) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request(body, ACCEPTED)
    assert caught.value.status == status and "\n" not in str(caught.value) and len(str(caught.value)) < 300


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
        read_tensors(body, {"u": Expected(("B",))}, {}, 2**20)
    assert caught.value.status == 400 and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 * 1024  # KiB


@pytest.mark.slow
def test_2_000_mutated_requests_are_judged_as_safetensors_and_the_protocol_judge_them() -> None:
    rng, verdicts = random.Random(0), {True: 0, False: 0}
    for number in range(2_000):
        kind, body, good = mutated(rng, GOOD, ACCEPTED)
        try:
            parse_request(body, ACCEPTED)
            found = True
        except RequestError:
            found = False
        assert found == good, f"number {number}, {kind}: {body[:400]!r}"
        verdicts[good] += 1
    assert min(verdicts.values()) > 60  # flips in the numbers leave a good request
