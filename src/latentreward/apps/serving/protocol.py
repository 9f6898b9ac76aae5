"""Version 1 of verl-omni's latent-reward protocol, ``POST /v1/score``.

Source: verl-omni's client, ``verl_omni/utils/reward_score/latent_http_scorer_client.py`` (Apache-2.0). A request is
a POST with the header ``x-drm-protocol-version: 1``, whose body is a safetensors file; docs/serve.md has its tensors,
and which model takes which. The reply is ``{"protocol_version": "1", "raw_scores": [...]}``. verl-omni's client sends
one row; the server accepts several.

The noise of a row depends on its seed, its noise level, the shape of its latents and the prompt in the header
``x-prompt``, not on other rows. The header is optional, and verl-omni's client does not send it; without it the prompt
is empty. It holds the prompt of all rows, as base64 of UTF-8. With it, a row gets the same noise as from
:meth:`RewardModel.score` for this prompt.
"""

import asyncio
import base64
from collections.abc import Iterable, Sequence
from itertools import islice, repeat

from fastapi import Request
from fastapi.responses import JSONResponse
from torch import Tensor

from latentreward.apps.serving.batch_scorer import LatentRow
from latentreward.apps.serving.bodies import SAFETENSORS
from latentreward.apps.serving.dialects.base import Dialect
from latentreward.apps.serving.refusals import RequestError, check_limit, fewer_rows
from latentreward.apps.serving.routes import Route, fields
from latentreward.apps.serving.tensors import Accepted, Expected, check_levels, read_tensors, safetensors_body
from latentreward.core.contracts import Conditioning

VERSION = "1"
VERSION_HEADER = "x-drm-protocol-version"
PROMPT_HEADER = "x-prompt"
PROMPT_HEADER_LENGTH = 12 * 1024
"""Greatest length of the header ``x-prompt``, in characters of base64; encodes 9 KiB of UTF-8."""


class VerlOmni(Dialect):
    """Handler of the route."""

    def routes(self) -> list[Route]:
        """Return the route."""
        headers = {
            VERSION_HEADER: f"version of the protocol, {VERSION}",
            PROMPT_HEADER: "prompt that the noise also depends on, as base64 of UTF-8; optional",
        }
        summary = "verl-omni's latent-reward protocol: score latents with prompt embeddings"
        answer = fields(protocol_version=str, raw_scores=list[float])
        return [Route("POST", "/v1/score", self.score, summary, {SAFETENSORS: bytes}, answer, headers, of_reward=True)]

    async def score(self, request: Request) -> JSONResponse:
        """Score latents with prompt embeddings."""
        model = self.service.model_of(request)
        check_version(request.headers.get(VERSION_HEADER))
        prompt = read_prompt(request.headers.getlist(PROMPT_HEADER))
        async with safetensors_body(request, model.resources) as body:
            rows = await asyncio.to_thread(parse_request, body, model.accepted, prompt, model.seeds)
            totals, axes = model.columns(await model.score(request, rows))
        return JSONResponse({"protocol_version": VERSION, "raw_scores": totals, **axes})


def check_version(version: str | None) -> None:
    """Raise RequestError if the protocol version of a request is missing or not :data:`VERSION`."""
    if version != VERSION:
        found = "missing" if version is None else repr(version[:20])
        raise RequestError(f"header {VERSION_HEADER} is {found}; this server speaks version {VERSION}")


def read_prompt(values: Sequence[str]) -> str:
    """Decode the prompt of a request from its headers ``x-prompt``; empty without the header.

    Raises:
        RequestError: If the header occurs more than once, is too long, or is not base64 of UTF-8.
    """
    if len(values) > 1:
        raise RequestError(f"header {PROMPT_HEADER} stands {len(values)} times; a request has one prompt")
    text = values[0] if values else ""
    if len(text) > PROMPT_HEADER_LENGTH:
        raise RequestError(f"header {PROMPT_HEADER} has {len(text)} characters; at most {PROMPT_HEADER_LENGTH} fit")
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError as error:
        raise RequestError(f"header {PROMPT_HEADER} is not base64 of UTF-8 text ({error}); encode it so") from error


def parse_request(
    body: bytes, accepted: Accepted, prompt: str = "", seeds: Iterable[int] = repeat(0)
) -> list[LatentRow]:
    """Parse the safetensors body of a request into rows to score, whose noise is drawn for ``prompt``.

    Requests without the tensor ``seeds`` take a seed per row from ``seeds``.

    Raises:
        RequestError: If the bytes do not follow the protocol, or do not fit the model. With status 413 if a limit of
            the server is exceeded.
    """
    if accepted.sees_empty:
        raise RequestError(
            "this reward's head needs the empty prompt as its text encoder reads it beside the pictures to edit, and "
            "embeddings come without pictures; send images and source_images to /v1/score_images",
            422,
        )
    pooled, masked, latent_axes = accepted.pooled_width is not None, accepted.masked, f"B {accepted.axes}"
    expected = {
        "latents": Expected((latent_axes,) if accepted.frames is None else ("B C h w", latent_axes)),
        "prompt_embeds": Expected(("B L D",)),
        "pooled_prompt_embeds": Expected(("B P",), required=pooled and not accepted.pools_tokens, taken=pooled),
        "prompt_mask": Expected(("B L",), ("BOOL", "U8"), required=masked, taken=masked or accepted.pools_tokens),
        "u": Expected(("B",), ("F32",)),
        "seeds": Expected(("B",), ("I64",), required=False),
        **accepted.expected_sources(),
    }
    tensors = read_tensors(body, expected, accepted.sizes)
    latents, embeds, u = tensors["latents"], tensors["prompt_embeds"], tensors["u"]
    count, tokens, _ = embeds.shape
    if accepted.frames is not None and latents.ndim == 4:
        raise RequestError(f"latents have 4 axes, but this model takes (B, C, T, h, w), T = {accepted.frames}", 422)
    accepted.check_sides(latents)
    check_limit("prompt_embeds: tokens", tokens, accepted.max_tokens, "shorten the prompts")
    check_limit("latents: rows", count, accepted.max_rows, fewer_rows(accepted.max_rows))
    check_levels(u)
    mask, vectors = tensors.get("prompt_mask"), tensors.get("pooled_prompt_embeds")
    if mask is not None:
        mask = _checked_mask(mask, tokens_first=masked)
    if vectors is None and accepted.pools_tokens:
        if mask is None:
            raise RequestError("pooled_prompt_embeds and prompt_mask are missing; give one of them")
        vectors = Conditioning(embeds, prompt_mask=mask).pooled()
    longest = int(mask.sum(dim=1).max()) if masked else tokens
    if longest > (accepted.max_prompt or longest):
        limit = f"{accepted.max_prompt}, the limit of this network"
        raise RequestError(f"prompt_embeds: a prompt of {longest} tokens is over {limit}", 422)
    columns = (embeds, vectors, mask if masked else None)
    parts = zip(*([None] * count if column is None else column.split(1) for column in columns), strict=True)
    encoded = [Conditioning(*part).trimmed() for part in parts]
    used = tensors["seeds"].tolist() if "seeds" in tensors else islice(seeds, count)
    rows = zip(latents, u.tolist(), used, encoded, accepted.sources_of_rows(tensors, count), strict=True)
    return [LatentRow(prompt, *row, sources=own) for *row, own in rows]


def _checked_mask(mask: Tensor, tokens_first: bool) -> Tensor:
    """Return a mask ``(B, L)`` of uint8 as bool.

    Raises:
        RequestError: If it holds other numbers than 0 and 1, a row without a 1, or a 1 after a 0 if ``tokens_first``.
    """
    if mask.max() > 1:
        raise RequestError(f"prompt_mask holds {mask.max().item()}; give 0 or 1", 422)
    used = mask.bool()
    late = (used[:, 1:] & ~used[:, :-1]).any(dim=1) | ~used[:, 0]
    if tokens_first and late.any():
        rule = "must begin with a 1 and hold no 1 after a 0; put the tokens of the prompt first"
        raise RequestError(f"prompt_mask: row {int(late.nonzero()[0])} {rule}", 422)
    if (empty := ~used.any(dim=1)).any():
        raise RequestError(f"prompt_mask: row {int(empty.nonzero()[0])} holds no 1; a prompt has tokens", 422)
    return used
