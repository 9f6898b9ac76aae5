"""Version 1 of verl-omni's latent-reward protocol: parsing of requests, and checks against the served model.

Source: verl-omni's client, ``verl_omni/utils/reward_score/latent_http_scorer_client.py`` (Apache-2.0). A request is
a POST with the header ``x-drm-protocol-version: 1``. Its body is a safetensors file with the tensors

==========================  =================  ====================================================
``latents``                 ``(B, C, h, w)``   clean and scaled; float32, float16 or bfloat16
``prompt_embeds``           ``(B, L, D)``      float32, float16 or bfloat16
``pooled_prompt_embeds``    ``(B, P)``         float32, float16 or bfloat16; see below
``prompt_mask``             ``(B, L)``         bool, or uint8 of 0 and 1; see below
``u``                       ``(B,)`` float32   noise level in [0, 1]; the nearest of the model is used
``seeds``                   ``(B,)`` int64     optional; seed of the noise
==========================  =================  ====================================================

and the reply is ``{"protocol_version": "1", "raw_scores": [...]}``. verl-omni's client sends one row; the server
accepts several.

The served model decides on some tensors. ``pooled_prompt_embeds`` must be given if its text encoder has a pooled
vector, and ``prompt_mask`` if its prompts have unequal numbers of tokens; otherwise they must be left out. The mask is
1 for the tokens of a row's prompt, which come first, and 0 for padding, which has no effect on the score. For a model
whose pooled vector is the mean of the tokens (FLUX.2-klein) one of the two must be given. ``latents``
are ``(B, C, T, h, w)`` if the model's latent space has a time axis, with the T that the model was trained on: 1 for
images.

The noise of a row depends on its seed, its noise level, the shape of its latents and the prompt in the header
``x-prompt``, not on other rows. The header is optional, and verl-omni's client does not send it; without it the prompt
is empty. It holds the prompt of all rows, as base64 of UTF-8. With it, a row gets the same noise as from
:meth:`RewardModel.score` for this prompt.
"""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import torch
from torch import Tensor

from latentreward.contracts import Conditioning
from latentreward.serving.batch_scorer import LatentRow
from latentreward.serving.errors import RequestError
from latentreward.serving.tensor_bytes import Expected, read_floats, read_header, read_tensor

VERSION = "1"
VERSION_HEADER = "x-drm-protocol-version"
PROMPT_HEADER = "x-prompt"
PROMPT_HEADER_LENGTH = 12 * 1024
"""Greatest length of the header ``x-prompt``, in characters of base64; encodes 9 KiB of UTF-8."""
ROWS = 64
"""Greatest number of rows of a request, if the queue is not shorter."""
LARGER_QUEUE = "send several requests, or raise the server's --queue"
"""Remedy of requests with more rows than the queue."""
DEFAULT_SEED = 0
"""Seed of the noise of requests without ``seeds``, unless the server has ``fresh_noise`` set."""


@dataclass(frozen=True)
class Accepted:
    """Shapes of latents and embeddings that a server accepts.

    Attributes:
        channels: Number of latent channels C.
        text_width: Width D of a token's embedding.
        pooled_width: Width P of the pooled embedding; None if the model takes none.
        patch: Number that the sides of latents must be multiples of, in latent pixels.
        max_side: Longest side of latents, in latent pixels; None if the network has no limit.
        max_prompt: Largest number of tokens of a prompt; None if the network has no limit.
        tokens: Number of tokens L if it is fixed, as for heads that compare with the empty prompt; else None.
        max_pixels: Largest h · w of latents, or T · h · w with a time axis.
        max_tokens: Largest L.
        max_rows: Largest B.
        masked: Whether prompts have unequal numbers of tokens, told by a mask.
        frames: Number of latent frames T; None if latents have no time axis.
        pools_tokens: Whether the pooled vector may be left out, and is the mean of the tokens in the mask then.
    """

    channels: int
    text_width: int
    pooled_width: int | None
    patch: int = 1
    max_side: int | None = None
    max_prompt: int | None = None
    tokens: int | None = None
    max_pixels: int = 128 * 128
    max_tokens: int = 1024
    max_rows: int = ROWS
    masked: bool = False
    frames: int | None = None
    pools_tokens: bool = False

    @property
    def tensors(self) -> dict[str, Expected]:
        """Requirements on each tensor of a request, by its name in the protocol."""
        pooled = self.pooled_width is not None
        return {
            "latents": Expected(("B C h w",) if self.frames is None else ("B C h w", "B C T h w")),
            "prompt_embeds": Expected(("B L D",)),
            "pooled_prompt_embeds": Expected(("B P",), required=pooled and not self.pools_tokens, taken=pooled),
            "prompt_mask": Expected(
                ("B L",), ("BOOL", "U8"), required=self.masked, taken=self.masked or self.pools_tokens
            ),
            "u": Expected(("B",), ("F32",)),
            "seeds": Expected(("B",), ("I64",), required=False),
        }

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check the shapes of a request's tensors.

        Raises:
            RequestError: With status 413 if a limit of the server is exceeded; with status 422 if a shape does not fit
                the model or the other tensors.
        """
        rows, *latents = shapes["latents"]
        _, tokens, text_width = shapes["prompt_embeds"]
        without = (rows, self.pooled_width if self.pools_tokens else None)
        if self.frames is not None and len(latents) < 4:
            raise RequestError(f"latents have 4 axes, but this model takes (B, C, T, h, w), T = {self.frames}", 422)
        for name, shape in shapes.items():
            if shape[0] != rows:
                raise RequestError(f"{name} has {shape[0]} rows, but latents has {rows}; give one row each", 422)
        self._check_space(latents)
        _check_fit("prompt_embeds: width", text_width, self.text_width)
        _check_fit("pooled_prompt_embeds: width", shapes.get("pooled_prompt_embeds", without)[1], self.pooled_width)
        _check_fit("prompt_embeds: tokens", tokens, self.tokens or tokens)
        if shapes.get("prompt_mask", (rows, tokens))[1] != tokens:
            found = shapes["prompt_mask"][1]
            raise RequestError(f"prompt_mask has {found} tokens, but prompt_embeds has {tokens}; give one each", 422)
        self._check_sides(latents)
        check_limit("prompt_embeds: tokens", tokens, self.max_tokens, "shorten the prompts")
        check_limit("latents: rows", rows, self.max_rows, fewer_rows(self.max_rows))

    def check_latents(self, shape: Sequence[int]) -> None:
        """Check the shape ``(C, h, w)`` or ``(C, T, h, w)`` of an image's latents; raises as :meth:`check`."""
        self._check_space(shape)
        self._check_sides(shape)

    def _check_space(self, latents: Sequence[int]) -> None:
        channels, *time, _, _ = latents
        _check_fit("latents: channels", channels, self.channels)
        _check_fit("latents: T", time[0] if time else None, self.frames)

    def _check_sides(self, latents: Sequence[int]) -> None:
        _, *time, height, width = latents
        if height % self.patch or width % self.patch:
            raise RequestError(f"latents of {height} × {width} must have sides divisible by {self.patch}", 422)
        if max(height, width) > (self.max_side or max(height, width)):
            raise RequestError(
                f"latents of {height} × {width} have a side over {self.max_side}, the limit of this network", 422
            )
        name = "latents: T · h · w" if time else "latents: h · w"
        smaller = "send smaller latents, or raise the server's --max_latent_pixels"
        check_limit(name, math.prod((*time, height, width)), self.max_pixels, smaller)


def _check_fit(name: str, found: int | None, wanted: int | None) -> None:
    if found != wanted:
        raise RequestError(f"{name} {found} does not fit this model, which takes {wanted}", 422)


def check_limit(name: str, found: int, most: int, remedy: str) -> None:
    """Raise RequestError with status 413 and a remedy if ``found`` is over a limit of the server."""
    if found > most:
        raise RequestError(f"{name} {found} is over this server's limit of {most}; {remedy}", 413)


def fewer_rows(most: int) -> str:
    """Return the remedy of a request with more rows than ``most``, which is :data:`ROWS` or a shorter queue."""
    return LARGER_QUEUE if most < ROWS else "send several requests"


def check_version(version: str | None) -> None:
    """Check the protocol version of a request.

    Raises:
        RequestError: If ``version`` is missing or not :data:`VERSION`.
    """
    if version != VERSION:
        found = "missing" if version is None else repr(version[:20])
        raise RequestError(f"header {VERSION_HEADER} is {found}; this server speaks version {VERSION}")


def read_prompt(values: Sequence[str]) -> str:
    """Decode the prompt of a request from its header ``x-prompt``; empty without the header.

    Raises:
        RequestError: If the header occurs more than once, is too long, or is not base64 of UTF-8.
    """
    if len(values) > 1:
        raise RequestError(f"header {PROMPT_HEADER} stands {len(values)} times; a request has one prompt")
    text = values[0] if values else ""
    if len(text) > PROMPT_HEADER_LENGTH:
        raise RequestError(
            f"header {PROMPT_HEADER} has {len(text)} characters; at most {PROMPT_HEADER_LENGTH} are taken"
        )
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError as error:
        raise RequestError(
            f"header {PROMPT_HEADER} is not base64 of UTF-8 text ({error}); encode the prompt in this way"
        ) from error


def parse_request(
    body: bytes | bytearray, accepted: Accepted, prompt: str = "", seeds: Iterable[int] = repeat(DEFAULT_SEED)
) -> list[LatentRow]:
    """Parse the safetensors body of a request into rows to score, whose noise is drawn for ``prompt``.

    Requests without the tensor ``seeds`` take a seed per row from ``seeds``.

    Raises:
        RequestError: If the bytes do not follow the protocol, or do not fit the model.
    """
    entries, data = read_header(body, accepted.tensors)
    accepted.check({name: entry.shape for name, entry in entries.items()})
    names = [name for name in accepted.tensors if name in entries and name not in ("prompt_mask", "seeds")]
    floats = {name: read_floats(name, entries[name], data) for name in names}
    latents, prompts, u = floats["latents"], floats["prompt_embeds"], floats["u"]
    check_levels(u)
    used = read_tensor(entries["seeds"], data).tolist() if "seeds" in entries else islice(seeds, len(latents))
    pooled: Iterable[Tensor | None] = floats.get("pooled_prompt_embeds", [None] * len(latents))
    if accepted.pools_tokens and "pooled_prompt_embeds" not in floats:
        if "prompt_mask" not in entries:
            raise RequestError("pooled_prompt_embeds and prompt_mask are missing; give one of them")
        pooled = _pooled(prompts, read_tensor(entries["prompt_mask"], data))
    if accepted.masked:
        lengths = _lengths(read_tensor(entries["prompt_mask"], data))
        texts = [row[:length] for row, length in zip(prompts, lengths, strict=True)]
    else:
        texts = list(prompts)
    longest = max(map(len, texts))
    if accepted.max_prompt is not None and longest > accepted.max_prompt:
        raise RequestError(
            f"prompt_embeds: a prompt of {longest} tokens is over {accepted.max_prompt}, the limit of this network", 422
        )
    parts = zip(latents, texts, pooled, u.tolist(), used, strict=True)
    return [LatentRow(*part, prompt=prompt, masked=accepted.masked) for part in parts]


def parsing_bytes(body: bytes | bytearray, accepted: Accepted) -> int:
    """Return the memory in bytes that the parsed rows take in addition to the body; all floats become float32.

    Raises:
        RequestError: If the safetensors header does not follow the protocol.
    """
    entries, _ = read_header(body, accepted.tensors)
    return sum(4 * math.prod(entry.shape) for name, entry in entries.items() if name != "seeds")


def _pooled(prompts: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the tokens in a mask ``(B, L)``, uint8."""
    used = _checked(mask)
    if (empty := ~used.any(dim=1)).any():
        raise RequestError(f"prompt_mask: row {int(empty.nonzero()[0])} holds no 1; a prompt has tokens", 422)
    return Conditioning(prompts, prompt_mask=used).pooled()


def _lengths(mask: Tensor) -> list[int]:
    """Return the number of tokens of each row of a mask ``(B, L)``, uint8."""
    used = _checked(mask)
    lengths = used.sum(dim=1)
    wrong = ((torch.arange(mask.shape[1]) < lengths[:, None]) != used).any(dim=1) | (lengths == 0)
    if wrong.any():
        raise RequestError(
            f"prompt_mask: row {int(wrong.nonzero()[0])} must begin with a 1 and hold no 1 after a 0; put the tokens "
            "of the prompt first",
            422,
        )
    return [int(length) for length in lengths]


def _checked(mask: Tensor) -> Tensor:
    """Return a mask of uint8 as bool."""
    if mask.max() > 1:
        raise RequestError(f"prompt_mask holds {mask.max().item()}; give 0 or 1", 422)
    return mask.bool()


def check_levels(u: Tensor) -> None:
    """Raise RequestError with status 422 if a noise level lies outside [0, 1]."""
    outside = u[(u < 0) | (u > 1)].tolist()
    if outside:
        raise RequestError(f"u holds {outside[0]:g}; noise levels lie in [0, 1]", 422)
