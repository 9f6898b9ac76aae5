"""Images of requests: reading, decoding within the server's memory, scores, and the route ``POST /v1/score_images``."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from latentreward.apps.serving.batch_scorer import ImageRow, standing
from latentreward.apps.serving.bodies import FORM, JSON, check_type
from latentreward.apps.serving.dialects.base import Dialect
from latentreward.apps.serving.errors import RequestError, ScoringError, check_limit, fewer_rows
from latentreward.apps.serving.json_bodies import PROMPT_LENGTH, from_base64, read_json
from latentreward.apps.serving.resources import Resources
from latentreward.apps.serving.routes import Route, fields
from latentreward.apps.serving.served import Scores, ServedModel
from latentreward.contracts import ImageRef
from latentreward.data.images import TOO_LARGE, ExifOrientation, ImageError, decode_image, decoding_bytes

EXAMPLE = '{"prompt": TEXT or "prompts": [TEXT, ...], "images": [BASE64, ...]}'  # JSON of a request, for messages


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a request, with a prompt each.

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

        Raises:
            RequestError: If a file is not an image, or has more than ``max_pixels`` pixels.
        """
        try:
            decoded, extra = zip(*(decoding_bytes(ref, max_pixels) for ref in self._refs()), strict=True)
        except ImageError as error:
            remedy = "; resize it before sending, or raise the server's --max_pixels"
            raise RequestError(f"{error}{remedy if error.problem == TOO_LARGE else ''}", 422) from error
        return sum(map(len, self.images)) + sum(decoded) + max(extra)

    def decode(self, exif: ExifOrientation, max_pixels: int, until: float) -> list[ImageRow]:
        """Decode the images into rows to score, turned upright by their EXIF orientation if ``exif`` is ``apply``.

        No further image is decoded after the time ``until`` of the monotonic clock.

        Raises:
            RequestError: If an image is damaged.
            TimeoutError: If there is no time left.
        """
        rows = []
        for prompt, ref in zip(self.prompts, self._refs(), strict=True):
            if time.monotonic() > until:
                raise TimeoutError
            try:
                rows.append(ImageRow(prompt, decode_image(ref, max_pixels, exif)))
            except ImageError as error:
                raise RequestError(str(error), 422) from error
        return rows

    def _refs(self) -> list[ImageRef]:
        return [ImageRef(str(number), data=data) for number, data in enumerate(self.images)]


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
        bodies = {JSON: ImagesAsJSON, FORM: fields(prompt=str, image=list[bytes])}
        return [Route("POST", "/v1/score_images", self.score_images, summary, bodies, answer, of_reward=True)]

    async def score_images(self, request: Request) -> JSONResponse:
        """Score images for prompts."""
        model = self.service.model_of(request)
        reward, most = model.reward, model.accepted.max_rows
        formats = {
            JSON: lambda body: asyncio.to_thread(images_of_json, body, most),
            FORM: lambda body: images_of_form(request, body, most),
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
    """

    prompt: str | None = None
    prompts: list[str] | None = None
    image: str | None = None
    images: list[str] | None = None


def images_of_json(body: bytes, max_images: int) -> EncodedImages:
    """Parse images from JSON with the fields of :class:`ImagesAsJSON`: ``{"prompt": text, "images": [base64, ...]}``.

    Raises:
        RequestError: If the body is not such an object, an image is not base64, or there are too many images.
    """
    content = read_json(body, ImagesAsJSON, 8 * (max_images + 8), EXAMPLE)
    images = _one_or_several("image", content.image, content.images)
    prompts = _one_or_several("prompt", content.prompt, content.prompts)
    check_limit("images:", len(images), max_images, fewer_rows(max_images))
    if content.prompts is None:
        prompts = prompts * len(images)
    return EncodedImages(prompts, [from_base64(f"image {number}", text) for number, text in enumerate(images)])


async def images_of_form(request: Request, body: bytes, max_images: int) -> EncodedImages:
    """Parse images from a form with files ``image``, and one text ``prompt`` for all or one per image, in order.

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
        form = await MultiPartParser(request.headers, stream(), max_files=max_images, max_fields=max_images).parse()
    except MultiPartException as error:
        if not error.message.startswith(("Too many files", "Too many fields")):  # one class stands for all faults
            raise RequestError(f"the form cannot be read: {error.message}") from error
        problem = f"the form has over {max_images} files or over {max_images} texts, this server's limit of images"
        raise RequestError(f"{problem}; {fewer_rows(max_images)}", 413) from error
    try:
        if set(form) != {"prompt", "image"}:
            names = ", ".join(repr(name[:40]) for name in sorted(set(form))[:5]) or "none"
            told = "give the text prompt and the file image, which may stand several times"
            raise RequestError(f"the form has the fields {names}; {told}")
        images = [await file.read() for file in form.getlist("image") if isinstance(file, UploadFile)]
        prompts = [text for text in form.getlist("prompt") if isinstance(text, str)]
    finally:
        await form.close()
    return EncodedImages(prompts * len(images) if len(prompts) == 1 else prompts, images)


def _one_or_several(name: str, single: str | None, several: list[str] | None) -> list[str]:
    if (single is None) == (several is None):
        raise RequestError(f"give either {name} or {name}s")
    return several if single is None else [single]  # type: ignore[return-value]
