"""Latents with encoded prompts as rows that ``latentreward serve`` scores, by verl-omni's protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from latentreward.contracts import Conditioning, LatentSpace
from latentreward.errors import InputError
from latentreward.remote.schemas import ServedLatents, listed, shown
from latentreward.remote.scores import PendingScores, RemoteScores
from latentreward.remote.served import describe
from latentreward.remote.server import Connection, RemoteServer, without_token
from latentreward.storage.digests import digest

HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}
"""Headers of a request."""


@dataclass(frozen=True, eq=False)
class LatentRow:
    """Clean latents with an encoded prompt, all float32 on the CPU.

    Attributes:
        latents: ``(C, ...)``, scaled.
        prompt: Encoded prompt, one row.
        sigma: Noise level in [0, 1].
        seed: Seed of the noise.
    """

    latents: Tensor
    prompt: Conditioning
    sigma: float
    seed: int


class RemoteLatents:
    """Scores of clean latents from ``latentreward serve``.

    Args:
        server: The server.
        schema: Path of requests.
        batch_size: Latents of a request.
        model: Description of the served model, see :func:`~latentreward.remote.served.describe`.
    """

    def __init__(self, server: RemoteServer, schema: ServedLatents, batch_size: int, model: Mapping[str, Any]) -> None:
        self.schema, self.connection, self.model = schema, Connection(server), model
        self._scores: RemoteScores[LatentRow] = RemoteScores(self.connection, self._ask, batch_size, model["model"])

    def begin(self, rows: Sequence[LatentRow], texts: Sequence[str]) -> PendingScores[LatentRow]:
        """Ask for the scores of N rows with latents of one shape, and return before they are there.

        ``texts`` are the rows' prompts.
        """
        pairs = zip(rows, texts, strict=True)
        keys = [
            digest([text, f"\n{row.sigma} {row.seed} {tuple(row.latents.shape)}\n", row.latents.numpy()])
            for row, text in pairs
        ]
        return self._scores.begin(rows, keys)

    def _ask(self, rows: Sequence[LatentRow], ended: Event) -> tuple[Sequence[Any], str | None]:
        """Ask for the scores of a batch, in a thread; and then for the model, which the protocol's reply does not name.

        A server that was started again in the meantime may have another one.
        """
        reply = self.connection.ask("POST", self.schema.path, save(self._tensors(rows)), HEADERS, ended)
        try:
            if not isinstance(reply, dict):
                raise InputError("the answer is no JSON object; is this latentreward serve?")
            return listed(reply, "raw_scores"), describe(self.connection, self.schema, ended)["model"]
        except InputError as error:
            self.connection.refuse(str(error), error)

    def _tensors(self, rows: Sequence[LatentRow]) -> dict[str, Tensor]:
        prompts = Conditioning.join([row.prompt for row in rows]).trimmed()
        tensors = {
            "latents": torch.stack([row.latents for row in rows]),
            "prompt_embeds": prompts.prompt_embeds,
            "u": torch.tensor([row.sigma for row in rows]),
            "seeds": torch.tensor([row.seed for row in rows]),
        }
        if prompts.pooled_prompt_embeds is not None and self.model.get("pooled_prompt_embeds_width") is not None:
            tensors["pooled_prompt_embeds"] = prompts.pooled_prompt_embeds
        if prompts.prompt_mask is not None and (self.model.get("prompt_mask") or self.model.get("pools_tokens")):
            tensors["prompt_mask"] = prompts.prompt_mask
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def check_widths(server: RemoteServer, model: Mapping[str, Any], encoded: Conditioning) -> None:
    """Check that a served model takes embeddings of the policy's text encoders.

    Raises:
        InputError: If widths differ, or one has a pooled vector and the other has not.
    """
    pooled = encoded.pooled_prompt_embeds
    ours = encoded.prompt_embeds.shape[-1], None if pooled is None else pooled.shape[-1]
    theirs = model.get("prompt_embeds_width"), model.get("pooled_prompt_embeds_width")
    pools = theirs[1] is None or model.get("pools_tokens")
    if ours[0] != theirs[0] or not (pools or ours[1] == theirs[1]):
        taken = without_token(shown(theirs), server.token)
        raise InputError(
            f"reward server {server.url} takes prompts embedded in widths {taken}, but the policy's text encoders give "
            f"{ours}; take schema: ServedImages, for which the server encodes prompts"
        )


def latent_space(server: RemoteServer, schema: ServedLatents) -> LatentSpace:
    """Ask a server for the latent space of its model.

    Raises:
        RemoteError: If the server gives none.
    """
    connection = Connection(server)
    told = describe(connection, schema)["latent_space"]
    try:
        return LatentSpace.from_record(told)
    except TypeError as error:
        connection.refuse(f"its model has the latent_space {shown(told)}, which is none", error)
