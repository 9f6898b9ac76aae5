"""The route ``POST /v1/score_images``: images and prompts, as JSON or as a form."""

import asyncio
from collections.abc import Iterable

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from latentreward.serving.batch_scorer import standing
from latentreward.serving.dialects.base import Dialect
from latentreward.serving.errors import RequestError, check_limit, fewer_rows
from latentreward.serving.images import EncodedImages, score_images
from latentreward.serving.json_bodies import from_base64, read_json
from latentreward.serving.routes import FORM, JSON, Route, fields

EXAMPLE = '{"prompt": TEXT or "prompts": [TEXT, ...], "images": [BASE64, ...]}'
"""JSON of a request, for messages."""


class ImageRequests(Dialect):
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


def _replay(request: Request, body: bytes) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)


def _one_or_several(name: str, single: str | None, several: list[str] | None) -> list[str]:
    if (single is None) == (several is None):
        raise RequestError(f"give either {name} or {name}s")
    return several if single is None else [single]  # type: ignore[return-value]
