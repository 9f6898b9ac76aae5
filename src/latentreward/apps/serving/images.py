"""Images of requests: reading, decoding within the server's memory, scores, and the route ``POST /v1/score_images``."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from latentreward.apps.serving.batch_scorer import ImageRow, standing
from latentreward.apps.serving.bodies import FORM, JSON, check_type
from latentreward.apps.serving.dialects.base import Dialect
from latentreward.apps.serving.json_bodies import PROMPT_LENGTH, from_base64, read_json
from latentreward.apps.serving.refusals import RequestError, ScoringError, check_limit, fewer_rows
from latentreward.apps.serving.resources import Resources
from latentreward.apps.serving.routes import Route, fields
from latentreward.apps.serving.served import Scores, ServedModel
from latentreward.core.contracts import EditPrompt, ImageRef, sources_of
from latentreward.data import ImageError, decode_image
from latentreward.data.images import TOO_LARGE, ExifOrientation, decoding_bytes
from latentreward.reward.scoring.ensemble import source_ref

EXAMPLE = '{"prompt": TEXT or "prompts": [TEXT, ...], "images": [BASE64, ...]}'  # JSON of a request, for messages
EDIT_EXAMPLE = f'{EXAMPLE[:-1]}, "source_images": [BASE64, ...] or a list of these for each image}}'


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a request, with a prompt each; an image that is an edit has an EditPrompt.

    Raises:
        RequestError: If there is no image, the numbers of prompts and images differ, or a prompt is too long.
    """

    prompts: Sequence[str]  # one prompt per image
    images: Sequence[bytes]  # bytes of image files, such as PNG or JPEG

    def __post_init__(self) -> None:
        if not self.images:
            raise RequestError("the request holds no image; give at least one", 422)
        if len(self.prompts) != len(self.images):
            raise RequestError(
                f"{len(self.prompts)} prompts for {len(self.images)} images; give one prompt for all, or one each", 422
            )
        longest = max(map(len, self.prompts))
        if longest > PROMPT_LENGTH:
            raise RequestError(f"a prompt has {longest} characters; at most {PROMPT_LENGTH} are taken", 422)

    def memory_bytes(self, max_pixels: int) -> int:
        """Estimate the memory in bytes that the images take until they are scored.

        The sum of the encoded images, the decoded images, and the extra memory of decoding the most demanding one.
        Pictures that images are edits of count once, however many images there are.

        Raises:
            RequestError: If a file is not an image, or has more than ``max_pixels`` pixels.
        """
        try:
            refs = [*self._refs(), *self._sources().values()]
            decoded, extra = zip(*(decoding_bytes(ref, max_pixels) for ref in refs), strict=True)
        except ImageError as error:
            remedy = "; resize it before sending, or raise the server's --max_pixels"
            raise RequestError(f"{error}{remedy if error.problem == TOO_LARGE else ''}", 422) from error
        return sum(len(ref.data or b"") for ref in refs) + sum(decoded) + max(extra)

    def decode(self, exif: ExifOrientation, max_pixels: int, until: float) -> list[ImageRow]:
        """Decode the images into rows to score, turned upright by their EXIF orientation if ``exif`` is ``apply``.

        Pictures that they are edits of become bitmaps, which the model reads again in no time. No further image is
        decoded after the time ``until`` of the monotonic clock.

        Raises:
            RequestError: If an image is damaged.
            TimeoutError: If there is no time left.
        """

        def decoded(ref: ImageRef) -> Image.Image:
            if time.monotonic() > until:
                raise TimeoutError
            try:
                return decode_image(ref, max_pixels, exif)
            except ImageError as error:
                raise RequestError(str(error), 422) from error

        sources = {}
        for key, ref in self._sources().items():
            bitmap = BytesIO()
            decoded(ref).save(bitmap, "bmp")
            sources[key] = ImageRef(key, data=bitmap.getvalue(), max_pixels=max_pixels)
        rows = []
        for prompt, ref in zip(self.prompts, self._refs(), strict=True):
            bitmaps = [sources[source.image_key] for source in sources_of(prompt)]
            rows.append(ImageRow(EditPrompt(prompt, bitmaps) if bitmaps else prompt, decoded(ref)))
        return rows

    def _refs(self) -> list[ImageRef]:
        return [ImageRef(str(number), data=data) for number, data in enumerate(self.images)]

    def _sources(self) -> dict[str, ImageRef]:
        """Return the pictures that images are edits of by their keys, with names for messages."""
        found: dict[str, ImageRef] = {}
        for number, prompt in enumerate(self.prompts):
            for place, source in enumerate(sources_of(prompt)):
                found.setdefault(source.image_key, ImageRef(f"source {place} of image {number}", data=source.data))
        return found


def with_sources(prompts: Sequence[str], sources: Sequence[Sequence[bytes]]) -> list[str]:
    """Return prompts with the pictures that their images are edits of, from a list of pictures for each; or none.

    Raises:
        RequestError: If the numbers of lists and prompts differ.
    """
    if not sources:
        return [*prompts]
    if len(sources) != len(prompts):
        raise RequestError(f"{len(sources)} lists of sources for {len(prompts)} prompts; give one each", 422)
    refs = {id(row): [source_ref(data, place) for place, data in enumerate(row)] for row in sources}
    return [EditPrompt(text, refs[id(row)]) if row else text for text, row in zip(prompts, sources, strict=True)]


Parse = Callable[[bytes], Awaitable[EncodedImages]]  # function from a body to its images


async def score_images(model: ServedModel, request: Request, formats: Mapping[str, Parse]) -> list[Scores]:
    """Read the body of a request, and have one reward score its images; see :func:`score_images_by_reward`."""

    async def parsed(body: bytes, parse: Parse) -> dict[ServedModel, EncodedImages]:
        return {model: await parse(body)}

    by_type = {kind: partial(parsed, parse=parse) for kind, parse in formats.items()}
    outcome = (await score_images_by_reward(model.resources, request, by_type))[model]
    if isinstance(outcome, ScoringError):
        raise outcome
    return outcome


async def score_images_by_reward(
    resources: Resources,
    request: Request,
    formats: Mapping[str, Callable[[bytes], Awaitable[Mapping[ServedModel, EncodedImages]]]],
) -> dict[ServedModel, list[Scores] | ScoringError]:
    """Read the body of a request, and have rewards score its images.

    ``formats`` maps a content type to the function from such a body to the images that each reward is to score. Returns
    reward → scores of its images, or the error of a reward that cannot score them.

    Raises:
        RequestError: If the body is of another type, too long or cannot be parsed, an image is damaged or too large, a
            reward has no room, or decoding or scoring takes longer than the timeout.
    """
    kind = check_type(request, *formats)
    async with resources.bodies.read(request) as body:
        with resources.memory.hold(parsing_bytes(body, kind), len(body)):
            parts = await formats[kind](body)
        for model, images in parts.items():  # now: scores of one reward would be lost if another then refuses
            for prompt in images.prompts:
                model.accepted.check_sources(len(sources_of(prompt)))
            model.require_room(len(images.images))
        most = resources.settings.max_pixels
        needs = await asyncio.to_thread(lambda: {model: images.memory_bytes(most) for model, images in parts.items()})
        # Each reward holds its own decoded images: if together they are too large for ever, 413 says so, not 503.
        held = len(body) + sum(needs.values())

        async def scored(model: ServedModel, images: EncodedImages) -> list[Scores]:
            with resources.memory.hold(needs[model], held - needs[model]):
                return await model.score(request, await _decoded(model, images))

        outcomes = await asyncio.gather(*(scored(*part) for part in parts.items()), return_exceptions=True)
    for outcome in outcomes:  # raised after all have ended, since gather does not stop the others
        if isinstance(outcome, BaseException) and not isinstance(outcome, ScoringError):
            raise outcome
    return dict(zip(parts, outcomes, strict=True))  # type: ignore[arg-type]


async def _decoded(model: ServedModel, images: EncodedImages) -> list[ImageRow]:
    """Decode images for a reward, in their turn, which ends when the thread does, also after the timeout."""
    turns, settings = model.resources.decoders, model.resources.settings
    seconds = settings.timeout

    def end_turn(decoding: asyncio.Future[list[ImageRow]]) -> None:
        turns.release()
        decoding.cancelled() or decoding.exception()  # else asyncio complains of an error that nobody waited for

    until = time.monotonic() + seconds
    try:
        async with asyncio.timeout(seconds):
            await turns.acquire()
            decode = partial(images.decode, model.reward.exif, settings.max_pixels, until)
            decoding = asyncio.ensure_future(asyncio.to_thread(decode))
            decoding.add_done_callback(end_turn)
            return await asyncio.shield(decoding)
    except TimeoutError as error:
        raise RequestError(f"images not decoded within {seconds:g} seconds; send fewer", 504) from error


def parsing_bytes(body: bytes, kind: str) -> int:
    """Return an upper bound, in bytes, on the memory that parsing a body takes in addition to the body.

    The bound includes the resulting images. JSON is decoded to one text, of up to 4 bytes per character if not all
    characters are ASCII, and then to many texts. A form is copied and read into files.
    """
    return (3 if kind == JSON and body.isascii() else 6) * len(body)


class Images(Dialect):
    """Handler of the route."""

    def routes(self) -> list[Route]:
        """Return the route."""
        numbers = list[float]
        answer = fields(scores=numbers, z_scores=numbers, quantiles=numbers, noise=str, model=str)
        summary = "Score images for prompts: a form with files, or JSON with images in base64"
        bodies = {JSON: ImagesAsJSON, FORM: fields(prompt=str, image=list[bytes], source=list[bytes] | None)}
        return [Route("POST", "/v1/score_images", self.score_images, summary, bodies, answer, of_reward=True)]

    async def score_images(self, request: Request) -> JSONResponse:
        """Score images for prompts."""
        model = self.service.model_of(request)
        reward, most, sources = model.reward, model.accepted.max_rows, model.accepted.sources[1]
        formats = {
            JSON: lambda body: asyncio.to_thread(images_of_json, body, most, sources),
            FORM: lambda body: images_of_form(request, body, most, sources),
        }
        totals, axes = model.columns(await score_images(model, request, formats))
        z_scores, quantiles = standing(reward, torch.tensor(totals)) or (None, None)
        told = {"z_scores": z_scores, "quantiles": quantiles, "noise": str(reward.noise), "model": reward.identity}
        return JSONResponse({"scores": totals, **axes, **told})


class ImagesAsJSON(BaseModel, extra="forbid", strict=True):
    """JSON of a request.

    Attributes:
        prompt: Prompt of all images; exclusive with ``prompts``.
        prompts: One prompt per image.
        image: A single image in base64; exclusive with ``images``.
        images: Several images in base64.
        source_images: Pictures in base64 that the images are edits of: a list for all images, or a list of a list for
            each image.
    """

    prompt: str | None = None
    prompts: list[str] | None = None
    image: str | None = None
    images: list[str] | None = None
    source_images: list[str] | list[list[str]] | None = None


def images_of_json(body: bytes, max_images: int, max_sources: int = 0) -> EncodedImages:
    """Parse images from JSON with the fields of :class:`ImagesAsJSON`: ``{"prompt": text, "images": [base64, ...]}``.

    ``max_sources`` is the largest number of pictures that an image may be an edit of.

    Raises:
        RequestError: If the body is not such an object, an image is not base64, or there are too many images.
    """
    example = EDIT_EXAMPLE if b'"source' in body else EXAMPLE
    content = read_json(body, ImagesAsJSON, (8 + 2 * max_sources) * (max_images + 8), example)
    images = _one_or_several("image", content.image, content.images)
    prompts = _one_or_several("prompt", content.prompt, content.prompts)
    check_limit("images:", len(images), max_images, fewer_rows(max_images))
    if content.prompts is None:
        prompts = prompts * len(images)
    given: list[Any] = content.source_images or []
    for_all = bool(given) and isinstance(given[0], str)
    sources = [[from_base64("a source image", text) for text in row] for row in ([given] if for_all else given)]
    prompts = with_sources(prompts, sources * len(prompts) if for_all else sources)
    return EncodedImages(prompts, [from_base64(f"image {number}", text) for number, text in enumerate(images)])


async def images_of_form(request: Request, body: bytes, max_images: int, max_sources: int = 0) -> EncodedImages:
    """Parse images from a form with files ``image``, and one text ``prompt`` for all or one per image, in order.

    Files ``source``, at most ``max_sources``, are pictures that all images are edits of.

    Raises:
        RequestError: If the form cannot be read, has other fields, or the numbers of prompts and images do not fit
            together; with status 415 if its texts are not in UTF-8, since Python's other codecs may take minutes.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise RequestError(f"the form's charset is {charset[:40]!r}; send utf-8", 415)

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        most = {"max_files": max_images + max_sources, "max_fields": max_images}
        form = await MultiPartParser(request.headers, stream(), **most).parse()
    except MultiPartException as error:
        if not error.message.startswith(("Too many files", "Too many fields")):  # one class stands for all faults
            raise RequestError(f"the form cannot be read: {error.message}") from error
        problem = (
            f"the form has over {most['max_files']} files or over {max_images} texts, this server's limit of images"
        )
        raise RequestError(f"{problem}; {fewer_rows(max_images)}", 413) from error
    try:
        if set(form) - {"source"} != {"prompt", "image"}:
            names = ", ".join(repr(name[:40]) for name in sorted(set(form))[:5]) or "none"
            edits = ", and for edits the files source" * any("source" in name for name in form)
            told = f"give the text prompt and the file image, which may stand several times{edits}"
            raise RequestError(f"the form has the fields {names}; {told}")
        images, sources = [
            [await file.read() for file in form.getlist(name) if isinstance(file, UploadFile)]
            for name in ("image", "source")
        ]
        prompts = [text for text in form.getlist("prompt") if isinstance(text, str)]
    finally:
        await form.close()
    check_limit("image:", len(images), max_images, fewer_rows(max_images))
    prompts = prompts * len(images) if len(prompts) == 1 else prompts
    return EncodedImages(with_sources(prompts, [sources] * len(prompts)), images)


def _one_or_several(name: str, single: str | None, several: list[str] | None) -> list[str]:
    if (single is None) == (several is None):
        raise RequestError(f"give either {name} or {name}s")
    return several if single is None else [single]  # type: ignore[return-value]
