"""Forms of requests: the JSON that the service takes as pydantic models, and the forms in which a client asks."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, Field, Json

from latentreward.core.contracts import ImageRef, sources_of
from latentreward.data import decode_image
from latentreward.data.images import image_bytes, read_header

MOST_CHARACTERS = 10_000  # of a prompt that ``latentreward serve`` takes; text encoders truncate far earlier


class ImagesRequest(BaseModel, extra="forbid", strict=True):
    """JSON of ``/v1/score_images``; images are files in base64, sources the pictures that they are edits of."""

    prompt: str | None = None  # of all images; exclusive with prompts
    prompts: list[str] | None = None
    image: str | None = None  # exclusive with images
    images: list[str] | None = None
    source_images: list[str] | list[list[str]] | None = None  # a list for all images, or one for each


class Prompts(BaseModel, extra="forbid"):
    """Prompts in the ``__metadata__`` of a safetensors file: one for all rows, or one for each."""

    prompt: str | None = None
    prompts: Json[list[str]] | None = None
    format: str | None = None


class Header(BaseModel):
    """Safetensors header with prompts."""

    texts: Prompts = Field(Prompts(), alias="__metadata__")


class Turn(BaseModel, strict=True):
    """Turn of a history of UniRL: a text with an image."""

    text: str
    image_b64: str | None = None
    image_ipc: None = None  # this and videos are refused
    video_b64: None = None
    video_path: None = None


class Identity(BaseModel, strict=True):
    """Marks of a sample of UniRL, which the reply repeats."""

    request_id: str | None = None
    sample_id: str | None = None
    group_id: str | None = None
    source_rank: int | None = None
    policy_version: int | None = None
    scorer_version: None = None  # no version is pinned
    idempotency_key: str | None = None


class Sample(Identity, strict=True):
    """A history of UniRL, and the rewards that are to score its last turn."""

    history: list[Turn] = Field(min_length=1)
    required_rewards: list[str] = Field(min_length=1)
    metadata: dict[str, Any] | None = None


class UniRLRequest(BaseModel, strict=True):
    """JSON of UniRL's ``/score``."""

    protocol_version: Literal["1"] = "1"
    requests: list[Sample]
    grad_mode: Literal[False] = False


class ComputeRequest(BaseModel, strict=True):
    """JSON of Flow-Factory's ``/compute``; an empty list of videos is none."""

    prompt: list[str]
    image: list[str] | None = None
    video: list[None] | None = None
    condition_images: list[list[str]] | None = None
    condition_videos: list[None] | None = None


def source_texts(prompts: Sequence[str]) -> list[list[str]]:
    """Return the pictures that each of B prompts edits, as base64 of PNG or JPEG files; equal pictures are read once.

    A file that every reader decodes alike is sent as it is: a photograph as PNG is several times as large.
    """

    @cache
    def read(source: ImageRef) -> str:
        if read_header(source).plain:
            return base64.b64encode(image_bytes(source)).decode()
        return png_text(decode_image(source, exif="apply"))

    return [[*map(read, sources_of(prompt))] for prompt in prompts]


def png_text(image: Image.Image) -> str:
    """Encode an image as PNG in base64; higher levels of compression take longer than they save on a fast network."""
    content = BytesIO()
    image.convert("RGB").save(content, "png", compress_level=1)
    return base64.b64encode(content.getvalue()).decode()


@dataclass(frozen=True)
class PlainJSON:
    """Form of requests and replies of a server that scores images: ``{"prompts", "images"}`` → ``{"scores"}``.

    ``prompts`` are B texts, ``images`` B PNG files in base64, ``scores`` B numbers. A text ``model`` beside the scores
    names the judge, and must be the same in all replies. Requests for edits also have ``source_images``, for each image
    the list of the pictures that were edited, as PNG or JPEG files. Derive a frozen dataclass from this class for a
    server with a form of its own.

    Attributes:
        path: Path of requests.
    """

    path: str = "/score"

    def request(self, prompts: Sequence[str], images: Sequence[str]) -> dict[str, Any]:
        """Return the JSON of a request for B images, which are PNG files in base64; prompts of edits carry sources."""
        sources = source_texts(prompts)
        request: dict[str, Any] = {"prompts": list(prompts), "images": list(images)}
        return request | {"source_images": sources} if any(sources) else request

    def scores(self, reply: Mapping[str, Any], request: Mapping[str, Any]) -> Sequence[Any]:
        """Return the scores of a reply, in the order of its request's images, a higher one is better; unchecked."""
        scores: Sequence[Any] = reply["scores"]
        return scores

    def model(self, reply: Mapping[str, Any]) -> str | None:
        """Return the model that a reply names, which must be the same in all replies; None if it names none."""
        name = reply.get("model")
        return name if isinstance(name, str) else None


@dataclass(frozen=True)
class ServedImages(PlainJSON):
    """Form of ``latentreward serve`` for images, ``POST /v1/score_images``: the server encodes them with its VAE.

    Attributes:
        path: Path of requests.
    """

    path: str = "/v1/score_images"

    def request(self, prompts: Sequence[str], images: Sequence[str]) -> dict[str, Any]:
        request = super().request(prompts, images)
        first, *others = request.get("source_images", ((),))  # pictures that all images are edits of are sent once
        return request | {"source_images": first} if first and all(row == first for row in others) else request
