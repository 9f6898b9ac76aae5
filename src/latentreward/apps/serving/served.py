"""Rewards of a server: each a model on its device with its queue, its limits and its memory of encoded prompts."""

import asyncio
import math
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, repeat
from typing import Any

import torch
from fastapi import Request

from latentreward.apps.serving.batch_scorer import LatentRow, Row, RowScorer, Scores, standing
from latentreward.apps.serving.batching import MicroBatcher
from latentreward.apps.serving.refusals import ROWS, RequestError, ScoringError
from latentreward.apps.serving.resources import Resources
from latentreward.apps.serving.settings import ServiceSettings
from latentreward.apps.serving.tensors import Accepted
from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError, one_line
from latentreward.data.readers.json_rows import MOST_SOURCES
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import RewardModel
from latentreward.reward.scoring.scoring_noise import timesteps_of


class ServedModel:
    """A reward model that scores the rows of requests; rows of several requests share a forward pass.

    The constructor scores zeros once, so that a model that cannot score fails at the start of the server.

    ``resources`` are shared with the other rewards of the server, whose settings hold where ``settings`` is None.

    Raises:
        InputError: If the model cannot score, or gives more than one score per row.
    """

    def __init__(
        self, reward: RewardModel, resources: Resources, settings: ServiceSettings | None = None, name: str = "reward"
    ) -> None:
        self.reward, self.resources, self.name = reward, resources, name
        self.settings = settings = settings or resources.settings
        self.accepted = accepted_by(reward, settings)
        self.first_seed = secrets.randbits(62) if settings.fresh_noise else None
        # Of rows that come without a seed: first_seed, first_seed + 1, … under fresh_noise, else 0.
        self.seeds: Iterator[int] = repeat(0) if self.first_seed is None else count(self.first_seed)
        metrics = resources.metrics
        scorer = RowScorer(reward, settings.batch_size, settings.prompts_kept, partial(metrics.count_prompts, name))
        encoded = encode_empty(reward).trimmed().to("cpu", torch.float32)
        text, sources = replace(encoded, source_latents=()), tuple(one[0] for one in encoded.source_latents)
        prompt = edit_of_grey() if sources else ""
        scorer([LatentRow(prompt, torch.zeros(tried_shape(reward)), u=0.5, encoded=text, sources=sources)])
        self.batcher = MicroBatcher(
            scorer,
            settings.batch_size,
            settings.max_wait_ms / 1000,
            settings.queue,
            settings.max_pass_s,
            partial(metrics.count_pass, name),
            resources.turns(reward.device),
        )
        self._under_way = 0
        metrics.reward_queue_rows.labels(name).set_function(lambda: self.batcher.waiting)
        metrics.reward_requests_now.labels(name).set_function(lambda: self._under_way)

    @property
    def ready(self) -> bool:
        """Whether the batcher runs, and its current forward pass has taken less than the request timeout."""
        return self.batcher.running and self.batcher.busy_seconds < self.settings.timeout

    def require_room(self, rows: int) -> None:
        """Raise RequestError with status 503 if the reward has no room for a request of so many rows just now."""
        limit = self.settings.concurrency
        try:
            if limit is not None and self._under_way >= limit:
                raise RequestError(f"{limit} requests of the reward {self.name!r} are under way; try later", 503, 1)
            self.batcher.require_room(rows)
        except RequestError:
            self.resources.metrics.refused.labels(self.name).inc()
            raise

    async def score(self, request: Request, rows: Sequence[Row]) -> list[Scores]:
        """Score the rows of ``request``; rows still in the queue are dropped if the client disconnects.

        Raises:
            RequestError: With status 503 if the queue is full or too many requests of this reward are in progress, 504
                after the timeout, 499 if the client disconnected, 422 if the model cannot score the rows, 500 if the
                model failed.
        """

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        self.require_room(len(rows))
        self._under_way += 1
        client = request.client and request.client.host
        scoring = asyncio.ensure_future(self.batcher.score(rows, client))
        gone = asyncio.ensure_future(leaves())
        try:
            await asyncio.wait({scoring, gone}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if scoring.done():
                return _result(scoring)
            if gone.done():
                raise RequestError("the client left", 499)  # for the metrics alone
            raise RequestError(f"no score within {self.settings.timeout:g} seconds; send fewer rows, or try later", 504)
        except RequestError as error:
            if error.status == 503:
                self.resources.metrics.refused.labels(self.name).inc()
            raise
        finally:
            scoring.cancel()
            gone.cancel()
            self._under_way -= 1

    def columns(self, scores: Sequence[Scores]) -> tuple[list[float], dict[str, list[float]]]:
        """Return the scores of all rows, and those of each axis of a model with two by name."""
        totals, *axes = ([*column] for column in zip(*scores, strict=True))
        return totals, dict(zip(self.reward.axes, axes, strict=True))

    def describe(self) -> dict[str, Any]:
        """Describe the model and the server's limits, as values for JSON.

        ``prompt_mask``, ``pools_tokens``, ``frames`` and ``sources`` are there only for models that take more than SD
        and SD3 do.
        """
        accepted, backbone = self.accepted, self.reward.backbone
        more = {
            "prompt_mask": accepted.masked,
            "pools_tokens": accepted.pools_tokens,
            "frames": accepted.frames,
            "sources": [*accepted.sources] if accepted.sources[1] else None,
        }
        return {
            "model": self.reward.identity,
            "latent_space": backbone.latent_space.record(),
            "prompt_embeds_width": accepted.text_width,
            "pooled_prompt_embeds_width": accepted.pooled_width,
            **{name: value for name, value in more.items() if value},
            "noise": str(self.reward.noise),
            "u": backbone.noise_process.sigma(timesteps_of(self.reward.noise, backbone.noise_process)).tolist(),
            "fresh_noise": self.settings.fresh_noise,
            "calibrated": standing(self.reward, torch.zeros(1)) is not None,
            "batch_size": self.settings.batch_size,
            "max_body_bytes": self.settings.max_body,
            "max_latent_pixels": accepted.max_pixels,
            "max_rows": accepted.max_rows,
        }

    def limits(self) -> dict[str, Any]:
        """Describe the reward's device and limits, as values for JSON."""
        settings = self.settings
        return {
            "name": self.name,
            "model": self.reward.identity,
            "device": str(self.reward.device),
            "scores": ["score", *self.reward.axes],
            "batch_size": settings.batch_size,
            "queue": settings.queue,
            "concurrency": settings.concurrency,
            "passes_per_device": self.resources.settings.passes_per_device,
            "prompts_kept": settings.prompts_kept,
            "timeout": settings.timeout,
        }


class ScoringService:
    """Rewards of a server by name, with what they share; the first one scores requests that name none.

    Raises:
        InputError: If there is no reward, or two have the same name.
    """

    def __init__(self, models: Sequence[ServedModel], resources: Resources) -> None:
        self.resources = resources
        self.models = {model.name: model for model in models}
        if not models or len(self.models) < len(models):
            raise InputError(f"{len(models)} rewards with {len(self.models)} names; give at least one, each its own")
        self.settings = resources.settings
        resources.metrics.queue_rows.set_function(lambda: sum(model.batcher.waiting for model in models))

    @property
    def default(self) -> ServedModel:
        """Reward of requests that name none."""
        return next(iter(self.models.values()))

    @property
    def ready(self) -> bool:
        """Whether all rewards are ready."""
        return all(model.ready for model in self.models.values())

    def model_of(self, request: Request) -> ServedModel:
        """Return the reward that ``/rewards/NAME/…`` names, else the first; raise RequestError (404) if none."""
        return self.named(request.path_params.get("reward", self.default.name), 404)

    def named(self, name: str, status: int = 400) -> ServedModel:
        """Return the reward of a name; raise RequestError with ``status`` if there is no such reward."""
        if name not in self.models:
            known = ", ".join(self.models)[:200]
            raise RequestError(f"no reward {name[:40]!r} is served here; this server has {known}", status)
        return self.models[name]


def accepted_by(reward: RewardModel, settings: ServiceSettings) -> Accepted:
    """Determine the shapes that a model takes; the empty prompt is encoded to find the widths of embeddings."""
    backbone = reward.backbone
    empty = encode_empty(reward)
    clip = 1 if reward.image_sizes is None else reward.image_sizes.frames
    _, *time, _, _ = backbone.latent_space.shape(1, 1, clip)
    pooled, masked = empty.pooled_prompt_embeds, empty.prompt_mask is not None
    seen = backbone.text_encoder is not None and backbone.text_encoder.sees_sources
    return Accepted(
        channels=backbone.latent_space.channels,
        text_width=empty.prompt_embeds.shape[-1],
        pooled_width=None if pooled is None else pooled.shape[-1],
        patch=backbone.side_multiple // backbone.latent_space.downscale,
        max_side=backbone.max_side,
        max_prompt=backbone.max_prompt,
        tokens=empty.prompt_embeds.shape[1] if reward.head.needs_uncond and not masked else None,
        max_pixels=settings.max_latent_pixels or 4 * math.prod((*time, *tried_shape(reward)[-2:])),
        max_rows=min(ROWS, settings.queue),
        masked=masked,
        frames=time[0] if time else None,
        pools_tokens=backbone.text_encoder is not None and backbone.text_encoder.pools_tokens,
        sources=(backbone.sources[0], MOST_SOURCES if backbone.sources[1] is None else backbone.sources[1]),
        sees_sources=seen,
        sees_empty=seen and reward.head.needs_uncond,
    )


def encode_empty(reward: RewardModel) -> Conditioning:
    """Encode the empty prompt, and a grey picture to edit for a model that needs one."""
    scale = reward.backbone.latent_space.downscale
    reward.prompt_memory(1).resize_sources(*(side * scale for side in tried_shape(reward)[-2:]))
    return reward.backbone.encode_prompts([edit_of_grey() if reward.backbone.sources[0] else ""])


def own_shape(reward: RewardModel) -> tuple[int, ...]:
    """Return the shape ``(C, [T,] h, w)`` of latents of the network's native size."""
    space = reward.backbone.latent_space
    return space.shape(*(reward.backbone.native_size or (8 * space.downscale, 8 * space.downscale)))


def tried_shape(reward: RewardModel) -> tuple[int, ...]:
    """Return the shape ``(C, [T,] h, w)`` of latents at which a model is tried: of training, or the native one."""
    space, shape = reward.backbone.latent_space, own_shape(reward)
    if reward.image_sizes is None:
        return shape
    loader = reward.image_sizes.loader(*(side * space.downscale for side in shape[-2:]))
    return space.shape(loader.height, loader.width)


def _result(scoring: asyncio.Future[list[Scores]]) -> list[Scores]:
    try:
        scores = scoring.result()
    except RequestError:
        raise
    except InputError as error:
        raise ScoringError(one_line(error), 422) from error
    except Exception as error:
        print(f"latentreward serve: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
        raise ScoringError(f"the model failed ({type(error).__name__})", 500) from error
    if not all(map(math.isfinite, chain.from_iterable(scores))):
        raise ScoringError("the model gave a score that is not finite", 500)
    return scores
