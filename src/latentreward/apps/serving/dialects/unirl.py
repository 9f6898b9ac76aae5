"""UniRL's reward service: ``GET /health`` and ``POST /score``, as its ``RemoteRewardBackend`` calls them.

Source: Tencent-Hunyuan/UniRL (Apache-2.0), ``unirl/reward/remote.py`` at 0e713d6, and
``unirl-reward-service/reward_service/schemas.py`` at cb03dcd with ``server.py`` at 287aec0; also the older client
without identities at 1a7b501. A request is

    {"protocol_version": "1", "requests": [{"history": [{"text": TEXT, "image_b64": BASE64}], "required_rewards":
    [NAME], "metadata": {...} or null, "request_id": ..., "sample_id": ..., ...}]}

and its reply

    {"protocol_version": "1", "results": [{NAME: {"score": NUMBER}}], "errors": [{NAME: TEXT}], "identities": [{...}]}

As with UniRL's own scorers of images, the last turn of a history is scored. A reward of edits takes the images of the
turns before it as the pictures that were edited, as UniRL's EditReward does; other rewards ignore them. A reward that
fails is reported in ``errors``; a reward without room is a 503 for the whole request, which the client sends again.
Videos, handles of tensors in GPU memory and gradients are refused. Unknown fields and ``metadata`` are ignored, as by
UniRL's server.
"""

import asyncio
from collections.abc import Container, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from latentreward.apps.serving.bodies import JSON
from latentreward.apps.serving.dialects.base import Dialect
from latentreward.apps.serving.images import EncodedImages, score_images_by_reward, with_sources
from latentreward.apps.serving.json_bodies import from_base64, read_json
from latentreward.apps.serving.refusals import RequestError, ScoringError, check_limit
from latentreward.apps.serving.routes import Route, fields
from latentreward.apps.serving.served import Scores, ServedModel

VERSION = "1"
TEXTS = 256
"""Greatest number of texts, and of signs between them, per sample; a sample without metadata has some 20 and 80."""
FORM = '{"requests": [{"history": [{"text": TEXT, "image_b64": BASE64}], "required_rewards": [NAME, ...]}]}'
"""JSON of a request, for messages."""
SCORE = "score"  # name of the first sub-metric, which UniRL's client takes by default


class Turn(BaseModel, strict=True):
    """Turn of a history: a text with an image."""

    text: str
    image_b64: str | None = None
    image_ipc: str | None = None
    video_b64: str | None = None
    video_path: str | None = None


class Identity(BaseModel, strict=True):
    """Marks of a sample, which the reply repeats."""

    request_id: str | None = None
    sample_id: str | None = None
    group_id: str | None = None
    source_rank: int | None = None
    policy_version: int | None = None
    scorer_version: str | None = None
    idempotency_key: str | None = None


class Sample(Identity, strict=True):
    """A history, and the rewards that are to score it."""

    history: list[Turn]
    required_rewards: list[str]
    metadata: dict[str, Any] | None = None


class ScoreRequest(BaseModel, strict=True):
    """Body of a request."""

    protocol_version: str = VERSION
    requests: list[Sample]
    grad_mode: bool = False
    call_id: str | None = None


class UniRL(Dialect):
    """Handlers of the routes."""

    def routes(self) -> list[Route]:
        """Return the routes; Flow-Factory's client asks for the same ``/health`` and reads its status only."""
        by_name, errors, identities = list[dict[str, dict[str, float]]], list[dict[str, str]], list[Identity]
        answer = fields(results=by_name, errors=errors, identities=identities, protocol_version=str)
        health = fields(status=str, rewards=dict[str, list[str]])
        about_health = "UniRL's and Flow-Factory's clients: health, rewards"
        summary = "UniRL's clients: score images for prompts with several rewards; pixels only"
        return [
            Route("GET", "/health", self.health, about_health, answer=health, of_reward=True),
            Route("POST", "/score", self.score, summary, {JSON: ScoreRequest}, answer),
        ]

    async def health(self, request: Request) -> JSONResponse:
        """Answer with the names of the rewards, and of the scores of each; 503 if one of them is not ready.

        Flow-Factory's client asks for ``/health`` below the address that it posts to, which may name a reward.
        """
        self.service.model_of(request)  # raises for the name of an unknown reward
        names = {name: [SCORE, *model.reward.axes] for name, model in self.service.models.items()}
        ready = self.service.ready
        return JSONResponse({"status": "ok" if ready else "busy", "rewards": names}, 200 if ready else 503)

    async def score(self, request: Request) -> JSONResponse:
        """Score the samples of a request."""
        samples: list[Sample] = []

        async def parse(body: bytes) -> dict[ServedModel, EncodedImages]:
            most = max(model.settings.queue for model in self.service.models.values())
            samples.extend(await asyncio.to_thread(parse_samples, body, most))
            wanted = {self.service.named(name): rows for name, rows in rewards_of(samples).items()}
            for model, rows in wanted.items():
                check_limit(f"requests: samples for {model.name}", len(rows), model.settings.queue)
            edits = {number for model, rows in wanted.items() if model.accepted.sources[1] for number in rows}
            images = await asyncio.to_thread(take_images, samples, edits)
            found = {}
            for model, rows in wanted.items():
                prompts, files = zip(*(images[number] for number in rows), strict=True)
                found[model] = EncodedImages(prompts if model.accepted.sources[1] else [*map(str, prompts)], files)
            return found

        outcomes = await score_images_by_reward(self.service.resources, request, {JSON: parse})
        return JSONResponse(reply(samples, outcomes))


def parse_samples(body: bytes, most: int) -> list[Sample]:
    """Parse a request into samples; raise RequestError if it is no such JSON, or asks for what is not served."""
    content = read_json(body, ScoreRequest, TEXTS * (most + 8), FORM)
    if content.protocol_version != VERSION:
        found = content.protocol_version[:20]
        raise RequestError(f"protocol_version is {found!r}; this server speaks version {VERSION}")
    if content.grad_mode:
        raise RequestError("grad_mode is true; this server gives no gradients", 422)
    check_limit("requests: samples", len(content.requests), most)
    for number, sample in enumerate(content.requests):
        if not sample.history:
            raise RequestError(f"requests.{number}.history is empty; give a turn with text and image_b64", 422)
        if sample.scorer_version is not None:
            raise RequestError(f"requests.{number}.scorer_version is set; this server pins no versions", 422)
        if not sample.required_rewards:
            raise RequestError(f"requests.{number}.required_rewards is empty; name a reward", 422)
        for turn in sample.history:
            other = [name for name in ("image_ipc", "video_b64", "video_path") if getattr(turn, name) is not None]
            if other:
                raise RequestError(f"requests.{number}: {other[0]} is given; this server scores image_b64 only", 422)
        if sample.history[-1].image_b64 is None:
            raise RequestError(f"requests.{number}: the last turn has no image_b64; give the image to score", 422)
    return content.requests


def rewards_of(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the numbers of the samples that each reward is to score, by its name."""
    rows: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        for name in dict.fromkeys(sample.required_rewards):
            rows.setdefault(name, []).append(number)
    return rows


def take_images(samples: Sequence[Sample], edits: Container[int] = ()) -> list[tuple[str, bytes]]:
    """Return text and image of each sample's last turn, and drop the long histories; images must be base64.

    The text carries the images of the turns before it in samples whose numbers are in ``edits``.
    """
    images = []
    for number, sample in enumerate(samples):
        name = f"requests.{number}: image_b64"
        *before, turn = sample.history
        given = [one.image_b64 for one in before if one.image_b64 is not None and number in edits]
        (prompt,) = with_sources([turn.text], [[from_base64(name, text) for text in given]])
        images.append((prompt, from_base64(name, turn.image_b64 or "")))
        sample.history = []
    return images


def reply(samples: Sequence[Sample], outcomes: Mapping[ServedModel, list[Scores] | ScoringError]) -> dict[str, Any]:
    """Return the reply to a request."""
    results: list[dict[str, dict[str, float]]] = [{} for _ in samples]
    errors: list[dict[str, str]] = [{} for _ in samples]
    rows = rewards_of(samples)
    for model, outcome in outcomes.items():
        for place, row in enumerate(rows[model.name]):
            if isinstance(outcome, ScoringError):
                errors[row][model.name] = " ".join(str(outcome).split())
            else:
                results[row][model.name] = dict(zip((SCORE, *model.reward.axes), outcome[place], strict=True))
    identities = [sample.model_dump(include=set(Identity.model_fields)) for sample in samples]
    return {"protocol_version": VERSION, "results": results, "errors": errors, "identities": identities}
