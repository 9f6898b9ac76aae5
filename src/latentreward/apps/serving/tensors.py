"""Safetensors bodies of untrusted clients: tensors by name, with dtypes, shapes and values that a reward takes."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import Request
from safetensors import SafetensorError, deserialize
from torch import Tensor

from latentreward.apps.serving.bodies import SAFETENSORS, check_type
from latentreward.apps.serving.refusals import ROWS, RequestError, check_limit
from latentreward.apps.serving.resources import Resources
from latentreward.core.contracts import sources_wanted
from latentreward.core.errors import InputError, check_multiples, one_line, quoted
from latentreward.data.readers.json_rows import MOST_SOURCES

HEADER_BYTES = 16 * 1024
"""Greatest length of a safetensors header without prompts, in bytes; five tensors need less than 500."""
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.uint8,
    "U8": torch.uint8,
}
"""Name of a dtype in safetensors → dtype of torch to read it as, for the dtypes that requests may use.

Truth values are read as numbers, because torch takes bytes above 1 for them without an error.
"""
SMALLER = "send smaller latents, or raise the server's --max_latent_pixels"
FLOATS = ("F32", "F16", "BF16")  # names of the floating-point dtypes that requests may use


@dataclass(frozen=True)
class Expected:
    """Requirements on a tensor of a request."""

    # Allowed shapes: names of the axes, separated by spaces. Axes of one name have one size in all tensors
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...] = FLOATS  # allowed dtypes, by their names in DTYPES
    required: bool = True  # whether a request must have the tensor
    taken: bool = True  # whether the served model takes the tensor; if not, a request must not have it


@dataclass(frozen=True)
class Accepted:
    """Shapes of latents and embeddings that a server accepts."""

    channels: int  # number of latent channels C
    text_width: int  # width D of a token's embedding
    pooled_width: int | None  # width P of the pooled embedding; None if the model takes none
    patch: int = 1  # number that the sides of latents must be multiples of, in latent pixels
    max_side: int | None = None  # longest side of latents, in latent pixels; None if the network has no limit
    max_prompt: int | None = None  # largest number of tokens of a prompt; None if the network has no limit
    # Number of tokens L if it is fixed, as for heads that compare with the empty prompt; else None
    tokens: int | None = None
    max_pixels: int = 128 * 128  # largest h · w, or T · h · w with a time axis; with sources, of all together
    max_tokens: int = 1024  # largest L
    max_rows: int = ROWS  # largest B
    masked: bool = False  # whether prompts have unequal numbers of tokens, told by a mask
    frames: int | None = None  # number of latent frames T; None if latents have no time axis
    # Whether the pooled vector may be left out, and is the mean of the tokens in the mask then
    pools_tokens: bool = False
    # Least and largest number of pictures that a row's image is an edit of, its sources
    sources: tuple[int, int] = (0, 0)
    sees_sources: bool = False  # whether the text encoder reads these pictures too, as pixels
    sees_empty: bool = False  # whether it also reads them beside the empty prompt, which the head needs

    def check_sources(self, number: int) -> None:
        """Raise RequestError with status 422 if an image with this number of sources is not scored."""
        if wanted := sources_wanted(number, self.sources):
            told = f"takes {wanted}; send so many"
            if wanted == "0":
                told = "judges images made from text alone; leave them out"
            raise RequestError(f"{number} sources are given for an image, but this reward {told}", 422)

    def expected_sources(self, leading: str = "B") -> dict[str, Expected]:
        """Return the requirements on the tensors ``source_0``, ``source_1``, …, whose sides are their own."""
        axes = [self.axes.replace("h w", f"h{place} w{place}") for place in range(MOST_SOURCES)]
        return {
            f"source_{place}": Expected((f"{leading} {names}",), required=False, taken=place < self.sources[1])
            for place, names in enumerate(axes)
        }

    def sources_of_rows(self, tensors: Mapping[str, Tensor], count: int) -> list[tuple[Tensor, ...]]:
        """Return the latents of the sources of each of ``count`` rows, from the tensors of a request.

        Raises:
            RequestError: With status 422 if there are too few, one is left out, or the sides do not fit the network;
                with status 413 over the server's limit of pixels.
        """
        found = [name for name in self.expected_sources() if name in tensors]
        self.check_sources(len(found))
        for place, name in enumerate(found):
            if name != f"source_{place}":
                raise RequestError(f"{name} is given without source_{place}; number sources from 0 on", 422)
            self.check_sides(tensors[name], name)
        total = sum((self.frames or 1) * math.prod(tensors[name].shape[-2:]) for name in ("latents", *found))
        check_limit("latents and sources: h · w", total, self.max_pixels, SMALLER)
        columns = [tensors[name].unbind() for name in found]
        return [*zip(*columns, strict=True)] if columns else [()] * count

    @property
    def axes(self) -> str:
        """Names of the axes of an image's latents."""
        return "C h w" if self.frames is None else "C T h w"

    @property
    def sizes(self) -> dict[str, int | None]:
        """Sizes that the model fixes, by the name of the axis; None for any size."""
        return {"C": self.channels, "T": self.frames, "L": self.tokens, "D": self.text_width, "P": self.pooled_width}

    def check_sides(self, latents: Tensor, tensor: str = "latents") -> None:
        """Check the sides of latents ``(..., C, h, w)`` or ``(..., C, T, h, w)``, the ``tensor`` of a request.

        Raises:
            RequestError: With status 413 over the server's limit of pixels; with status 422 if the network cannot take
                the sides.
        """
        height, width = latents.shape[-2:]
        try:
            check_multiples(tensor, (height, width), self.patch)
        except InputError as error:
            raise RequestError(str(error), 422) from error
        if max(height, width) > (self.max_side or max(height, width)):
            limit = f"{self.max_side}, the limit of this network"
            raise RequestError(f"{tensor} of {height} × {width} have a side over {limit}", 422)
        name = f"{tensor}: h · w" if self.frames is None else f"{tensor}: T · h · w"
        check_limit(name, (self.frames or 1) * height * width, self.max_pixels, SMALLER)


def read_tensors(
    body: bytes, expected: Mapping[str, Expected], sizes: Mapping[str, int | None], most: int = HEADER_BYTES
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors body by name, floats as float32, in the order of ``expected``.

    The library copies all tensors before their names and shapes can be checked. Its memory is bounded by the length of
    the body, which the server limits, and by that of the header: 1 MiB lists 20 000 empty tensors, which take 21 MiB.
    ``sizes`` are sizes of axes by their names, None for any; ``most`` is the greatest length of the header in bytes.

    Raises:
        RequestError: If the body is not in safetensors format, its header is too long, or a tensor is missing, unknown,
            or of a wrong dtype or number of axes. With status 422 if the served model does not take a tensor, the size
            of an axis is not that of the model or of another tensor, or a number is not finite.
    """
    length = int.from_bytes(body[:8], "little")
    if length > most:
        raise RequestError(f"the safetensors header has {length} bytes; at most {most} are read")
    try:
        entries = dict(deserialize(body))
    except SafetensorError as error:
        raise RequestError(f"the body is no safetensors file ({quoted(one_line(error))}); check it") from error
    missing = [name for name, wanted in expected.items() if wanted.required and name not in entries]
    unknown = [name for name in entries if name not in expected]
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"holds an unknown tensor {unknown[0][:40]!r}"
        names = ", ".join(name for name, wanted in expected.items() if wanted.taken)
        raise RequestError(f"the body {problem}; the protocol has {names}")
    known = {axis: size for axis, size in sizes.items() if size is not None}
    return {name: _tensor(name, entries[name], expected[name], known) for name in expected if name in entries}


def _tensor(name: str, entry: dict[str, Any], expected: Expected, sizes: dict[str, int]) -> Tensor:
    """Check the description of a tensor, add the sizes of its axes to ``sizes``, and return the tensor."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not expected.taken:
        raise RequestError(f"{name} is given, but this model takes none; leave it out", 422)
    if dtype not in expected.dtypes:
        raise RequestError(f"{name}: dtype must be {' or '.join(expected.dtypes)}, not {dtype!r}")
    allowed = {len(axes.split()): axes.split() for axes in expected.shapes}
    axes = allowed.get(len(shape), [])
    if not axes or 0 in shape:
        wanted = " or ".join(f"({', '.join(axes)})" for axes in allowed.values())
        raise RequestError(f"{name}: shape must be {wanted}, whole numbers from 1 on, not {str(shape)[:80]}")
    for axis, size in zip(axes, shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            rule = f"{sizes[axis]} in this model or other tensors; give {axis} = {sizes[axis]}"
            raise RequestError(f"{name}: {axis} of ({', '.join(axes)}) is {size}, but {rule}", 422)
    tensor = torch.frombuffer(entry.pop("data"), dtype=DTYPES[dtype]).view(shape)
    if dtype not in FLOATS:
        return tensor
    if not tensor.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinity", 422)
    return tensor.to(torch.float32)


@asynccontextmanager
async def safetensors_body(request: Request, resources: Resources) -> AsyncIterator[bytes]:
    """Read the safetensors body of a request; body and tensors count against the memory until the context ends.

    Raises:
        RequestError: With status 415 if the content type is another one, 413 or 503 if the memory does not suffice, or
            as :meth:`BodyReader.read`.
    """
    check_type(request, SAFETENSORS)
    async with resources.bodies.read(request) as body:
        with resources.memory.hold(memory_bytes(body), len(body)):
            yield body


def memory_bytes(body: bytes) -> int:
    """Return an upper bound on the memory in bytes that the tensors of a body take in addition to it.

    float16 and bfloat16 become float32. JSON may write the name of a dtype with escapes.
    """
    end = min(8 + int.from_bytes(body[:8], "little"), len(body))
    halves = max(body.find(b"F16", 8, end), body.find(b"\\", 8, end)) >= 0
    return (2 if halves else 1) * len(body)


def check_levels(u: Tensor) -> None:
    """Raise RequestError with status 422 if a noise level lies outside [0, 1]."""
    outside = u[(u < 0) | (u > 1)].tolist()
    if outside:
        raise RequestError(f"u holds {outside[0]:g}; noise levels lie in [0, 1]", 422)
