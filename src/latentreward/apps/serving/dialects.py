"""Wire formats of other frameworks' clients, whose requests hold images and prompts.

UniRL: Tencent-Hunyuan/UniRL (Apache-2.0), ``unirl/reward/remote.py`` at 0e713d6 and
``unirl-reward-service/reward_service/schemas.py`` at cb03dcd; also the older client without identities at 1a7b501.
Flow-Factory: X-GenGroup/Flow-Factory (Apache-2.0), ``src/flow_factory/rewards/my_reward_remote.py`` at a0b2bc5.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from latentreward.apps.serving.bodies import JSON, Images, check_limit, encoded_images, parse_json
from latentreward.apps.serving.service import ScoringError, ScoringService, ServedModel, takes
from latentreward.reward.remote.schemas import ComputeRequest, Identity, Sample, UniRLReply, UniRLRequest


class Dialect(ABC):
    """Base class of a wire format: its routes, which the server also answers below ``/rewards/NAME``.

    Args:
        service: Service that scores; ``service.model_of(request)`` is the reward that a request names.
    """

    def __init__(self, service: ScoringService) -> None:
        self.service = service

    @abstractmethod
    def router(self) -> APIRouter:
        """Return the routes."""


class FlowFactory(Dialect):
    """Flow-Factory's reward server, ``POST /compute``; its clients ask UniRL's ``/health`` and read the status only.

    Its client of groups sends the same request, and gets the same scores: they do not depend on the group.
    """

    def router(self) -> APIRouter:
        """Return the route."""
        router, bodies = APIRouter(), takes({JSON: ComputeRequest.model_json_schema()})
        router.post("/compute", summary="Flow-Factory's clients: score images", openapi_extra=bodies)(self.compute)
        return router

    async def compute(self, request: Request) -> JSONResponse:
        """Score the images of a request."""
        model = self.service.model_of(request)
        async with self.service.body(request, JSON) as (body, take):
            given = await asyncio.to_thread(parse_json, body, ComputeRequest)
            check_limit("image: images", len(given.image or ()), model.settings.queue)
            images = encoded_images(given.prompt, given.image or (), given.condition_images or ())
            return JSONResponse({"rewards": [score for score, *_ in await model.score_images(request, images, take)]})


class UniRL(Dialect):
    """UniRL's reward service, ``POST /score`` and ``GET /health``.

    As with UniRL's own scorers, the last turn of a history is scored. A reward of edits takes the images of the turns
    before it as the pictures that were edited, as UniRL's EditReward does; other rewards ignore them. A reward that
    fails is reported in ``errors``; one without room is a 503 for the whole request, which the client sends again.
    """

    def router(self) -> APIRouter:
        """Return the routes."""
        place = "#/paths/~1score/post/requestBody/content/application~1json/schema/$defs/{model}"
        router, bodies = APIRouter(), takes({JSON: UniRLRequest.model_json_schema(ref_template=place)})
        router.post("/score", summary="UniRL's clients: score images by several rewards", openapi_extra=bodies)(
            self.score
        )
        router.get("/health", summary="UniRL's and Flow-Factory's clients: health, rewards")(self.health)
        return router

    async def health(self, request: Request) -> JSONResponse:
        """Answer with the names of the rewards, and of the scores of each; 503 if one of them is not ready."""
        self.service.model_of(request)  # raises for the name of an unknown reward
        names = {name: ["score", *model.reward.axes] for name, model in self.service.models.items()}
        ready = self.service.ready
        return JSONResponse({"status": "ok" if ready else "busy", "rewards": names}, 200 if ready else 503)

    async def score(self, request: Request) -> JSONResponse:
        """Score the samples of a request."""
        async with self.service.body(request, JSON) as (body, take):
            samples = (await asyncio.to_thread(parse_json, body, UniRLRequest)).requests
            rows: dict[ServedModel, list[int]] = {}
            for number, sample in enumerate(samples):
                for name in dict.fromkeys(sample.required_rewards):
                    rows.setdefault(self.service.named(name), []).append(number)
            for model, numbers in rows.items():
                check_limit(f"requests: samples for {model.name}", len(numbers), model.settings.queue)
            parts = {model: images_of([samples[one] for one in numbers], model) for model, numbers in rows.items()}
            for model, images in parts.items():  # now: scores of one would be lost if another then refuses
                model.check_images(images)
            scoring = (model.score_images(request, images, take) for model, images in parts.items())
            outcomes = await asyncio.gather(*scoring, return_exceptions=True)
        results: list[dict[str, dict[str, Any]]] = [{} for _ in samples]
        errors: list[dict[str, str]] = [{} for _ in samples]
        for model, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, ScoringError):
                raise outcome
            for place, row in enumerate(rows[model]):
                if isinstance(outcome, BaseException):
                    errors[row][model.name] = str(outcome)
                else:
                    results[row][model.name] = dict(zip(("score", *model.reward.axes), outcome[place], strict=True))
        marks = [sample.model_dump(include={*Identity.model_fields}) for sample in samples]
        return JSONResponse(UniRLReply(results=results, errors=errors, identities=marks).model_dump())


def images_of(samples: Sequence[Sample], model: ServedModel) -> Images:
    """Return text and image of each sample's last turn, for a reward of edits with the images of the turns before."""
    before = [[turn.image_b64 for turn in sample.history[:-1] if turn.image_b64] for sample in samples]
    last = [sample.history[-1] for sample in samples]
    sources = before if model.accepted.sources[1] and any(before) else ()
    return encoded_images([turn.text for turn in last], [turn.image_b64 or "" for turn in last], sources)
