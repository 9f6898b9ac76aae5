"""Bodies of untrusted clients: read within limits, and parsed into rows that a reward takes."""

import asyncio
import base64
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any, TypeVar

import torch
from fastapi import Request
from PIL import Image
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, deserialize
from starlette.requests import ClientDisconnect
from torch import Tensor

from latentreward.apps.serving.batching import RequestError, Row
from latentreward.apps.serving.settings import ServiceSettings
from latentreward.core.contracts import Conditioning, EditPrompt, ImageRef, sources_of, sources_wanted
from latentreward.core.errors import InputError, first_line, one_line, quoted
from latentreward.core.storage.json_files import parse
from latentreward.data import decode_image
from latentreward.data.images import ExifOrientation, decoding_bytes
from latentreward.data.readers.json_rows import MOST_SOURCES
from latentreward.diffusion import NoiseProcess
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import RewardModel
from latentreward.reward.remote.schemas import MOST_CHARACTERS, Header, ImagesRequest
from latentreward.reward.scoring.ensemble import source_ref

JSON, SAFETENSORS = "application/json", "application/octet-stream"
MAX_ROWS = 64  # greatest number of rows of a request of one's own routes, if the queue is not shorter
TENSOR_NAMES, WITH_PROMPTS = 16 * 1024, 2**20  # greatest length in bytes of a safetensors header
QUOTES = 2**14  # in such a header: four for each text in it, and two for each prompt
VALUES, VALUE_BYTES = 2**16, 2048  # greatest number of values in JSON, and what one takes with two errors about it
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS = {"I64": torch.int64, "BOOL": torch.uint8, "U8": torch.uint8}  # a truth value above 1 would be no error
TAKEN = {"u": ("F32",), "seeds": ("I64",), "timesteps": ("F32", "I64"), "prompt_mask": ("BOOL", "U8")}
"""Tensor → names in safetensors of the dtypes that it may have; all others may be any of FLOATS."""

Content = TypeVar("Content", bound=BaseModel)
Images = list[tuple[str, bytes]]  # a prompt and a file each; the prompt of an edit carries its sources
Take = Callable[[int], None]


class ByteBudget:
    """Bytes that all requests hold at present: their bodies, what these become, and pixels."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0

    @asynccontextmanager
    async def body(self, request: Request, settings: ServiceSettings, kind: str) -> AsyncIterator[tuple[bytes, Take]]:
        """Read a body of a content type; also give the function that takes more bytes until the end."""
        mine, body = 0, bytearray()

        def take(size: int) -> None:
            nonlocal mine
            if mine + size > self.total:
                remedy = "send fewer or smaller images or latents, or raise --max_body_mb"
                check_limit("bytes of memory for the request:", mine + size, self.total, remedy)
            if self.held + size > self.total:
                raise RequestError("requests of this size fill the server's memory just now; try later", 503, 1)
            mine, self.held = mine + size, self.held + size

        def check_length(length: int) -> None:
            check_limit("the body: bytes", length, settings.max_body, "send less, or raise --max_body_mb")

        given = request.headers.get("content-type", "").lower().partition(";")[0].strip()
        if given != kind or request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError(f"content-type is {given[:40]!r}; send {kind}, and no content-encoding", 415)
        try:
            async with asyncio.timeout(settings.timeout):
                check_length(int(request.headers.get("content-length", "0")))
                async for chunk in request.stream():
                    check_length(len(body) + len(chunk))
                    take(len(chunk))
                    body += chunk
            # What parsing takes beside the body. A text is decoded to up to 4 bytes for each character, and halves to
            # float32. Values of JSON become objects, and wrong ones records of errors.
            take((1 if kind == SAFETENSORS and b"F16" not in body[: 2**14] else 3 if body.isascii() else 6) * len(body))
            take(VALUE_BYTES * values_in(body) if kind == JSON else 0)
            content = bytes(body)
            body.clear()
            yield content, take
        except ClientDisconnect as error:
            raise RequestError("the connection ended before the body did") from error
        except TimeoutError as error:
            raise RequestError(f"the body took more than {settings.timeout:g} seconds to arrive", 408) from error
        finally:
            self.held -= mine


def check_limit(name: str, found: int, most: int, remedy: str = "send several requests, or raise --queue") -> None:
    """Raise RequestError (413) if ``found`` is over a limit of the server."""
    if found > most:
        raise RequestError(f"{name} {found} is over this server's limit of {most}; {remedy}", 413)


def values_in(body: bytes | bytearray) -> int:
    """Return the greatest number of values that JSON may hold."""
    return sum(map(body.count, (b",", b"[", b"{")))


def parse_json(body: bytes, kind: type[Content]) -> Content:
    """Parse JSON into a pydantic model; raise RequestError that names the first wrong field."""
    check_limit("the body: values", values_in(body), VALUES, "send fewer images at once")
    try:
        parse(body)  # of a key that is given twice, pydantic would take the last value
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:60] or "the body"
        known = ", ".join(field.alias or name for name, field in kind.model_fields.items())
        raise RequestError(f"{where}: {first['msg']}; the JSON object has the fields {known}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {first_line(error)}") from error


def check_prompts(prompts: Sequence[str], rows: str, count: int) -> None:
    """Raise RequestError (422) unless there are ``count`` prompts, none of them too long."""
    if len(prompts) != count:
        raise RequestError(f"{len(prompts)} prompts for {count} {rows}; give one prompt for all, or one each", 422)
    if long := [number for number, prompt in enumerate(prompts) if len(prompt) > MOST_CHARACTERS]:
        raise RequestError(f"prompt {long[0]} has over {MOST_CHARACTERS} characters; shorten it", 422)


# --- latents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accepted:
    """Shapes of latents and embeddings that a reward accepts on a server."""

    channels: int  # number of latent channels C
    text_width: int  # width D of a token's embedding
    pooled_width: int | None  # width P of the pooled embedding; None if the model takes none
    patch: int = 1  # number that the sides of latents must be multiples of, in latent pixels
    max_side: int | None = None  # longest side of latents, in latent pixels; None if the network has no limit
    max_prompt: int = 1024  # largest number of tokens of a prompt
    tokens: int | None = None  # number of tokens L if fixed, as for heads that compare with the empty prompt
    max_latent_pixels: int = 128 * 128  # largest h · w, or T · h · w with a time axis; with sources, of all together
    max_rows: int = MAX_ROWS  # largest B
    queue: int = 256  # most rows of the routes that send whole groups
    masked: bool = False  # whether prompts have unequal numbers of tokens, told by a mask
    frames: int | None = None  # number of latent frames T; None if latents have no time axis
    pools_tokens: bool = False  # whether the pooled vector may be left out: the mean of the tokens in the mask
    sources: tuple[int, int] = (0, 0)  # least and largest number of pictures that a row's image is an edit of
    sees_sources: bool = False  # whether the text encoder reads these pictures too, as pixels
    sees_empty: bool = False  # whether it also reads them beside the empty prompt, which the head needs

    @classmethod
    def of(cls, reward: RewardModel, settings: ServiceSettings) -> "Accepted":
        """Determine what a model takes; the empty prompt is encoded to find the widths of embeddings."""
        backbone, empty, shape = reward.backbone, encode_empty(reward), tried_shape(reward)
        encoder, pooled, masked = backbone.text_encoder, empty.pooled_prompt_embeds, empty.prompt_mask is not None
        clip = 1 if reward.image_sizes is None else reward.image_sizes.frames
        _, *time, _, _ = backbone.latent_space.shape(1, 1, clip)
        seen = encoder is not None and encoder.sees_sources
        return cls(
            channels=backbone.latent_space.channels,
            text_width=empty.prompt_embeds.shape[-1],
            pooled_width=None if pooled is None else pooled.shape[-1],
            patch=backbone.side_multiple // backbone.latent_space.downscale,
            max_side=backbone.max_side,
            max_prompt=backbone.max_prompt or cls.max_prompt,
            tokens=empty.prompt_embeds.shape[1] if reward.head.needs_uncond and not masked else None,
            max_latent_pixels=settings.max_latent_pixels or 4 * math.prod((*time, *shape[-2:])),
            max_rows=min(MAX_ROWS, settings.queue),
            queue=settings.queue,
            masked=masked,
            frames=time[0] if time else None,
            pools_tokens=encoder is not None and encoder.pools_tokens,
            sources=(backbone.sources[0], MOST_SOURCES if backbone.sources[1] is None else backbone.sources[1]),
            sees_sources=seen,
            sees_empty=seen and reward.head.needs_uncond,
        )

    def check_sources(self, number: int) -> None:
        """Raise RequestError (422) if an image with this number of sources is not scored."""
        if wanted := sources_wanted(number, self.sources):
            raise RequestError(f"{number} sources are given for an image, but this reward takes {wanted}", 422)

    def read(self, body: bytes, most: int, spec: str) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
        """Read the tensors of a safetensors body by name, floats as float32, and the sources of each row.

        The library copies all tensors before their names and shapes can be checked. Its memory is bounded by the
        length of the body, and by the number of texts in a header of at most ``most`` bytes.

        ``spec`` lists tensors with their axes, such as ``latents=B C h w, u?=B``; ``?`` marks one that may be left out,
        and ``|`` parts allowed shapes. Axes of one name have one size. C also stands for a time axis after it.
        """
        if self.sees_empty or (self.sees_sources and most == WITH_PROMPTS):
            problem = "the text encoder of this reward reads the pictures that are edited"
            raise RequestError(f"{problem}; send images and source_images to /v1/score_images", 422)
        length = int.from_bytes(body[:8], "little")
        if length > most or body.count(b'"', 8, 8 + length) > QUOTES:
            limits = f"at most {most} are read, and {QUOTES // 4} texts in them"
            raise RequestError(f"the safetensors header has {length} bytes; {limits}")
        try:
            entries = dict(deserialize(body))
        except SafetensorError as error:
            raise RequestError(f"the body is no safetensors file ({quoted(one_line(error))}); check it") from error
        leading = spec.partition("latents=")[2].split()[0]
        sources = [f"source_{place}?={leading} C h{place} w{place}" for place in range(self.sources[1])]
        wanted = dict(one.split("=") for one in (*spec.split(", "), *sources))
        known = {"C": self.channels, "T": self.frames, "L": self.tokens, "D": self.text_width, "P": self.pooled_width}
        sizes, tensors = {axis: size for axis, size in known.items() if size is not None}, {}
        for key, shapes in wanted.items():
            name = key.removesuffix("?")
            if name in entries:
                tensors[name] = self._tensor(name, entries.pop(name), shapes, sizes)
            elif name == key:
                raise RequestError(f"the body lacks {name!r}; the protocol has {', '.join(wanted)}")
        if entries:
            raise RequestError(
                f"this model takes no {next(iter(entries))[:40]!r}; the protocol has {', '.join(wanted)}"
            )
        named, pixels = [name for name in tensors if name.startswith("source_")], 0
        self.check_sources(len(named))
        if named and named[-1] != f"source_{len(named) - 1}":
            raise RequestError(f"{named[-1]} is given without one before it; number sources from 0 on", 422)
        for name in ("latents", *named):
            sides = tensors[name].shape[-2:]
            if any(side % self.patch or side > (self.max_side or side) for side in sides):
                limit = "" if self.max_side is None else f" and at most {self.max_side}, the limit of this network"
                problem = f"{name} of {sides[0]} × {sides[1]}: give sides that are multiples of {self.patch}{limit}"
                raise RequestError(problem, 422)
            pixels += (self.frames or 1) * math.prod(sides)
        remedy = "send smaller ones, or raise --max_latent_pixels"
        check_limit(f"{', '.join(('latents', *named))}: latent pixels", pixels, self.max_latent_pixels, remedy)
        rows = [*zip(*(tensors[name].unbind() for name in named), strict=True)]
        return tensors, rows or [()] * len(tensors["latents"])

    def _tensor(self, name: str, entry: dict[str, Any], shapes: str, sizes: dict[str, int]) -> Tensor:
        """Check the description of a tensor, add the sizes of its axes to ``sizes``, and return the tensor."""
        dtype, shape, dtypes = entry["dtype"], tuple(entry["shape"]), TAKEN.get(name, tuple(FLOATS))
        allowed = [axes.replace("C", "C" if self.frames is None else "C T").split() for axes in shapes.split("|")]
        axes = next((axes for axes in allowed if len(axes) == len(shape)), [])
        wrong = [axis for axis, size in zip(axes, shape, strict=False) if sizes.setdefault(axis, size) != size]
        if dtype not in dtypes or not axes or wrong or 0 in shape:
            forms = " or ".join(f"({', '.join(axes)})" for axes in allowed)
            known = "".join(f", with {axis} = {sizes[axis]}" for axis in wrong)
            found = f"{dtype} of shape {str(shape)[:80]}"
            raise RequestError(f"{name}: give {' or '.join(dtypes)} of shape {forms}{known}, not {found}", 422)
        tensor = torch.frombuffer(entry["data"], dtype=(FLOATS | NUMBERS)[dtype]).view(shape)
        if not tensor.isfinite().all() or (name == "u" and not 0 <= tensor.min() <= tensor.max() <= 1):
            rule = "; noise levels lie in [0, 1]" if name == "u" else ""
            raise RequestError(f"{name} holds NaN, infinity or a number that is out of range{rule}", 422)
        return tensor.to(torch.float32) if dtype in FLOATS else tensor


def encode_empty(reward: RewardModel) -> Conditioning:
    """Encode the empty prompt, and a grey picture to edit for a model that needs one."""
    scale = reward.backbone.latent_space.downscale
    reward.prompt_memory(1).resize_sources(*(side * scale for side in tried_shape(reward)[-2:]))
    return reward.backbone.encode_prompts([edit_of_grey() if reward.backbone.sources[0] else ""])


def tried_shape(reward: RewardModel) -> tuple[int, ...]:
    """Return the shape ``(C, [T,] h, w)`` of latents at which a model is tried: of training, or the native one."""
    space = reward.backbone.latent_space
    shape = space.shape(*(reward.backbone.native_size or (8 * space.downscale, 8 * space.downscale)))
    if reward.image_sizes is None:
        return shape
    loader = reward.image_sizes.loader(*(side * space.downscale for side in shape[-2:]))
    return space.shape(loader.height, loader.width)


def parse_request(body: bytes, accepted: Accepted) -> list[Row]:
    """Parse a body of verl-omni's protocol into rows; the default seed is 0."""
    spec = ["latents=B C h w", "prompt_embeds=B L D", "u=B", "seeds?=B"]
    if accepted.pooled_width is not None:
        spec += [f"pooled_prompt_embeds{'?' * accepted.pools_tokens}=B P"]
    if accepted.masked or accepted.pools_tokens:
        spec += [f"prompt_mask{'' if accepted.masked else '?'}=B L"]
    tensors, sources = accepted.read(body, TENSOR_NAMES, ", ".join(spec))
    embeds, mask, pooled = (tensors.get(name) for name in ("prompt_embeds", "prompt_mask", "pooled_prompt_embeds"))
    count, longest = len(embeds), embeds.shape[1]
    check_limit("latents: rows", count, accepted.max_rows)
    if mask is not None:
        # A network sees the first tokens of each row; those that only make a mean may lie anywhere.
        ordered = not accepted.masked or mask.equal(mask.cummin(dim=1).values)
        if mask.max() > 1 or not mask.any(dim=1).all() or not ordered:
            first = " and none after a 0" * accepted.masked
            raise RequestError(f"prompt_mask must hold 0 and 1, with a 1 in each row{first}", 422)
        mask, longest = mask.bool(), int(mask.sum(dim=1).max()) if accepted.masked else longest
    if pooled is None and accepted.pools_tokens:
        if mask is None:
            raise RequestError("pooled_prompt_embeds and prompt_mask are missing; give one of them")
        pooled = Conditioning(embeds, prompt_mask=mask).pooled()
    if longest > accepted.max_prompt:
        limit = f"{accepted.max_prompt}, the limit of this network"
        raise RequestError(f"prompt_embeds: a prompt of {longest} tokens is over {limit}", 422)
    used = tensors["seeds"].tolist() if "seeds" in tensors else [0] * count
    given = (embeds, pooled, mask if accepted.masked else None)
    parts = zip(*([None] * count if one is None else one.split(1) for one in given), strict=True)
    rows = zip(tensors["latents"], tensors["u"].tolist(), used, parts, sources, strict=True)
    return [
        Row("", latents=state, u=level, seed=seed, encoded=Conditioning(*part).trimmed(), sources=own)
        for state, level, seed, part, own in rows
    ]


def parse_latents(body: bytes, accepted: Accepted) -> list[Row]:
    """Parse a body of ``/v1/score_latents`` into rows; see :func:`parse_request`."""
    tensors, sources = accepted.read(body, WITH_PROMPTS, "latents=B C h w, u?=B, seeds?=B")
    latents, u, count = tensors["latents"], tensors.get("u"), len(tensors["latents"])
    check_limit("latents: rows", count, accepted.max_rows)
    if u is None and "seeds" in tensors:
        raise RequestError("seeds are given without u; give the noise level u too, or neither", 422)
    levels = [None] * count if u is None else u.tolist()
    used = tensors["seeds"].tolist() if "seeds" in tensors else [0] * count
    rows = zip(read_prompts(body, count), latents, levels, used, sources, strict=True)
    return [Row(text, latents=state, u=level, seed=seed, sources=own) for text, state, level, seed, own in rows]


def parse_states(body: bytes, accepted: Accepted, process: NoiseProcess) -> tuple[list[Row], int]:
    """Parse a body of ``/v1/score_states`` into N · S rows, trajectory by trajectory; return S too."""
    tensors, sources = accepted.read(body, WITH_PROMPTS, "latents=N S C h w, timesteps=S|N S")
    latents, timesteps = tensors["latents"], tensors["timesteps"].to(torch.float32)
    count, steps = latents.shape[:2]
    check_limit("latents: N · S", count * steps, accepted.queue)
    try:
        process.sigma(timesteps.flatten())
    except InputError as error:
        raise RequestError(f"timesteps: {error}", 422) from error
    given = zip(read_prompts(body, count), sources, latents, timesteps.expand(count, steps).tolist(), strict=True)
    rows = [
        Row(prompt, latents=state, timestep=time, sources=own)
        for prompt, own, states, times in given
        for state, time in zip(states, times, strict=True)
    ]
    return rows, steps


def read_prompts(body: bytes, count: int) -> list[str]:
    """Read the prompts of ``count`` rows from the ``__metadata__`` of a safetensors body."""
    texts = parse_json(body[8 : 8 + int.from_bytes(body[:8], "little")], Header).texts
    prompts = texts.prompts if texts.prompt is None else [texts.prompt] * count
    if prompts is None or None not in (texts.prompt, texts.prompts):
        raise RequestError("give __metadata__ one of prompt, a text for all rows, and prompts, a JSON list of texts")
    check_prompts(prompts, "rows of latents", count)
    return prompts


# --- images --------------------------------------------------------------------------------------------------------


def images_of_json(body: bytes) -> Images:
    """Parse images from the JSON of :class:`ImagesRequest`; raise RequestError if it is none."""
    given = parse_json(body, ImagesRequest)
    for name in ("prompt", "image"):
        if (getattr(given, name) is None) == (getattr(given, f"{name}s") is None):
            raise RequestError(f"give either {name} or {name}s")
    images = [given.image] if given.images is None else given.images
    prompts = [given.prompt] * len(images) if given.prompts is None else given.prompts
    sources: Sequence[Any] = given.source_images or []
    return images_of(prompts, images, [sources] * len(prompts) if sources and isinstance(sources[0], str) else sources)


def images_of(prompts: Sequence[str], images: Sequence[str], sources: Sequence[Sequence[str]] = ()) -> Images:
    """Decode images from base64, and put them together with prompts, and those of edits with their sources."""
    if not images or (sources and len(sources) != len(prompts)):
        raise RequestError(f"{len(images)} images and {len(sources)} lists of sources; give at least one, each", 422)
    check_prompts(prompts, "images", len(images))

    @cache  # one source may be that of all images
    def file(text: str, place: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise RequestError(f"{place} is no base64") from error

    refs = [[source_ref(file(one, "a source image"), place) for place, one in enumerate(row)] for row in sources]
    texts = zip(prompts, refs or [[]] * len(prompts), strict=True)
    named = [EditPrompt(text, row) if row else text for text, row in texts]
    return [(text, file(images[number], f"image {number}")) for number, text in enumerate(named)]


def pictures_of(images: Images) -> dict[int | str, ImageRef]:
    """Return the images by their numbers, and the pictures that they are edits of by their keys; each has a name."""
    found: dict[int | str, ImageRef] = {}
    for number, (prompt, data) in enumerate(images):
        found[number] = ImageRef(str(number), data=data)
        for place, source in enumerate(sources_of(prompt)):
            found.setdefault(source.image_key, ImageRef(f"source {place} of image {number}", data=source.data))
    return found


def pixel_bytes(images: Images, max_pixels: int) -> int:
    """Estimate the memory in bytes that decoding takes, from the files' headers; equal sources count once."""
    sizes = [decoding_bytes(ref, max_pixels) for ref in pictures_of(images).values()]
    return sum(decoded for decoded, _ in sizes) + max(extra for _, extra in sizes)


def decode(images: Images, exif: ExifOrientation, settings: ServiceSettings) -> list[Row]:
    """Decode images into rows, turned upright by their EXIF orientation if ``exif`` is ``apply``.

    Pictures that they are edits of become bitmaps, which the model reads again in no time. TimeoutError is raised after
    the timeout; no further image is decoded then.
    """
    until, decoded, bitmaps = time.monotonic() + settings.timeout, dict[int | str, Image.Image](), {}
    for key, ref in pictures_of(images).items():
        if time.monotonic() > until:
            raise TimeoutError
        picture = decode_image(ref, settings.max_pixels, exif)
        if isinstance(key, int):
            decoded[key] = picture
        else:
            picture.save(bitmap := BytesIO(), "bmp")
            bitmaps[key] = ImageRef(key, data=bitmap.getvalue(), max_pixels=settings.max_pixels)
    rows = []
    for number, (prompt, _) in enumerate(images):
        own = [bitmaps[source.image_key] for source in sources_of(prompt)]
        rows.append(Row(EditPrompt(prompt, own) if own else prompt, image=decoded[number]))
    return rows
