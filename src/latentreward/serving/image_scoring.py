"""Scoring of encoded images, and the route ``POST /v1/score_images``; image_requests.py parses its bodies."""

import asyncio
import time
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse

from latentreward.data.images import ExifOrientation
from latentreward.serving.batch_scorer import ImageRow, standing
from latentreward.serving.errors import RequestError
from latentreward.serving.image_requests import EncodedImages, images_of_form, images_of_json, parsing_bytes
from latentreward.serving.resources import Resources
from latentreward.serving.routes import BINARY, FORM, JSON, NUMBERS, TEXT, Route, check_type, fields, listed
from latentreward.serving.served import Scores, ServedModel
from latentreward.serving.service import ScoringService

DECODERS = 4
"""Number of requests whose images are decoded at the same time."""


class ImageScorer:
    """Decodes the images of requests within the server's memory, and has rewards score them.

    Args:
        resources: Resources of the server.
    """

    def __init__(self, resources: Resources) -> None:
        self._memory, self._decoders = resources.memory, asyncio.Semaphore(DECODERS)
        self._timeout = resources.settings.timeout

    async def score(self, request: Request, model: ServedModel, images: EncodedImages, beside: int) -> list[Scores]:
        """Score images with a reward.

        Raises:
            RequestError: If an image is damaged or too large, with status 504 if decoding is not done after the
                timeout, or as :meth:`ServedModel.score`.
        """
        with self._memory.hold(await asyncio.to_thread(images.memory_bytes), beside):
            until = time.monotonic() + self._timeout
            try:
                async with asyncio.timeout(self._timeout):
                    rows = await self._decoded(images, model.reward.exif, until)
            except TimeoutError as error:
                raise RequestError(f"images not decoded within {self._timeout:g} seconds; send fewer", 504) from error
            return await model.score(request, rows)

    async def _decoded(self, images: EncodedImages, exif: ExifOrientation, until: float) -> list[ImageRow]:
        """Decode the images of a request in its turn, which ends when the thread does, also after the timeout."""
        await self._decoders.acquire()
        decoding = asyncio.ensure_future(asyncio.to_thread(images.decode, exif, until))
        decoding.add_done_callback(self._end_turn)
        return await asyncio.shield(decoding)

    def _end_turn(self, decoding: asyncio.Future[list[ImageRow]]) -> None:
        self._decoders.release()
        decoding.cancelled() or decoding.exception()  # else asyncio complains of an error that nobody waited for


class ImageRoutes:
    """Handler of the route.

    Args:
        service: Service that scores.
        scorer: Scorer of images.
    """

    def __init__(self, service: ScoringService, scorer: ImageScorer) -> None:
        self.service, self._scorer = service, scorer

    def routes(self) -> list[Route]:
        """Return the route."""
        as_json = fields(prompt=TEXT, prompts=listed(TEXT), image=TEXT, images=listed(TEXT))
        as_form = fields(prompt=TEXT, image=listed(BINARY))
        answer = fields(scores=NUMBERS, z_scores=NUMBERS, quantiles=NUMBERS, noise=TEXT, model=TEXT)
        summary = "Score images for prompts: a form with files, or JSON with images in base64"
        bodies = {JSON: as_json, FORM: as_form}
        return [Route("POST", "/v1/score_images", self.score_images, summary, bodies, answer, of_reward=True)]

    async def score_images(self, request: Request) -> JSONResponse:
        """Score images for prompts."""
        model, resources = self.service.model_of(request), self.service.resources
        kind = check_type(request, JSON, FORM)
        async with resources.bodies.read(request) as body:
            with resources.memory.hold(parsing_bytes(body, kind), len(body)):
                images = await _parse_images(request, body, kind, model.accepted.max_rows)
            scores = await self._scorer.score(request, model, images, len(body))
        return JSONResponse(_reply(model, scores))


async def _parse_images(request: Request, body: bytearray, kind: str, limit: int) -> EncodedImages:
    if kind == JSON:
        return await asyncio.to_thread(images_of_json, body, limit)
    return await images_of_form(request, body, limit)


def _reply(model: ServedModel, scores: list[Scores]) -> dict[str, Any]:
    reward, (totals, axes) = model.reward, model.columns(scores)
    z_scores, quantiles = standing(reward, torch.tensor(totals)) or (None, None)
    told = {"noise": str(reward.noise), "model": reward.identity}
    return {"scores": totals, **axes, "z_scores": z_scores, "quantiles": quantiles, **told}
