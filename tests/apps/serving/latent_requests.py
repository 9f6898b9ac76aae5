"""Requests of the latent-reward protocol, well-formed and otherwise, and who decides which are which."""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from latentreward.apps.serving.bodies import Accepted

HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}
Header = dict[str, dict[str, Any]]


def tensors_of(accepted: Accepted, rows: int = 1, seed: int = 0, side: int = 8, tokens: int = 5) -> dict[str, Tensor]:
    """What verl-omni's client puts into a request, for a model that takes ``accepted``.

    With a mask, row r has r tokens less than ``tokens``, and with a time axis there is one frame.
    """
    generator = torch.Generator().manual_seed(seed)
    time = () if accepted.frames is None else (accepted.frames,)
    tensors = {
        "latents": torch.randn(rows, accepted.channels, *time, side, side, generator=generator),
        "prompt_embeds": torch.randn(rows, tokens, accepted.text_width, generator=generator),
    }
    if accepted.pooled_width is not None:
        tensors["pooled_prompt_embeds"] = torch.randn(rows, accepted.pooled_width, generator=generator)
    if accepted.masked:
        tensors["prompt_mask"] = torch.arange(tokens) < tokens - torch.arange(rows)[:, None]
    return {
        **tensors,
        "u": torch.full((rows,), 0.4),
        "seeds": torch.full((rows,), seed, dtype=torch.int64),
    }


def body_of(header: Any, data: bytes) -> bytes:
    """Safetensors bytes with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def taken_apart(body: bytes) -> tuple[Header, bytes]:
    """Header and data of safetensors bytes."""
    length = int.from_bytes(body[:8], "little")
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def acceptable(body: bytes, accepted: Accepted) -> bool:
    """Whether a request is one, by safetensors' own parser and the protocol's table."""
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError):
        return False
    ranks = {"latents": 4 if accepted.frames is None else 5, "prompt_embeds": 3, "u": 1, "seeds": 1}
    ranks |= {"pooled_prompt_embeds": 2} if accepted.pooled_width is not None else {}
    ranks |= {"prompt_mask": 2} if accepted.masked else {}
    floats = (torch.float32, torch.float16, torch.bfloat16)
    dtypes = dict.fromkeys(ranks, floats) | {"u": (torch.float32,), "seeds": (torch.int64,)}
    dtypes["prompt_mask"] = (torch.bool, torch.uint8)
    if not set(ranks) - {"seeds"} <= set(tensors) <= set(ranks):
        return False
    for name, tensor in tensors.items():
        if tensor.ndim != ranks[name] or tensor.dtype not in dtypes[name] or not tensor.numel():
            return False
        if len(tensor) != len(tensors["latents"]) or not tensor.isfinite().all():
            return False
    _, channels, *time, height, width = tensors["latents"].shape
    return (
        (not accepted.masked or _ones_first(tensors["prompt_mask"], tensors["prompt_embeds"].shape[1]))
        and channels == accepted.channels
        and (not time or time[0] == accepted.frames)
        and tensors["prompt_embeds"].shape[2] == accepted.text_width
        and accepted.pooled_width in (None, *(tensors.get("pooled_prompt_embeds", torch.zeros(0)).shape[1:]))
        and height % accepted.patch == width % accepted.patch == 0
        and max(height, width) <= (accepted.max_side or math.inf)
        and math.prod((*time, height, width)) <= accepted.max_latent_pixels
        and (accepted.masked or tensors["prompt_embeds"].shape[1] <= accepted.max_prompt)
        and (not accepted.masked or tensors["prompt_mask"].sum(dim=1).max() <= accepted.max_prompt)
        and len(tensors["latents"]) <= accepted.max_rows
        and bool(((tensors["u"] >= 0) & (tensors["u"] <= 1)).all())
    )


def _ones_first(mask: Tensor, tokens: int) -> bool:
    rows = [row.tolist() for row in mask.view(torch.uint8)]
    counts = [row.count(1) for row in rows]
    return all(row == [1] * n + [0] * (tokens - n) and n for row, n in zip(rows, counts, strict=True))


def truncated(rng: random.Random, body: bytes) -> bytes:
    return body[: rng.randrange(len(body))]


def lengthened(rng: random.Random, body: bytes) -> bytes:
    return body + rng.randbytes(rng.randint(1, 64))


def flipped(rng: random.Random, body: bytes) -> bytes:
    """Bits are changed in the length of the header, in the header, or in the data."""
    changed, data = bytearray(body), 8 + int.from_bytes(body[:8], "little")
    begin, end = rng.choice(((0, 8), (8, data), (data, len(body))))
    for _ in range(rng.choice((1, 1, 3))):
        changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def other_length(rng: random.Random, body: bytes) -> bytes:
    return struct.pack("<Q", rng.choice((0, 1, 2**16, 2**31, 2**63, 2**64 - 1, len(body), len(body) - 8))) + body[8:]


def deep_header(rng: random.Random, body: bytes) -> bytes:
    depth, opening = rng.randint(500, 5_000), rng.choice((b"[", b'{"a":'))
    return body_of(b'{"latents":' + opening * depth, taken_apart(body)[1])


def doubled_key(rng: random.Random, body: bytes) -> bytes:
    header, data = taken_apart(body)
    name = rng.choice(sorted(header))
    return body_of(f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), data)


def nonsense(rng: random.Random, body: bytes) -> bytes:
    return rng.choice((b"", b"{}", b"\x00" * 64, b"not safetensors at all", rng.randbytes(200), b"PK\x03\x04" + body))


def other_entry(rng: random.Random, body: bytes) -> bytes:
    """One tensor's description is changed, and the data are left as they are."""
    header, data = taken_apart(body)
    entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    begin, end = entry["data_offsets"]
    shape, junk = entry["shape"], rng.choice((-1, 0, 1.5, "8", None, True, [8], 2**31, 2**63, 10**30))
    places = [[junk, end], [begin, junk], [end, begin], [begin], [0, 0], [begin + 4, end + 4]]
    shapes = [[*shape[:-1], junk], [*shape[:-1], shape[-1] + 1], [*shape, 1, 1], [], [1] * 5_000]
    dtypes = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "f32", "", ["F32"]]
    name, values = rng.choice((("data_offsets", places), ("shape", shapes), ("dtype", dtypes), ("extra", [1.5])))
    entry[name] = rng.choice([*values, junk])
    if rng.random() < 0.1:
        del entry[name]
    return body_of(header, data)


Change = Callable[[random.Random, dict[str, Tensor]], None]


def _with_tensors(change: Change) -> Callable[[random.Random, bytes], bytes]:
    """Changes tensors and writes them anew."""

    def mutate(rng: random.Random, body: bytes) -> bytes:
        tensors, texts = load(body), taken_apart(body)[0].get("__metadata__")
        change(rng, tensors)
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=texts)

    mutate.__name__ = change.__name__
    return mutate


@_with_tensors
def other_number(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice([name for name, tensor in tensors.items() if tensor.dtype == torch.float32])
    junk = (math.nan, math.inf, -math.inf, *((-1e-6, 1.0001, 1e30) if name == "u" else ()))
    tensor = tensors[name].view(-1)
    tensor[rng.randrange(len(tensor))] = rng.choice(junk)


@_with_tensors
def missing_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    del tensors[rng.choice(sorted({*tensors} - {"seeds", "u"} or {*tensors}))]


@_with_tensors
def renamed_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((f"{name} ", name.upper(), "x" * 300, "../u", "\x00"))] = tensors.pop(name)


@_with_tensors
def other_rows(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = torch.cat([tensors[name]] * rng.choice((2, 3, 100)))


@_with_tensors
def other_sizes(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice([name for name, tensor in tensors.items() if tensor.ndim > 1])
    tensor = tensors[name]
    tensors[name] = rng.choice((tensor[:, 1:], tensor[..., :-1], tensor[..., None], tensor.flatten(-2)))


@_with_tensors
def other_mask(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    if "prompt_mask" not in tensors:
        tensors["prompt_mask"] = torch.ones(len(tensors["latents"]), 5, dtype=torch.bool)
        return
    mask = tensors["prompt_mask"].to(torch.uint8)
    mask[0, rng.randrange(mask.shape[1])] ^= rng.choice((1, 1, 2))
    tensors["prompt_mask"] = mask


TENSORS = (other_number, missing_tensor, renamed_tensor, other_rows, other_sizes, other_mask)
BYTES = (truncated, lengthened, flipped, other_length, deep_header, doubled_key, nonsense, other_entry)


def mutated(rng: random.Random, body: bytes, accepted: Accepted) -> tuple[str, bytes, bool]:
    """A changed request: how it was changed, its bytes, and whether it still is a good one."""
    mutate = rng.choice(BYTES + TENSORS)
    changed = mutate(rng, body)
    return mutate.__name__, changed, acceptable(changed, accepted)
