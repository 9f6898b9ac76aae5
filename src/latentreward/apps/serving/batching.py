"""Rows of requests, collected into passes of the model while it is busy."""

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import Conditioning, sources_of
from latentreward.core.errors import InputError, printable
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring.scoring_noise import draw_noise, timesteps_of

PROMPTS_KEPT = 128  # encoded prompts that a reward keeps for later requests; one of SD3 takes 5 MB
TOKENS = 64  # number of which the length of padded prompts is a multiple
Scores = tuple[float, ...]  # score of a row and, of a model with two axes, fidelity and aesthetics after it


class RequestError(InputError):
    """An error answered as ``{"error": message}`` with an HTTP status, and perhaps the header ``Retry-After``."""

    def __init__(self, message: str, status: int = 400, retry_after: int | None = None) -> None:
        self.detail = printable(" ".join(message.split()))  # it may repeat what a stranger sent
        self.status_code, self.headers = status, None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(self.detail)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a request: an image, clean latents, or a noisy state; tensors are float32 and scaled."""

    prompt: str  # raw text; an EditPrompt if an image is an edit of pictures
    image: Image.Image | None = None  # 8-bit RGB
    latents: Tensor | None = None  # ``(C, h, w)`` or ``(C, T, h, w)``, clean, or a state if there is a timestep
    timestep: float | None = None  # of the model's noise process
    u: float | None = None  # noise level in [0, 1] of clean latents; None takes the model's own levels and seeds
    seed: int = 0  # seed of the noise at ``u``, which also depends on the raw prompt
    encoded: Conditioning | None = None  # prompt as the network gets it, one row; None if the model encodes it
    sources: tuple[Tensor, ...] = ()  # latents ``(C, h, w)`` or ``(C, T, h, w)`` of the pictures that were edited

    @property
    def tokens(self) -> int | None:
        """Number of tokens in a pass, which for a prompt with a mask does not depend on the other rows."""
        if self.encoded is None:
            return None
        count = self.encoded.prompt_embeds.shape[1]
        return count if self.encoded.prompt_mask is None else -(-count // TOKENS) * TOKENS

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a pass: kind, shapes, and noise level."""
        shapes = *(one.shape for one in self.sources), None if self.latents is None else self.latents.shape
        masked = self.encoded is not None and self.encoded.prompt_mask is not None
        return self.timestep is None, len(sources_of(self.prompt)), shapes, self.tokens, masked, self.u


class RowScorer:
    """Scorer of rows of one group, which keeps encoded prompts; the score of a row does not depend on the others."""

    def __init__(self, reward: RewardModel, batch_size: int) -> None:
        self.reward, self.batch_size = reward, batch_size
        self._memory = reward.prompt_memory(max(PROMPTS_KEPT, batch_size))

    def __call__(self, rows: Sequence[Row]) -> list[Scores]:
        """Score rows; InputError if the model gives several scores for a row, or one is not finite."""
        with torch.inference_mode():
            outputs = self._score(rows).float().cpu()
        scores = self.reward.head.total(outputs)
        if scores.ndim != 1:
            raise InputError(f"the model gives {scores.shape[1]} scores for each image; serve a model that gives one")
        columns = [scores, *(outputs.unbind(dim=1) if self.reward.axes else ())]
        return [*zip(*(column.tolist() for column in columns), strict=True)]

    def _score(self, rows: Sequence[Any]) -> Tensor:
        prompts, first = [row.prompt for row in rows], rows[0]
        options: dict[str, Any] = {"batch_size": self.batch_size, "axes": bool(self.reward.axes)}
        if first.image is not None:
            return self.reward.score(prompts, [row.image for row in rows], memory=self._memory, **options)
        if first.encoded is not None:
            parts = [row.encoded if row.encoded.prompt_mask is None else row.encoded.padded(row.tokens) for row in rows]
            conditioning = Conditioning.join(parts)
        else:
            scale = self.reward.backbone.latent_space.downscale
            self._memory.resize_sources(*(side * scale for side in first.latents.shape[-2:]))
            conditioning = self._memory.encode(prompts)
        device = conditioning.prompt_embeds.device
        sources = (torch.stack(place).to(device) for place in zip(*(row.sources for row in rows), strict=True))
        conditioning = replace(conditioning, source_latents=tuple(sources))
        latents = torch.stack([row.latents for row in rows])
        options["conditioning"] = conditioning, self._memory.encode_uncond(prompts)
        if first.timestep is not None:
            timesteps = torch.tensor([[row.timestep] for row in rows])
            return self.reward.score_states(prompts, latents[:, None], timesteps, **options)[:, 0]
        if first.u is None:
            return self.reward.score_latents(prompts, latents, noise=self.reward.noise, **options)
        noise, process = ScoringNoise(sigmas=(first.u,)), self.reward.backbone.noise_process
        sigma = process.sigma(timesteps_of(noise, process)).item()
        draws = torch.cat([draw_noise([row.prompt], row.seed, sigma, row.latents.shape) for row in rows])
        return self.reward.score_latents(prompts, latents, noise=noise, draws=draws, **options)


@dataclass(frozen=True, eq=False)
class _Waiting:
    row: Row
    turn: int
    future: asyncio.Future[Scores]


class Batcher:
    """Bounded queue of rows, from which one thread scores passes of rows of one group.

    A pass starts when the thread is free; if too few rows wait to fill it, ``max_wait`` seconds later. Requests take
    turns: in each turn a request may score one pass of rows, so that a short request waits for one pass of each long
    one at most (start-time fair queueing). If a pass fails, its rows are scored one by one, so that only the bad ones
    fail.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Row]], Sequence[Scores]],  # of up to batch_size rows of a group, in the thread
        batch_size: int,
        max_wait: float,
        queue: int,  # greatest number of waiting rows
        timeout: float,  # seconds that a request may wait for others
        device: asyncio.Lock,  # held during a pass, shared with other rewards of the device
    ) -> None:
        self.batch_size, self.max_wait, self.queue, self.timeout = batch_size, max_wait, queue, timeout
        self._score, self.device = score, device
        self.observe: Callable[[int], None] = lambda size: None  # called with the number of rows of each pass
        self.waiting: list[_Waiting] = []
        self._turn, self._seconds_per_row = 0, 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._arrived = asyncio.Event()
        self._busy_since: float | None = None

    @property
    def busy_seconds(self) -> float:
        """Seconds since the current pass started; 0 if the thread is free."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def count(self) -> int:
        """Return the number of waiting rows."""
        return len(self.waiting)

    def require_room(self, rows: int) -> None:
        """Raise RequestError (503) if the queue has no room for so many rows, or they would wait too long for it."""
        ahead = sum(one.turn <= self._turn + (rows - 1) // self.batch_size for one in self.waiting)
        wait, every = ahead * self._seconds_per_row, len(self.waiting) * self._seconds_per_row
        if len(self.waiting) + rows > self.queue:
            problem = f"{len(self.waiting)} of {self.queue} places in the queue are taken"
            raise RequestError(f"{problem}; try later", 503, max(1, math.ceil(every)))
        if wait > self.timeout:
            problem = f"{ahead} rows are ahead, which take some {wait:.0f} seconds, longer than the timeout"
            raise RequestError(f"{problem}; try later", 503, math.ceil(wait - self.timeout))

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Score the rows of one request, or raise the model's error; cancelling the call drops rows that still wait."""
        self.require_room(len(rows))
        loop, turn = asyncio.get_running_loop(), self._turn
        added = [_Waiting(row, turn + n // self.batch_size, loop.create_future()) for n, row in enumerate(rows)]
        self.waiting += added
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(one.future for one in added)))
        finally:
            for one in added:
                one.future.cancel()
            self.waiting = [one for one in self.waiting if not one.future.done()]

    async def run(self) -> None:
        """Score what waits, until cancelled; then the current pass ends."""
        try:
            while True:
                await self._arrived.wait()
                if len(self.waiting) < self.batch_size:
                    await asyncio.sleep(self.max_wait)
                async with self.device:  # rows are chosen now: clients may have come or left meanwhile
                    await self._pass()
                if not self.waiting:
                    self._arrived.clear()
        finally:
            await asyncio.to_thread(self._thread.shutdown)

    async def _pass(self) -> None:
        if not self.waiting:
            return
        order = sorted(self.waiting, key=lambda one: one.turn)  # of equal turns the oldest comes first
        group, self._turn = order[0].row.group, order[0].turn
        taken = [one for one in order if one.row.group == group][: self.batch_size]
        chosen = {*map(id, taken)}
        self.waiting = [one for one in self.waiting if id(one) not in chosen]
        self.observe(len(taken))
        self._busy_since = time.monotonic()
        loop, rows = asyncio.get_running_loop(), [one.row for one in taken]
        results = await loop.run_in_executor(self._thread, self._results, rows)
        # A slow first pass, which loads kernels, counts less and less.
        self._seconds_per_row += 0.3 * (self.busy_seconds / len(rows) - self._seconds_per_row)
        self._busy_since = None
        for one, result in zip(taken, results, strict=True):
            if not one.future.done():  # its request was cancelled
                (one.future.set_exception if isinstance(result, Exception) else one.future.set_result)(result)

    def _results(self, rows: Sequence[Row]) -> Sequence[Scores | Exception]:
        try:
            return self._score(rows)
        except Exception as error:
            return [error] if len(rows) == 1 else [self._results([row])[0] for row in rows]
