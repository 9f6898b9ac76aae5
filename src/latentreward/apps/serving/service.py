"""Rewards of a server, each with its queue, and what they share: limits, memory, devices, metrics."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from latentreward.apps.serving import bodies
from latentreward.apps.serving.batching import Batcher, RequestError, Row, RowScorer, Scores
from latentreward.apps.serving.bodies import Accepted, ByteBudget, Images, Take
from latentreward.apps.serving.settings import ServiceSettings
from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError, one_line
from latentreward.data import ImageError
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import RewardModel
from latentreward.reward.scoring.scoring_noise import timesteps_of

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Bucket bounds of the histogram of answer times, in seconds."""
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # bucket bounds of the histogram of rows of a pass


class ScoringError(RequestError):
    """An error of a reward with rows that could be read; other rewards may score them."""


class ServedModel:
    """A reward model that scores the rows of requests.

    The constructor scores zeros once, so that a model that cannot score fails at the start of the server.
    """

    def __init__(self, name: str, reward: RewardModel, settings: ServiceSettings, device: asyncio.Lock) -> None:
        self.name, self.reward, self.settings = name, reward, settings
        self.accepted = Accepted.of(reward, settings)
        scorer = RowScorer(reward, settings.batch_size)
        empty = bodies.encode_empty(reward).trimmed().to("cpu", torch.float32)
        sources, text = tuple(one[0] for one in empty.source_latents), edit_of_grey() if empty.source_latents else ""
        empty = replace(empty, source_latents=())
        scorer([Row(text, latents=torch.zeros(bodies.tried_shape(reward)), u=0.5, encoded=empty, sources=sources)])
        wait, limit = settings.max_wait_ms / 1000, settings.timeout
        self.batcher = Batcher(scorer, settings.batch_size, wait, settings.queue, limit, device)
        self.task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether rows are scored, and the current pass has taken less than the request timeout."""
        running = self.task is not None and not self.task.done()
        return running and self.batcher.busy_seconds < self.settings.timeout

    async def score(self, request: Request, rows: Sequence[Row]) -> list[Scores]:
        """Score the rows of ``request``; rows still in the queue are dropped if the client disconnects."""

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        scoring, gone = asyncio.ensure_future(self.batcher.score(rows)), asyncio.ensure_future(leaves())
        seconds = self.settings.timeout
        try:
            await asyncio.wait({scoring, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not scoring.done():
                if gone.done():
                    raise RequestError("the client left", 499)  # for the metrics alone
                raise RequestError(f"no score within {seconds:g} seconds; send fewer rows, or try later", 504)
            return scoring.result()
        except RequestError:
            raise
        except InputError as error:
            raise ScoringError(str(error), 422) from error
        except Exception as error:
            print(f"latentreward serve: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
            raise ScoringError(f"the model failed ({type(error).__name__})", 500) from error
        finally:
            scoring.cancel()
            gone.cancel()

    def check_images(self, images: Images) -> None:
        """Raise RequestError if images have another number of sources than the reward takes, or there is no room."""
        for prompt, _ in images:
            self.accepted.check_sources(len(sources_of(prompt)))
        self.batcher.require_room(len(images))

    async def score_images(self, request: Request, images: Images, take: Take) -> list[Scores]:
        """Decode and score images; see :meth:`score`."""
        self.check_images(images)
        try:
            take(await asyncio.to_thread(bodies.pixel_bytes, images, self.settings.max_pixels))
            work = asyncio.to_thread(bodies.decode, images, self.reward.exif, self.settings)
            rows = await asyncio.wait_for(work, self.settings.timeout)
        except ImageError as error:
            raise RequestError(str(error).replace("max_pixels", "the server's --max_pixels"), 422) from error
        except TimeoutError as error:
            problem = f"images not decoded within {self.settings.timeout:g} seconds"
            raise RequestError(f"{problem}; send fewer", 504) from error
        return await self.score(request, rows)

    def columns(self, scores: Sequence[Scores]) -> dict[str, list[float]]:
        """Return the scores of all rows, and those of each axis of a model with two, by name."""
        names = ("scores", *self.reward.axes)
        return {name: [*column] for name, column in zip(names, zip(*scores, strict=True), strict=True)}

    def describe(self) -> dict[str, Any]:
        """Describe the model and the server's limits as values for JSON."""
        accepted, backbone, limits = self.accepted, self.reward.backbone, self.settings
        return {
            "name": self.name,
            "model": self.reward.identity,
            "device": str(self.reward.device),
            "scores": ["score", *self.reward.axes],
            "latent_space": backbone.latent_space.record(),
            "prompt_embeds_width": accepted.text_width,
            "pooled_prompt_embeds_width": accepted.pooled_width,
            "prompt_mask": accepted.masked,
            "pools_tokens": accepted.pools_tokens,
            "frames": accepted.frames,
            "sources": [*accepted.sources],
            "noise": str(self.reward.noise),
            "u": backbone.noise_process.sigma(timesteps_of(self.reward.noise, backbone.noise_process)).tolist(),
            **{name: getattr(limits, name) for name in ("batch_size", "queue", "timeout")},
            "max_body_bytes": limits.max_body,
            "max_latent_pixels": accepted.max_latent_pixels,
            "max_rows": accepted.max_rows,
        }


class ScoringService:
    """Rewards of a server by name; the first one scores requests that name none."""

    def __init__(self, rewards: Mapping[str, RewardModel], settings: ServiceSettings) -> None:
        self.settings, self.memory, self.registry = settings, ByteBudget(16 * settings.max_body), CollectorRegistry()
        about = {"namespace": "latentreward", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **about)
        self.seconds = Histogram("request_seconds", "Seconds to an answer.", ["path"], buckets=SECONDS, **about)
        passes = Histogram("batch_rows", "Rows of a pass of a reward.", ["reward"], buckets=ROW_BUCKETS, **about)
        waiting = Gauge("queue_rows", "Rows that wait for a reward.", ["reward"], **about)
        devices = {reward.device: asyncio.Lock() for reward in rewards.values()}
        self.models = {
            name: ServedModel(name, reward, settings, devices[reward.device]) for name, reward in rewards.items()
        }
        for name, model in self.models.items():
            model.batcher.observe = passes.labels(name).observe
            waiting.labels(name).set_function(model.batcher.count)

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
