"""Parsing of requests with images and prompts, as JSON or as a form."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastapi import Request
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from latentreward.contracts import ImageRef
from latentreward.data.images import ExifOrientation, ImageError, decode_image, decoding_bytes
from latentreward.serving.batch_scorer import ImageRow
from latentreward.serving.errors import RequestError
from latentreward.serving.json_bodies import PROMPT_LENGTH, from_base64, read_json
from latentreward.serving.protocol import check_limit, fewer_rows

MAX_PIXELS = 16 * 1024 * 1024
"""Greatest number of pixels of an image; checked in the image's header, before decoding."""
FORM = '{"prompt": TEXT or "prompts": [TEXT, ...], "images": [BASE64, ...]}'
"""JSON of a request, for messages."""


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a request, with a prompt each.

    Attributes:
        prompts: One prompt per image.
        images: Bytes of image files, such as PNG or JPEG.

    Raises:
        RequestError: If there is no image, the numbers of prompts and images differ, or a prompt is too long.
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
        """Estimate the memory in bytes that the images take until they are scored.

        The sum of the encoded images, the decoded images, and the extra memory of decoding the most demanding one.

        Raises:
            RequestError: If a file is not an image, or has too many pixels.
        """
        try:
            decoded, extra = zip(*(decoding_bytes(ref, MAX_PIXELS) for ref in self._refs()), strict=True)
        except ImageError as error:
            raise RequestError(str(error), 422) from error
        return sum(map(len, self.images)) + sum(decoded) + max(extra)

    def decode(self, exif: ExifOrientation, until: float) -> list[ImageRow]:
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
                rows.append(ImageRow(prompt, decode_image(ref, MAX_PIXELS, exif)))
            except ImageError as error:
                raise RequestError(str(error), 422) from error
        return rows

    def _refs(self) -> list[ImageRef]:
        return [ImageRef(str(number), data=data) for number, data in enumerate(self.images)]


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


def images_of_json(body: bytes | bytearray, max_images: int) -> EncodedImages:
    """Parse images from JSON with the fields of :class:`ImagesAsJSON`: ``{"prompt": text, "images": [base64, ...]}``.

    Raises:
        RequestError: If the body is not such an object, an image is not base64, or there are too many images.
    """
    content = read_json(body, ImagesAsJSON, 8 * (max_images + 8), FORM)
    images = _one_or_several("image", content.image, content.images)
    prompts = _one_or_several("prompt", content.prompt, content.prompts)
    check_limit("images:", len(images), max_images, fewer_rows(max_images))
    if content.prompts is None:
        prompts = prompts * len(images)
    return EncodedImages(prompts, [from_base64(f"image {number}", text) for number, text in enumerate(images)])


async def images_of_form(request: Request, body: bytearray, max_images: int) -> EncodedImages:
    """Parse images from a form with files ``image``, and one text ``prompt`` for all or one per image, in order.

    Raises:
        RequestError: If the form has other fields, or the numbers of prompts and images do not fit together; with
            status 415 if its texts are not in UTF-8, since Python's other codecs may take minutes.
        starlette.exceptions.HTTPException: With status 400 if the form cannot be parsed.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise RequestError(f"the form's charset is {charset[:40]!r}; send utf-8", 415)
    try:
        form = await _replay(request, body).form(max_files=max_images, max_fields=max_images)
    except HTTPException as error:
        if not error.detail.startswith(("Too many files", "Too many fields")):  # one class stands for all faults
            raise
        problem = f"the form has over {max_images} files or over {max_images} texts, this server's limit of images"
        raise RequestError(f"{problem}; {fewer_rows(max_images)}", 413) from error
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
    """Name the first fields of a form, for an error message of one line."""
    names = ", ".join(repr(name[:40]) for name in sorted(set(form))[:5])
    return f"the fields {names}" if names else "no field"


def _replay(request: Request, body: bytearray) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return Request(request.scope, receive)


def parsing_bytes(body: bytes | bytearray, kind: str) -> int:
    """Return an upper bound, in bytes, on the memory that parsing a body takes in addition to the body.

    The bound includes the resulting images. JSON is decoded to one text, of up to 4 bytes per character if not all
    characters are ASCII, and then to many texts. A form is copied and read into files.
    """
    return (3 if kind == "application/json" and body.isascii() else 6) * len(body)


def _one_or_several(name: str, single: str | None, several: list[str] | None) -> list[str]:
    if (single is None) == (several is None):
        raise RequestError(f"give either {name} or {name}s")
    return several if single is None else [single]  # type: ignore[return-value]
