"""Requests with images and prompts, as JSON or as a form."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.types import Message

from latentreward.contracts import ImageRef
from latentreward.data.images import ExifOrientation, ImageError, decode_image, decoding_bytes
from latentreward.serving.batch_scorer import ImageRow
from latentreward.serving.errors import RequestError

MAX_PIXELS = 16 * 1024 * 1024
"""Images with more are refused from their header."""
PROMPT_LENGTH = 10_000
"""Characters; what encoders read of a prompt is far shorter."""
ESCAPED_CHARACTER = 12
"""Most bytes that a character of a prompt takes in JSON: two times ``\\uXXXX``."""
MAX_ESCAPES = 2**20
"""Backslashes in JSON, beside those before the slashes of base64, which some encoders write."""


@dataclass(frozen=True)
class EncodedImages:
    """Images as they came.

    Attributes:
        prompts: One for each image.
        images: Bytes of image files.

    Raises:
        RequestError: If there is no image, the numbers differ, or a prompt is too long.
    """

    prompts: Sequence[str]
    images: Sequence[bytes]

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

    def memory_bytes(self) -> int:
        """Bytes that the images take until they are scored: as they came, decoded, and the largest while it is decoded.

        Raises:
            RequestError: If one is no image or has too many pixels.
        """
        try:
            decoded, extra = zip(*(decoding_bytes(ref, MAX_PIXELS) for ref in self._refs()), strict=True)
        except ImageError as error:
            raise RequestError(str(error), 422) from error
        return sum(map(len, self.images)) + sum(decoded) + max(extra)

    def decode(self, exif: ExifOrientation) -> list[ImageRow]:
        """Rows to score, turned upright by their EXIF orientation if ``exif`` is ``apply``.

        Raises:
            RequestError: If an image is damaged.
        """
        try:
            decoded = [decode_image(ref, MAX_PIXELS, exif) for ref in self._refs()]
        except ImageError as error:
            raise RequestError(str(error), 422) from error
        return [ImageRow(prompt, image) for prompt, image in zip(self.prompts, decoded, strict=True)]

    def _refs(self) -> list[ImageRef]:
        return [ImageRef(str(number), data=data) for number, data in enumerate(self.images)]


class ImagesAsJSON(BaseModel, extra="forbid", strict=True):
    """JSON of a request: a prompt for all images, or one for each; a single image, or several, in base64."""

    prompt: str | None = None
    prompts: list[str] | None = None
    image: str | None = None
    images: list[str] | None = None


def images_of_json(body: bytes | bytearray, max_images: int) -> EncodedImages:
    """Images in ``{"prompt": text, "images": [base64, ...]}``, or with ``prompts``, a text for each.

    A single one may stand as ``"image": base64``.

    Raises:
        RequestError: If it is something else.
    """
    _check_structure(body, max_images)
    try:
        content = ImagesAsJSON.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:40] or "the body"
        form = '{"prompt": TEXT or "prompts": [TEXT, ...], "images": [BASE64, ...]}'
        raise RequestError(f"{where}: {first['msg']}; give a JSON object {form}") from error
    images = _one_or_several("image", content.image, content.images)
    prompts = _one_or_several("prompt", content.prompt, content.prompts)
    if len(images) > max_images:
        raise RequestError(f"{len(images)} images are over this server's limit of {max_images}", 413)
    if content.prompts is None:
        prompts = prompts * len(images)
    return EncodedImages(prompts, [_from_base64(number, text) for number, text in enumerate(images)])


async def images_of_form(request: Request, body: bytearray, max_images: int) -> EncodedImages:
    """Images in the files ``image`` of a form, with a text ``prompt`` for all, or one for each in the same order.

    Raises:
        RequestError: If it is something else.
        starlette.exceptions.HTTPException: If the form cannot be parsed (400).
    """
    form = await _replay(request, body).form(max_files=max_images, max_fields=max_images)
    try:
        if set(form) != {"prompt", "image"}:
            raise RequestError(
                f"the form has {_fields(form)}; give the text prompt and the file image, which may stand several times"
            )
        images = [await file.read() for file in form.getlist("image") if isinstance(file, UploadFile)]
        prompts = [text for text in form.getlist("prompt") if isinstance(text, str)]
    finally:
        await form.close()
    return EncodedImages(prompts * len(images) if len(prompts) == 1 else prompts, images)


def _fields(form: Iterable[str]) -> str:
    """Names of a form's fields, as far as they fit into a line."""
    names = ", ".join(repr(name[:40]) for name in sorted(set(form))[:5])
    return f"the fields {names}" if names else "no field"


def _replay(request: Request, body: bytearray) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return Request(request.scope, receive)


def parsing_bytes(body: bytes | bytearray, kind: str) -> int:
    """Bytes, at most, that a body takes beside its own while it is parsed, with the images that come out of it.

    JSON becomes one text, of up to 4 bytes per character if any is beyond ASCII, and many; a form is copied and read.
    """
    return (3 if kind == "application/json" and body.isascii() else 6) * len(body)


def _check_structure(body: bytes | bytearray, max_images: int) -> None:
    """Refuse JSON before it is parsed, if it would become many objects, or texts of several bytes per character.

    What stands between quotes is told by counting alone, so that neither time nor memory depend on what the body holds.
    """
    most = 8 * (max_images + 8)
    if body.count(b"\\") > MAX_ESCAPES + len(body) // 32:
        raise RequestError("the body holds more escapes (\\) than prompts of a permitted length need", 413)
    pieces = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 2 * most)
    if len(pieces) > 2 * most:
        raise RequestError(f"over {most} texts; at most {max_images} images are taken at once", 413)
    if sum(len(piece.translate(None, b" \t\r\n")) for piece in pieces[::2]) > most:
        raise RequestError('too many values for {"prompt": TEXT or "prompts": [TEXT, ...], "images": [BASE64, ...]}')
    long = [text for text in pieces[1::2] if len(text) > ESCAPED_CHARACTER * PROMPT_LENGTH]
    if any(b"\\u" in text or not text.isascii() for text in long):
        raise RequestError("a text is too long for a prompt, and no base64", 413)


def _one_or_several(name: str, single: str | None, several: list[str] | None) -> list[str]:
    if (single is None) == (several is None):
        raise RequestError(f"give either {name} or {name}s")
    return several if single is None else [single]  # type: ignore[return-value]


def _from_base64(number: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"image {number} is no base64") from error
