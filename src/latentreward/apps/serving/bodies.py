"""Bodies of untrusted clients: read within limits, and parsed into rows that a reward takes."""

import asyncio
import base64
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, repeat
from typing import Any, TypeVar

import torch
from fastapi import Request
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, deserialize
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from torch import Tensor

from latentreward.apps.serving.batching import RequestError, Row
from latentreward.apps.serving.settings import ServiceSettings
from latentreward.core.contracts import Conditioning, EditPrompt, ImageRef, sources_of, sources_wanted
from latentreward.core.errors import InputError, check_multiples, first_line, one_line, quoted
from latentreward.core.storage.json_files import parse
from latentreward.data import ImageError, decode_image
from latentreward.data.images import TOO_LARGE, ExifOrientation, decoding_bytes
from latentreward.data.readers.json_rows import MOST_SOURCES
from latentreward.diffusion import NoiseProcess
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import RewardModel
from latentreward.reward.remote.schemas import MOST_CHARACTERS, Header, ImagesRequest
from latentreward.reward.scoring.ensemble import source_ref

JSON, FORM, SAFETENSORS = "application/json", "multipart/form-data", "application/octet-stream"
ROWS = 64  # greatest number of rows of a request of one's own routes, if the queue is not shorter
TENSOR_NAMES, WITH_PROMPTS = 16 * 1024, 2**20  # greatest length in bytes of a safetensors header
VALUES, VALUE_BYTES = 2**16, 2048  # greatest number of values in JSON, and what one takes with two errors about it
FLOATS = ("F32", "F16", "BF16")
NUMBERS = {"I64": torch.int64, "BOOL": torch.uint8, "U8": torch.uint8}  # a truth value above 1 would be no error
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, **NUMBERS}
"""Name of a dtype in safetensors → dtype of torch to read it as, for the dtypes that requests may use."""
TAKEN = {"u": ("F32",), "seeds": ("I64",), "timesteps": ("F32", "I64"), "prompt_mask": ("BOOL", "U8")}
"""Tensor → dtypes that it may have; all others are FLOATS."""
SMALLER = "send smaller latents, or raise the server's --max_latent_pixels"

Content = TypeVar("Content", bound=BaseModel)
Images = tuple[Sequence[str], Sequence[bytes]]  # a prompt for each file; that of an edit carries its sources
Take = Callable[[int], None]


class Memory:
    """Bytes that all requests hold at present: their bodies, what these become, and pixels."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0

    @asynccontextmanager
    async def body(self, request: Request, settings: ServiceSettings, *types: str) -> AsyncIterator[tuple[bytes, Take]]:
        """Read a body of one of these content types; also give the function that takes more bytes until the end.

        Raises:
            RequestError: With status 415 for another type, 413 if the body is too long or needs more memory than there
                is, 408 if it arrives too slowly, 503 if others hold the memory, 400 if the connection ends.
        """
        mine, length, chunks = 0, 0, list[bytes]()

        def take(size: int) -> None:
            nonlocal mine
            if mine + size > self.total:
                needed = f"the request needs {mine + size} bytes of memory, and this server has {self.total}"
                raise RequestError(f"{needed}; send fewer or smaller images or latents, or raise --max_body_mb", 413)
            if self.held + size > self.total:
                raise RequestError("requests of this size fill the server's memory just now; try later", 503, 1)
            mine, self.held = mine + size, self.held + size

        def check_length(length: int) -> None:
            check_limit("the body: bytes", length, settings.max_body, "send less, or raise --max_body_mb")

        kind, packed = (request.headers.get(f"content-{name}", "").lower() for name in ("type", "encoding"))
        if (kind := kind.partition(";")[0].strip()) not in types:
            raise RequestError(f"content-type is {kind[:40]!r}; send {' or '.join(types)}", 415)
        if packed not in ("", "identity"):
            raise RequestError(f"content-encoding is {packed[:40]!r}; send the body uncompressed", 415)
        check_length(int(request.headers.get("content-length", "0")))
        try:
            try:
                async with asyncio.timeout(settings.timeout):
                    async for chunk in request.stream():
                        check_length(length := length + len(chunk))
                        take(len(chunk))
                        chunks.append(chunk)
            except TimeoutError as error:
                raise RequestError(f"the body took more than {settings.timeout:g} seconds to arrive", 408) from error
            except ClientDisconnect as error:
                raise RequestError("the connection ended before the body did") from error
            body = b"".join(chunks)
            chunks.clear()
            # What parsing takes beside the body. A text is decoded to up to 4 bytes for each character, halves to
            # float32, and a form is copied. Values of JSON become objects, and wrong ones records of errors.
            take((1 if kind == SAFETENSORS and b"F16" not in body[: 2**14] else 3 if body.isascii() else 6) * length)
            take(VALUE_BYTES * values_in(body) if kind == JSON else 0)
            yield body, take
        finally:
            self.held -= mine


def check_limit(name: str, found: int, most: int, remedy: str = "") -> None:
    """Raise RequestError (413) if ``found`` is over a limit of the server."""
    if found > most:
        remedy = remedy or f"send several requests{'' if most == ROWS else ', or raise the server’s --queue'}"
        raise RequestError(f"{name} {found} is over this server's limit of {most}; {remedy}", 413)


def values_in(body: bytes) -> int:
    """Return the greatest number of values that JSON may hold."""
    return sum(map(body.count, (b",", b"[", b"{")))


def parse_json(body: bytes, kind: type[Content]) -> Content:
    """Parse JSON into a pydantic model; raise RequestError that names the first wrong field."""
    check_limit("the body: values", values_in(body), VALUES, "send fewer images at once")
    try:
        parse(body)  # of a key that is given twice, pydantic would take the last value
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {first_line(error)}") from error
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:60] or "the body"
        known = ", ".join(field.alias or name for name, field in kind.model_fields.items())
        raise RequestError(f"{where}: {first['msg']}; the JSON object has the fields {known}") from error


def check_prompts(prompts: Sequence[str], rows: str, count: int) -> None:
    """Raise RequestError (422) unless there are ``count`` prompts, none of them too long."""
    if len(prompts) != count:
        raise RequestError(f"{len(prompts)} prompts for {count} {rows}; give one prompt for all, or one each", 422)
    for number, prompt in enumerate(prompts):
        if len(prompt) > MOST_CHARACTERS:
            problem = f"prompt {number} has {len(prompt)} characters"
            raise RequestError(f"{problem}; at most {MOST_CHARACTERS} are taken", 422)


# --- latents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accepted:
    """Shapes of latents and embeddings that a reward accepts on a server."""

    channels: int  # number of latent channels C
    text_width: int  # width D of a token's embedding
    pooled_width: int | None  # width P of the pooled embedding; None if the model takes none
    patch: int = 1  # number that the sides of latents must be multiples of, in latent pixels
    max_side: int | None = None  # longest side of latents, in latent pixels; None if the network has no limit
    max_prompt: int | None = None  # largest number of tokens of a prompt; None if the network has no limit
    tokens: int | None = None  # number of tokens L if fixed, as for heads that compare with the empty prompt
    max_pixels: int = 128 * 128  # largest h · w, or T · h · w with a time axis; with sources, of all together
    max_tokens: int = 1024  # largest L
    max_rows: int = ROWS  # largest B
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
            max_prompt=backbone.max_prompt,
            tokens=empty.prompt_embeds.shape[1] if reward.head.needs_uncond and not masked else None,
            max_pixels=settings.max_latent_pixels or 4 * math.prod((*time, *shape[-2:])),
            max_rows=min(ROWS, settings.queue),
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
            told = f"takes {wanted}; send so many"
            told = "judges images made from text alone; leave them out" if wanted == "0" else told
            raise RequestError(f"{number} sources are given for an image, but this reward {told}", 422)

    def check_sides(self, tensors: Mapping[str, Tensor]) -> None:
        """Check sides of latents and sources ``(..., C, [T,] h, w)``; RequestError (422, or 413 over the limit)."""
        total = 0
        for name, latents in tensors.items():
            height, width = latents.shape[-2:]
            try:
                check_multiples(name, (height, width), self.patch)
            except InputError as error:
                raise RequestError(str(error), 422) from error
            if max(height, width) > (self.max_side or math.inf):
                limit = f"{self.max_side}, the limit of this network"
                raise RequestError(f"{name} of {height} × {width} have a side over {limit}", 422)
            total += (self.frames or 1) * height * width
        axes = "h · w" if self.frames is None else "T · h · w"
        check_limit(f"{' and '.join([*tensors][:2])}: {axes}", total, self.max_pixels, SMALLER)

    def read(self, body: bytes, most: int, spec: str) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
        """Read the tensors of a safetensors body by name, floats as float32, and the sources of each row.

        The library copies all tensors before their names and shapes can be checked. Its memory is bounded by the
        lengths of the body and of the header: 1 MiB lists 20 000 empty tensors, which take 21 MiB.

        Args:
            body: The file.
            most: Greatest length of its header.
            spec: Tensors with their axes, such as ``latents=B C h w, u?=B``; ``?`` marks one that may be left out, and
                ``|`` parts allowed shapes. Axes of one name have one size. C also stands for a time axis after it.
        """
        if self.sees_sources and most == WITH_PROMPTS:
            problem = "the text encoder of this reward reads the pictures that are edited, and latents are none"
            raise RequestError(f"{problem}; send images to /v1/score_images, or encoded prompts to /v1/score", 422)
        if (length := int.from_bytes(body[:8], "little")) > most:
            raise RequestError(f"the safetensors header has {length} bytes; at most {most} are read")
        try:
            entries = dict(deserialize(body))
        except SafetensorError as error:
            raise RequestError(f"the body is no safetensors file ({quoted(one_line(error))}); check it") from error
        given = dict(one.split("=") for one in spec.split(", "))
        leading = spec.partition("latents=")[2].split()[0]
        given |= {f"source_{place}?": f"{leading} C h{place} w{place}" for place in range(self.sources[1])}
        wanted = {name.removesuffix("?"): axes for name, axes in given.items()}
        missing = [name for name in given if name not in entries and not name.endswith("?")]
        unknown = [name for name in entries if name not in wanted]
        if missing or unknown:
            problem = (
                f"lacks {missing[0]!r}" if missing else f"holds {unknown[0][:40]!r}, which this model does not take"
            )
            raise RequestError(f"the body {problem}; the protocol has {', '.join(wanted)}")
        sizes = {"C": self.channels, "T": self.frames, "L": self.tokens, "D": self.text_width, "P": self.pooled_width}
        known = {axis: size for axis, size in sizes.items() if size is not None}
        tensors = {name: self._tensor(name, entries[name], wanted[name], known) for name in wanted if name in entries}
        sources = [name for name in tensors if name.startswith("source_")]
        self.check_sources(len(sources))
        if sources and sources[-1] != f"source_{len(sources) - 1}":
            raise RequestError(f"{sources[-1]} is given without one before it; number sources from 0 on", 422)
        self.check_sides({name: tensors[name] for name in ("latents", *sources)})
        rows = [*zip(*(tensors[name].unbind() for name in sources), strict=True)]
        return tensors, rows or [()] * len(tensors["latents"])

    def _tensor(self, name: str, entry: dict[str, Any], shapes: str, sizes: dict[str, int]) -> Tensor:
        """Check the description of a tensor, add the sizes of its axes to ``sizes``, and return the tensor."""
        dtype, shape, dtypes = entry["dtype"], tuple(entry["shape"]), TAKEN.get(name, FLOATS)
        if dtype not in dtypes:
            raise RequestError(f"{name}: dtype must be {' or '.join(dtypes)}, not {dtype!r}")
        allowed = [axes.replace("C", "C" if self.frames is None else "C T").split() for axes in shapes.split("|")]
        axes = next((axes for axes in allowed if len(axes) == len(shape)), [])
        if not axes or 0 in shape:
            wanted = " or ".join(f"({', '.join(axes)})" for axes in allowed)
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
        if name == "u" and (outside := tensor[(tensor < 0) | (tensor > 1)].tolist()):
            raise RequestError(f"u holds {outside[0]:g}; noise levels lie in [0, 1]", 422)
        return tensor.to(torch.float32)


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


def parse_request(body: bytes, accepted: Accepted, prompt: str = "", seeds: Iterable[int] = repeat(0)) -> list[Row]:
    """Parse a body of verl-omni's protocol into rows, whose noise is drawn for ``prompt``.

    Requests without the tensor ``seeds`` take a seed per row from ``seeds``.
    """
    if accepted.sees_empty:
        problem = "this reward's head needs the empty prompt as its text encoder reads it beside the pictures to edit"
        raise RequestError(f"{problem}; send images and source_images to /v1/score_images", 422)
    spec = ["latents=B C h w", "prompt_embeds=B L D"]
    if accepted.pooled_width is not None:
        spec += [f"pooled_prompt_embeds{'?' * accepted.pools_tokens}=B P"]
    if accepted.masked or accepted.pools_tokens:
        spec += [f"prompt_mask{'' if accepted.masked else '?'}=B L"]
    tensors, sources = accepted.read(body, TENSOR_NAMES, ", ".join([*spec, "u=B", "seeds?=B"]))
    latents, embeds, u = tensors["latents"], tensors["prompt_embeds"], tensors["u"]
    count, tokens, _ = embeds.shape
    check_limit("prompt_embeds: tokens", tokens, accepted.max_tokens, "shorten the prompts")
    check_limit("latents: rows", count, accepted.max_rows)
    mask, vectors = tensors.get("prompt_mask"), tensors.get("pooled_prompt_embeds")
    if mask is not None:
        if mask.max() > 1 or not mask.any(dim=1).all():
            raise RequestError("prompt_mask must hold 0 and 1, with a 1 in each row", 422)
        mask = mask.bool()
        if accepted.masked and ((mask[:, 1:] & ~mask[:, :-1]).any() or not mask[:, 0].all()):
            rule = "must begin with a 1 and hold no 1 after a 0; put the tokens of the prompt first"
            raise RequestError(f"prompt_mask: a row {rule}", 422)
    if vectors is None and accepted.pools_tokens:
        if mask is None:
            raise RequestError("pooled_prompt_embeds and prompt_mask are missing; give one of them")
        vectors = Conditioning(embeds, prompt_mask=mask).pooled()
    mask = mask if accepted.masked else None
    longest = tokens if mask is None else int(mask.sum(dim=1).max())
    if longest > (accepted.max_prompt or longest):
        limit = f"{accepted.max_prompt}, the limit of this network"
        raise RequestError(f"prompt_embeds: a prompt of {longest} tokens is over {limit}", 422)
    used = tensors["seeds"].tolist() if "seeds" in tensors else islice(seeds, count)
    parts = [[None] * count if one is None else one.split(1) for one in (embeds, vectors, mask)]
    rows = zip(latents, u.tolist(), used, zip(*parts, strict=True), sources, strict=True)
    return [
        Row(prompt, latents=state, u=level, seed=seed, encoded=Conditioning(*part).trimmed(), sources=own)
        for state, level, seed, part, own in rows
    ]


def parse_latents(body: bytes, accepted: Accepted, seeds: Iterable[int] = repeat(0)) -> list[Row]:
    """Parse a body of ``/v1/score_latents`` into rows; see :func:`parse_request`."""
    tensors, sources = accepted.read(body, WITH_PROMPTS, "latents=B C h w, u?=B, seeds?=B")
    latents, u, count = tensors["latents"], tensors.get("u"), len(tensors["latents"])
    check_limit("latents: rows", count, accepted.max_rows)
    prompts = read_prompts(body, count)
    if u is None and "seeds" in tensors:
        raise RequestError("seeds are given without u; give the noise level u too, or neither", 422)
    levels = [None] * count if u is None else u.tolist()
    used = tensors["seeds"].tolist() if "seeds" in tensors else [0] * count if u is None else islice(seeds, count)
    rows = zip(prompts, latents, levels, used, sources, strict=True)
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
    given = [*zip(read_prompts(body, count), sources, strict=True)]
    states = zip(latents.flatten(0, 1), timesteps.expand(count, steps).flatten().tolist(), strict=True)
    return [
        Row(given[number // steps][0], latents=state, timestep=time, sources=given[number // steps][1])
        for number, (state, time) in enumerate(states)
    ], steps


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
    if sources and isinstance(sources[0], str):
        sources = [sources] * len(prompts)
    return encoded_images(prompts, images, sources)


def encoded_images(prompts: Sequence[str], images: Sequence[Any], sources: Sequence[Sequence[Any]] = ()) -> Images:
    """Put files, or their base64, together with prompts, and those of edits with their sources."""
    if not images:
        raise RequestError("the request holds no image; give at least one", 422)
    check_prompts(prompts, "images", len(images))
    if sources and len(sources) != len(prompts):
        raise RequestError(f"{len(sources)} lists of sources for {len(prompts)} prompts; give one each", 422)

    def data(place: str, one: Any) -> bytes:
        try:
            return one if isinstance(one, bytes) else base64.b64decode(one, validate=True)
        except ValueError as error:
            raise RequestError(f"{place} is no base64") from error

    refs = {
        id(row): [source_ref(data("a source image", one), place) for place, one in enumerate(row)] for row in sources
    }
    rows = zip(prompts, sources or [()] * len(prompts), strict=True)
    texts = [EditPrompt(text, refs[id(row)]) if row else text for text, row in rows]
    return texts, [data(f"image {number}", one) for number, one in enumerate(images)]


async def images_of_form(request: Request, body: bytes, accepted: Accepted) -> Images:
    """Parse images from a form with files ``image``, and a text ``prompt`` for all or for each, in order.

    Files ``source`` are pictures that all images are edits of. Texts must be UTF-8: Python's other codecs may take
    minutes.
    """
    if "charset=" in (kind := request.headers.get("content-type", "").lower()) and "utf-8" not in kind:
        raise RequestError("the form's charset is another one than utf-8; send that", 415)

    async def stream() -> AsyncIterator[bytes]:
        yield body

    most = {"max_files": accepted.max_rows + accepted.sources[1], "max_fields": accepted.max_rows}
    try:
        form = await MultiPartParser(request.headers, stream(), **most).parse()
    except MultiPartException as error:
        status = 413 if error.message.startswith("Too many") else 400
        raise RequestError(f"the form cannot be read: {error.message}", status) from error
    try:
        names = {*form} - {"source"}
        if names != {"prompt", "image"}:
            told = "give the text prompt and the file image, which may stand several times, and for edits files source"
            raise RequestError(f"the form has the fields {', '.join(sorted(form))[:100] or 'none'}; {told}")
        files = {
            name: [await file.read() for file in form.getlist(name) if isinstance(file, UploadFile)]
            for name in ("image", "source")
        }
        prompts = [text for text in form.getlist("prompt") if isinstance(text, str)]
    finally:
        await form.close()
    prompts = prompts * len(files["image"]) if len(prompts) == 1 else prompts
    return encoded_images(prompts, files["image"], [files["source"]] * len(prompts) if files["source"] else ())


def pixel_bytes(images: Images, max_pixels: int) -> int:
    """Estimate the memory in bytes that decoding takes, from the files' headers; equal sources count once."""
    with image_errors():
        sizes = [decoding_bytes(ref, max_pixels) for ref in (*refs_of(images), *sources_by_key(images).values())]
    return sum(decoded for decoded, _ in sizes) + max(extra for _, extra in sizes)


def decode(images: Images, exif: ExifOrientation, settings: ServiceSettings) -> list[Row]:
    """Decode images into rows, turned upright by their EXIF orientation if ``exif`` is ``apply``.

    Pictures that they are edits of become bitmaps, which the model reads again in no time; equal ones are decoded once.

    Raises:
        TimeoutError: If that takes longer than the timeout; no further image is decoded then.
    """
    until = time.monotonic() + settings.timeout

    def decoded(ref: ImageRef) -> Any:
        if time.monotonic() > until:
            raise TimeoutError
        return decode_image(ref, settings.max_pixels, exif)

    with image_errors():
        bitmaps = {}
        for key, ref in sources_by_key(images).items():
            bitmap = BytesIO()
            decoded(ref).save(bitmap, "bmp")
            bitmaps[key] = ImageRef(key, data=bitmap.getvalue(), max_pixels=settings.max_pixels)
        rows = []
        for prompt, ref in zip(images[0], refs_of(images), strict=True):
            own = [bitmaps[source.image_key] for source in sources_of(prompt)]
            rows.append(Row(EditPrompt(prompt, own) if own else prompt, image=decoded(ref)))
    return rows


def refs_of(images: Images) -> list[ImageRef]:
    """Return references to the images, with names for messages."""
    return [ImageRef(str(number), data=data) for number, data in enumerate(images[1])]


def sources_by_key(images: Images) -> dict[str, ImageRef]:
    """Return the pictures that images are edits of by their keys, with names for messages."""
    found: dict[str, ImageRef] = {}
    for number, prompt in enumerate(images[0]):
        for place, source in enumerate(sources_of(prompt)):
            found.setdefault(source.image_key, ImageRef(f"source {place} of image {number}", data=source.data))
    return found


@contextmanager
def image_errors() -> Iterator[None]:
    """Answer errors about images with status 422."""
    try:
        yield
    except ImageError as error:
        remedy = "; resize it before sending, or raise the server's --max_pixels" if error.problem == TOO_LARGE else ""
        raise RequestError(f"{error}{remedy}", 422) from error
