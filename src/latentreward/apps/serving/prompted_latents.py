"""Routes that take raw prompts with latents: clean latents of images, and the noisy states of trajectories.

The server encodes the prompts with the reward's own text encoders, and keeps encoded prompts for later requests. A
body is a safetensors file; docs/serve.md has its tensors. The prompts stand in its ``__metadata__``: ``prompt`` is a
text for all rows, ``prompts`` a JSON list with a text for each row.
"""

import asyncio
from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, Json
from torch import Tensor

from latentreward.apps.serving.batch_scorer import LatentRow, StateRow
from latentreward.apps.serving.bodies import SAFETENSORS
from latentreward.apps.serving.dialects.base import Dialect
from latentreward.apps.serving.json_bodies import PROMPT_LENGTH, parse_json
from latentreward.apps.serving.refusals import RequestError, check_limit, fewer_rows
from latentreward.apps.serving.routes import Route, fields
from latentreward.apps.serving.tensors import Accepted, Expected, check_levels, read_tensors, safetensors_body
from latentreward.core.errors import InputError
from latentreward.diffusion import NoiseProcess

HEADER_BYTES = 2**20  # greatest length of a safetensors header with prompts, in bytes
FORM = '{"__metadata__": {"prompt": TEXT for all rows or "prompts": JSON of [TEXT, ...]}}'
"""Prompts in a safetensors header, for messages."""


class Prompts(BaseModel, extra="forbid"):
    """Prompts of a request: one for all rows, or one for each."""

    prompt: str | None = None
    prompts: Json[list[str]] | None = None
    format: str | None = None


class Header(BaseModel):
    """Safetensors header with prompts."""

    texts: Prompts = Field(Prompts(), alias="__metadata__")


class PromptedLatents(Dialect):
    """Handlers of the routes."""

    def routes(self) -> list[Route]:
        """Return the routes."""
        bodies, one, many = {SAFETENSORS: bytes}, list[float], list[list[float]]
        latents = fields(scores=one, fidelity=one, aesthetics=one, noise=str, model=str)
        states = fields(scores=many, fidelity=many, aesthetics=many, model=str)
        about_latents = "Score clean latents for raw prompts, which the server encodes"
        about_states = "Score the noisy states of trajectories at their timesteps, for raw prompts"
        return [
            Route("POST", "/v1/score_latents", self.score_latents, about_latents, bodies, latents, of_reward=True),
            Route("POST", "/v1/score_states", self.score_states, about_states, bodies, states, of_reward=True),
        ]

    async def score_latents(self, request: Request) -> JSONResponse:
        """Score clean latents."""
        model = self.service.model_of(request)
        async with safetensors_body(request, model.resources) as body:
            rows = await asyncio.to_thread(parse_latents, body, model.accepted, model.seeds)
            totals, axes = model.columns(await model.score(request, rows))
        noise = str(model.reward.noise) if rows[0].u is None else "u"
        return JSONResponse({"scores": totals, **axes, "noise": noise, "model": model.reward.identity})

    async def score_states(self, request: Request) -> JSONResponse:
        """Score the states of trajectories."""
        model = self.service.model_of(request)
        process, most = model.reward.backbone.noise_process, model.settings.queue
        async with safetensors_body(request, model.resources) as body:
            rows, steps = await asyncio.to_thread(parse_states, body, model.accepted, process, most)
            totals, axes = model.columns(await model.score(request, rows))
        trajectories = range(0, len(rows), steps)
        parted = {
            name: [numbers[start : start + steps] for start in trajectories]
            for name, numbers in {"scores": totals, **axes}.items()
        }
        return JSONResponse({**parted, "model": model.reward.identity})


def parse_latents(body: bytes, accepted: Accepted, seeds: Iterator[int]) -> list[LatentRow]:
    """Parse the safetensors body of a request of ``/v1/score_latents`` into rows to score.

    Requests with ``u`` and without ``seeds`` take a seed per row from ``seeds``.

    Raises:
        RequestError: If the bytes are no such body, or do not fit the model.
    """
    expected = {
        "latents": Expected((f"B {accepted.axes}",)),
        "u": Expected(("B",), ("F32",), required=False),
        "seeds": Expected(("B",), ("I64",), required=False),
        **accepted.expected_sources(),
    }
    tensors = read_latents(body, expected, accepted)
    latents, u = tensors["latents"], tensors.get("u")
    count = len(latents)
    accepted.check_sides(latents)
    check_limit("latents: rows", count, accepted.max_rows, fewer_rows(accepted.max_rows))
    prompts, sources = read_prompts(body, count), accepted.sources_of_rows(tensors, count)
    if u is None:
        if "seeds" in tensors:
            raise RequestError("seeds are given without u; give the noise level u too, or neither", 422)
        return [LatentRow(*row, sources=own) for *row, own in zip(prompts, latents, sources, strict=True)]
    check_levels(u)
    used = tensors["seeds"].tolist() if "seeds" in tensors else islice(seeds, count)
    rows = zip(prompts, latents, u.tolist(), used, sources, strict=True)
    return [LatentRow(*row, sources=own) for *row, own in rows]


def parse_states(body: bytes, accepted: Accepted, process: NoiseProcess, most: int) -> tuple[list[StateRow], int]:
    """Parse the body of a request of ``/v1/score_states`` into N · S rows, trajectory by trajectory; return S too.

    Raises:
        RequestError: If the bytes are no such body, or do not fit the model.
    """
    expected = {
        "latents": Expected((f"N S {accepted.axes}",)),
        "timesteps": Expected(("S", "N S"), ("F32", "I64")),
        **accepted.expected_sources("N"),
    }
    tensors = read_latents(body, expected, accepted)
    latents = tensors["latents"]
    count, steps = latents.shape[:2]
    accepted.check_sides(latents)
    check_limit("latents: N · S", count * steps, most)
    timesteps = tensors["timesteps"].to(torch.float32)
    try:
        process.sigma(timesteps.flatten())
    except InputError as error:
        raise RequestError(f"timesteps: {error}", 422) from error
    of_trajectories = zip(read_prompts(body, count), accepted.sources_of_rows(tensors, count), strict=True)
    given = [own for own in of_trajectories for _ in range(steps)]
    times = timesteps.expand(count, steps).flatten().tolist()
    states = zip(given, latents.flatten(0, 1), times, strict=True)
    return [StateRow(prompt, state, time, sources=own) for (prompt, own), state, time in states], steps


def read_latents(body: bytes, expected: Mapping[str, Expected], accepted: Accepted) -> dict[str, Tensor]:
    """Read the tensors of a body with prompts, see :func:`read_tensors`.

    Raises:
        RequestError: As that function; with status 422 if the text encoder reads the pictures to edit.
    """
    if accepted.sees_sources:
        problem = "the text encoder of this reward reads the pictures that are edited, and latents are none"
        raise RequestError(f"{problem}; send images to /v1/score_images, or encoded prompts to /v1/score", 422)
    return read_tensors(body, expected, accepted.sizes, HEADER_BYTES)


def read_prompts(body: bytes, count: int) -> list[str]:
    """Read the prompts of ``count`` rows from the ``__metadata__`` of a safetensors body.

    Raises:
        RequestError: If neither or both of ``prompt`` and ``prompts`` are given, the list is none or of another length,
            or a prompt is too long.
    """
    texts = parse_json(body[8 : 8 + int.from_bytes(body[:8], "little")], Header, FORM).texts
    prompts = texts.prompts if texts.prompt is None else [texts.prompt] * count
    if prompts is None or None not in (texts.prompt, texts.prompts):
        raise RequestError("give __metadata__ one of prompt, a text for all rows, and prompts, a JSON list of texts")
    if len(prompts) != count:
        raise RequestError(f"{len(prompts)} prompts for {count} rows of latents; give one each", 422)
    for number, prompt in enumerate(prompts):
        if len(prompt) > PROMPT_LENGTH:
            raise RequestError(f"prompt {number} has {len(prompt)} characters; at most {PROMPT_LENGTH} are taken", 422)
    return prompts
