"""Routes that take raw prompts with latents: clean latents of images, and the noisy states of trajectories.

The server encodes the prompts with the reward's own text encoders, and keeps encoded prompts for later requests. A
body is a safetensors file. The prompts stand in its ``__metadata__``: ``prompt`` is a text for all rows, ``prompts`` a
JSON list with a text for each row. ``POST /v1/score_latents`` takes

===========  ============================================  ==================================================
``latents``  ``(B, C, h, w)`` or ``(B, C, T, h, w)``       clean and scaled; float32, float16 or bfloat16
``u``        ``(B,)`` float32                              optional: noise level in [0, 1]; without it the reward's
                                                           own levels and seeds are used
``seeds``    ``(B,)`` int64                                optional, with ``u`` only: seed of the noise
===========  ============================================  ==================================================

``POST /v1/score_states`` takes N trajectories of S states, to which no noise is added:

=============  ==========================================  ==================================================
``latents``    ``(N, S, C, h, w)`` or with T before h      noisy and scaled; as above
``timesteps``  ``(S,)`` or ``(N, S)``, float32 or int64    of the reward's noise process; in flow matching 1000
                                                           times the noise level
=============  ==========================================  ==================================================
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise import NoiseProcess
from latentreward.serving.batch_scorer import PromptedRow, StateRow
from latentreward.serving.errors import RequestError
from latentreward.serving.json_bodies import PROMPT_LENGTH
from latentreward.serving.protocol import LARGER_QUEUE, Accepted, check_levels, check_limit, fewer_rows
from latentreward.serving.routes import BINARY, NUMBERS, SAFETENSORS, TEXT, Route, check_type, fields, listed
from latentreward.serving.served import Scores, ServedModel
from latentreward.serving.service import ScoringService
from latentreward.serving.tensor_bytes import Entry, Expected, read_described, read_floats, read_tensor

HEADER_BYTES = 2**20
"""Greatest length of a safetensors header with prompts, in bytes."""
FLOAT32_BYTES = 2
"""Bytes of parsed rows per byte of a body, at most: latents of half precision become float32."""
Rows = TypeVar("Rows", list[PromptedRow], list[StateRow])


class PromptedLatents:
    """Handlers of the routes.

    Args:
        service: Service that scores.
    """

    def __init__(self, service: ScoringService) -> None:
        self.service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        axes = {"fidelity": NUMBERS, "aesthetics": NUMBERS}
        axes_of_states = {name: listed(numbers) for name, numbers in axes.items()}
        return [
            Route(
                "POST",
                "/v1/score_latents",
                self.score_latents,
                "Score clean latents for raw prompts, which the server encodes",
                {SAFETENSORS: BINARY},
                fields(scores=NUMBERS, noise=TEXT, model=TEXT, **axes),
                of_reward=True,
            ),
            Route(
                "POST",
                "/v1/score_states",
                self.score_states,
                "Score the noisy states of trajectories at their timesteps, for raw prompts",
                {SAFETENSORS: BINARY},
                fields(scores=listed(NUMBERS), model=TEXT, **axes_of_states),
                of_reward=True,
            ),
        ]

    async def score_latents(self, request: Request) -> JSONResponse:
        """Score clean latents."""
        model = self.service.model_of(request)

        def parse(body: bytearray) -> list[PromptedRow]:
            return parse_latents(body, model.accepted, model.seeds)

        rows, scores = await self._scored(request, model, parse)
        totals, axes = model.columns(scores)
        noise = str(model.reward.noise) if rows[0].u is None else "u"
        return JSONResponse({"scores": totals, **axes, "noise": noise, "model": model.reward.identity})

    async def score_states(self, request: Request) -> JSONResponse:
        """Score the states of trajectories."""
        model, steps = self.service.model_of(request), 1

        def parse(body: bytearray) -> list[StateRow]:
            nonlocal steps
            rows, steps = parse_states(body, model.accepted, model.reward.backbone.noise_process, model.settings.queue)
            return rows

        _, scores = await self._scored(request, model, parse)
        totals, axes = model.columns(scores)
        by_trajectory = {name: _parted(numbers, steps) for name, numbers in {"scores": totals, **axes}.items()}
        return JSONResponse({**by_trajectory, "model": model.reward.identity})

    async def _scored(
        self, request: Request, model: ServedModel, parse: Callable[[bytearray], Rows]
    ) -> tuple[Rows, list[Scores]]:
        """Read the body of a request, and return its rows and their scores."""
        check_type(request, SAFETENSORS)
        resources = self.service.resources
        async with resources.bodies.read(request) as body:
            with resources.memory.hold(FLOAT32_BYTES * len(body), len(body)):
                rows = await asyncio.to_thread(parse, body)
                return rows, await model.score(request, rows)


def parse_latents(body: bytes | bytearray, accepted: Accepted, seeds: Iterator[int]) -> list[PromptedRow]:
    """Parse the safetensors body of a request of ``/v1/score_latents`` into rows to score.

    Requests with ``u`` and without ``seeds`` take a seed per row from ``seeds``.

    Raises:
        RequestError: If the bytes are no such body, or do not fit the model.
    """
    expected = {
        "latents": Expected(("B C h w" if accepted.frames is None else "B C T h w",)),
        "u": Expected(("B",), ("F32",), required=False),
        "seeds": Expected(("B",), ("I64",), required=False),
    }
    entries, data, texts = read_described(body, expected, HEADER_BYTES)
    count, *shape = entries["latents"].shape
    accepted.check_latents(shape)
    check_limit("latents: rows", count, accepted.max_rows, fewer_rows(accepted.max_rows))
    for name, entry in entries.items():
        if entry.shape[0] != count:
            raise RequestError(f"{name} has {entry.shape[0]} rows, but latents has {count}; give one row each", 422)
    if "seeds" in entries and "u" not in entries:
        raise RequestError("seeds are given without u; give the noise level u too, or neither", 422)
    prompts = read_prompts(texts, count)
    latents = read_floats("latents", entries["latents"], data)
    if "u" not in entries:
        return [PromptedRow(prompt, row) for prompt, row in zip(prompts, latents, strict=True)]
    u = read_floats("u", entries["u"], data)
    check_levels(u)
    used = read_tensor(entries["seeds"], data).tolist() if "seeds" in entries else islice(seeds, count)
    return [PromptedRow(*row) for row in zip(prompts, latents, u.tolist(), used, strict=True)]


def parse_states(
    body: bytes | bytearray, accepted: Accepted, process: NoiseProcess, most: int
) -> tuple[list[StateRow], int]:
    """Parse the body of a request of ``/v1/score_states`` into N · S rows, trajectory by trajectory; return S too.

    Raises:
        RequestError: If the bytes are no such body, or do not fit the model.
    """
    expected = {
        "latents": Expected(("N S C h w" if accepted.frames is None else "N S C T h w",)),
        "timesteps": Expected(("S", "N S"), ("F32", "I64")),
    }
    entries, data, texts = read_described(body, expected, HEADER_BYTES)
    count, steps, *shape = entries["latents"].shape
    accepted.check_latents(shape)
    check_limit("latents: N · S", count * steps, most, LARGER_QUEUE)
    if entries["timesteps"].shape not in ((steps,), (count, steps)):
        found = entries["timesteps"].shape
        raise RequestError(
            f"timesteps have the shape {found} for {count} trajectories of {steps} states; give ({steps},) for all, or "
            f"({count}, {steps}); send trajectories of other lengths or shapes as requests of their own",
            422,
        )
    times = read_timesteps(entries["timesteps"], data, process).expand(count, steps)
    prompts = read_prompts(texts, count)
    latents = read_floats("latents", entries["latents"], data)
    rows = [
        StateRow(prompt, state, timestep)
        for prompt, states, timesteps in zip(prompts, latents, times.tolist(), strict=True)
        for state, timestep in zip(states, timesteps, strict=True)
    ]
    return rows, steps


def read_timesteps(entry: Entry, data: memoryview, process: NoiseProcess) -> Tensor:
    """Read timesteps; raise RequestError with status 422 if one lies outside the noise process."""
    times = read_floats("timesteps", entry, data)
    try:
        process.sigma(times.flatten())
    except InputError as error:
        raise RequestError(f"timesteps: {error}", 422) from error
    return times


def read_prompts(texts: Mapping[str, str], count: int) -> list[str]:
    """Read the prompts of ``count`` rows from the ``__metadata__`` of a body.

    Raises:
        RequestError: If neither or both of ``prompt`` and ``prompts`` are given, the list is none or of another length,
            or a prompt is too long or no text of Unicode.
    """
    unknown = [name for name in texts if name not in ("prompt", "prompts", "format")]
    if unknown:
        raise RequestError(f"__metadata__ holds {unknown[0][:40]!r}; give prompt or prompts")
    if ("prompt" in texts) == ("prompts" in texts):
        raise RequestError("give __metadata__ one of prompt, a text for all rows, and prompts, a JSON list of texts")
    prompts = [texts["prompt"]] * count if "prompt" in texts else _listed(texts["prompts"])
    if len(prompts) != count:
        raise RequestError(f"{len(prompts)} prompts for {count} rows of latents; give one each", 422)
    for number, prompt in enumerate(prompts):
        if len(prompt) > PROMPT_LENGTH:
            raise RequestError(f"prompt {number} has {len(prompt)} characters; at most {PROMPT_LENGTH} are taken", 422)
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise RequestError(f"prompt {number} holds half a character; send UTF-8", 422)
    return prompts


def _listed(text: str) -> list[str]:
    try:
        prompts: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"prompts in __metadata__ cannot be read ({type(error).__name__}); give JSON") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("prompts in __metadata__ must be a JSON list of texts")
    return prompts


def _parted(numbers: list[float], size: int) -> list[list[float]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
