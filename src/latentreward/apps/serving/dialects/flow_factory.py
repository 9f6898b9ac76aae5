"""Flow-Factory's reward server: ``POST /compute``, as its ``RemotePointwiseRewardModel`` calls it.

Source: X-GenGroup/Flow-Factory (Apache-2.0), ``src/flow_factory/rewards/my_reward_remote.py`` and
``reward_server/example_server.py`` at a0b2bc5; also the older client with the field ``kwargs`` at 696af07. A request is

    {"prompt": [TEXT, ...], "image": [BASE64, ...], "video": null, "condition_images": null, "condition_videos": null}

with ``"condition_images": [[BASE64, ...], ...]``, the pictures that each image is an edit of, for a reward of edits;
and its reply ``{"rewards": [NUMBER, ...]}``; an error is ``{"error": TEXT}`` with its status. The client's
``GET /health`` is answered as UniRL's, because it reads only the status. The client's ``RemoteGroupwiseRewardModel``
sends the same request for a group of samples, and gets the same scores: they do not depend on the group.
"""

import asyncio
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from latentreward.apps.serving.bodies import JSON
from latentreward.apps.serving.dialects.base import Dialect
from latentreward.apps.serving.images import EncodedImages, score_images, with_sources
from latentreward.apps.serving.json_bodies import from_base64, read_json
from latentreward.apps.serving.refusals import RequestError, check_limit
from latentreward.apps.serving.routes import Route, fields

TEXTS = 8  # greatest number of texts, and of signs between them, per image; a body has two texts and four signs
FORM = '{"prompt": [TEXT, ...], "image": [BASE64, ...]}'  # JSON of a request, for messages


class ComputeRequest(BaseModel, strict=True):
    """Body of a request."""

    prompt: list[str]
    image: list[str] | None = None
    video: Any = None
    condition_images: list[list[str]] | None = None
    condition_videos: Any = None
    kwargs: Any = None


class FlowFactory(Dialect):
    """Handler of the route."""

    def routes(self) -> list[Route]:
        """Return the route."""
        summary, answer = "Flow-Factory's clients: score images for prompts; pixels only", fields(rewards=list[float])
        return [Route("POST", "/compute", self.compute, summary, {JSON: ComputeRequest}, answer, of_reward=True)]

    async def compute(self, request: Request) -> JSONResponse:
        """Score the images of a request."""
        model = self.service.model_of(request)
        most, sources = model.settings.queue, model.accepted.sources[1]
        formats = {JSON: lambda body: asyncio.to_thread(parse_images, body, most, sources)}
        scores = await score_images(model, request, formats)
        return JSONResponse({"rewards": [score for score, *_ in scores]})


def parse_images(body: bytes, most: int, max_sources: int = 0) -> EncodedImages:
    """Parse a request; raise RequestError if it is no such JSON, has other media than images, or too many."""
    content = read_json(body, ComputeRequest, (TEXTS + 2 * max_sources) * (most + 8), FORM)
    for name in ("video", "condition_videos", *(() if max_sources else ("condition_images",))):
        if getattr(content, name):
            raise RequestError(f"{name} is given; this server scores a prompt and an image, nothing else", 422)
    images = content.image or []
    check_limit("image: images", len(images), most)
    sources = [[from_base64("a condition image", text) for text in row] for row in content.condition_images or []]
    prompts = with_sources(content.prompt, sources)
    return EncodedImages(prompts, [from_base64(f"image {number}", text) for number, text in enumerate(images)])
