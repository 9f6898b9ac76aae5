"""Wire formats of other frameworks' clients, whose requests hold images and prompts.

UniRL: Tencent-Hunyuan/UniRL (Apache-2.0), ``unirl/reward/remote.py`` at 0e713d6 and
``unirl-reward-service/reward_service/schemas.py`` at cb03dcd; also the older client without identities at 1a7b501.
Flow-Factory: X-GenGroup/Flow-Factory (Apache-2.0), ``src/flow_factory/rewards/my_reward_remote.py`` at a0b2bc5.
verl-omni's protocol is ``/v1/score`` in :mod:`latentreward.apps.serving.app`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from latentreward.apps.serving.bodies import JSON, Images, check_limit, images_of, parse_json
from latentreward.apps.serving.service import ScoringError, ScoringService, ServedModel
from latentreward.reward.remote.schemas import ComputeRequest, Identity, Sample, UniRLRequest


def flow_factory_routes(service: ScoringService) -> APIRouter:
    """Return the route of Flow-Factory's reward server, whose clients also ask UniRL's ``/health``.

    Its client of groups sends the same request, and gets the same scores: they do not depend on the group.
    """
    router = APIRouter()

    @router.post("/compute", summary="Flow-Factory's clients: score images")
    async def compute(request: Request) -> JSONResponse:
        model = service.model_of(request)
        async with service.memory.body(request, service.settings, JSON) as (body, take):
            given = await asyncio.to_thread(parse_json, body, ComputeRequest)
            check_limit("image: images", len(given.image or ()), service.settings.queue)
            images = images_of(given.prompt, given.image or (), given.condition_images or ())
            return JSONResponse({"rewards": [score for score, *_ in await model.score_images(request, images, take)]})

    return router


def unirl_routes(service: ScoringService) -> APIRouter:
    """Return the routes of UniRL's reward service.

    As with UniRL's own scorers, the last turn of a history is scored. A reward of edits takes the images of the turns
    before it as the pictures that were edited, as UniRL's EditReward does; other rewards ignore them. A reward that
    fails is reported in ``errors``; one without room is a 503 for the whole request, which the client sends again.
    """
    router = APIRouter()

    @router.get("/health", summary="UniRL's and Flow-Factory's clients: health, rewards")
    async def health(request: Request) -> JSONResponse:
        service.model_of(request)  # raises for the name of an unknown reward
        names = {name: ["score", *model.reward.axes] for name, model in service.models.items()}
        ready = service.ready
        return JSONResponse({"status": "ok" if ready else "busy", "rewards": names}, 200 if ready else 503)

    @router.post("/score", summary="UniRL's clients: score images by rewards")
    async def score(request: Request) -> JSONResponse:
        service.model_of(request)  # raises for the name of an unknown reward
        async with service.memory.body(request, service.settings, JSON) as (body, take):
            samples = (await asyncio.to_thread(parse_json, body, UniRLRequest)).requests
            check_limit("requests: samples", len(samples), service.settings.queue)
            rows: dict[ServedModel, list[int]] = {}
            for number, sample in enumerate(samples):
                for name in dict.fromkeys(sample.required_rewards):
                    rows.setdefault(service.named(name), []).append(number)
            parts = {model: turns_of([samples[one] for one in numbers], model) for model, numbers in rows.items()}
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
        return JSONResponse({"protocol_version": "1", "results": results, "errors": errors, "identities": marks})

    return router


def turns_of(samples: Sequence[Sample], model: ServedModel) -> Images:
    """Return text and image of each sample's last turn, for a reward of edits with the images of the turns before."""
    before = [[turn.image_b64 for turn in sample.history[:-1] if turn.image_b64] for sample in samples]
    last = [sample.history[-1] for sample in samples]
    sources = before if model.accepted.sources[1] and any(before) else ()
    return images_of([turn.text for turn in last], [turn.image_b64 or "" for turn in last], sources)
