"""Latents with encoded prompts as rows that ``latentreward serve`` scores, by verl-omni's protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

from latentreward.core.contracts import Conditioning, LatentSpace, identity_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import checked, shown
from latentreward.reward.remote.schemas import ANSWER, REMEDY, Schema, ServedLatents
from latentreward.reward.remote.scores import PendingScores, RemoteScores
from latentreward.reward.remote.server import Connection, RemoteServer

HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}  # headers of a request


@dataclass(frozen=True, eq=False)
class LatentRow:
    """Clean latents with an encoded prompt, all float32 on the CPU."""

    latents: Tensor  # ``(C, ...)``, scaled
    prompt: Conditioning  # encoded prompt, one row
    sigma: float  # noise level in [0, 1]
    seed: int  # seed of the noise


class ServedReward(BaseModel):
    """What ``latentreward serve`` tells of a reward."""

    model: str  # name of the model
    latent_space: dict[str, Any]  # record of its latent space
    prompt_embeds_width: int | None = None  # width of a token's embedding
    pooled_prompt_embeds_width: int | None = None  # width of the pooled embedding; None if the model takes none
    prompt_mask: bool = False  # whether the model needs a mask of the prompts' tokens
    pools_tokens: bool = False  # whether a mask may stand in for the pooled embedding
    sources: tuple[int, int] = (0, 0)  # least and largest number of pictures that an image is an edit of
    max_rows: int | None = None  # greatest number of rows of a request


class LatentsReply(BaseModel):
    """JSON of a reply of verl-omni's protocol."""

    raw_scores: list[Any]


class RemoteLatents(RemoteScores[LatentRow]):
    """Scores of clean latents from ``latentreward serve``, which :func:`describe` describes as ``reward``."""

    def __init__(self, server: RemoteServer, schema: ServedLatents, batch_size: int, reward: ServedReward) -> None:
        super().__init__(server, batch_size, reward.model)
        self.schema, self.reward = schema, reward

    def begin(self, rows: Sequence[LatentRow], texts: Sequence[str]) -> PendingScores:
        """Ask for the scores of N rows with latents of one shape, and return before they are there.

        ``texts`` are the rows' prompts.
        """
        keys = [
            digest([f"{identity_of(text)}\n{row.sigma} {row.seed} {tuple(row.latents.shape)}\n", row.latents.numpy()])
            for row, text in zip(rows, texts, strict=True)
        ]
        return self.begin_rows(rows, keys)

    def ask(self, rows: Sequence[LatentRow], ended: Event) -> tuple[Sequence[Any], str | None]:
        """See :meth:`RemoteScores.ask`; the model is asked for after the scores, whose reply does not name it.

        A server that was started again in the meantime may have another one.
        """
        prompts, takes = Conditioning.join([row.prompt for row in rows]).trimmed(), self.reward
        tensors = {
            "latents": torch.stack([row.latents for row in rows]),
            "prompt_embeds": prompts.prompt_embeds,
            "u": torch.tensor([row.sigma for row in rows]),
            "seeds": torch.tensor([row.seed for row in rows]),
        }
        if prompts.pooled_prompt_embeds is not None and takes.pooled_prompt_embeds_width is not None:
            tensors["pooled_prompt_embeds"] = prompts.pooled_prompt_embeds
        if prompts.prompt_mask is not None and (takes.prompt_mask or takes.pools_tokens):
            tensors["prompt_mask"] = prompts.prompt_mask
        tensors |= {f"source_{place}": latents for place, latents in enumerate(prompts.source_latents)}
        body = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        reply = self.connection.ask("POST", self.schema.path, body, HEADERS, ended)
        try:
            scores = checked(LatentsReply, reply, ANSWER, REMEDY).raw_scores
        except InputError as error:
            self.connection.refuse(str(error), error)
        return scores, describe(self.connection, self.schema, ended).model


def describe(connection: Connection, schema: Schema, ended: Event | None = None) -> ServedReward:
    """Ask ``latentreward serve`` for the description of a reward.

    The description lies beside the path of the schema: ``/rewards/NAME/v1/score`` of a reward by name has the
    description ``/rewards/NAME/v1/model``.

    Raises:
        RemoteError: If the server gives none.
    """
    path = f"{schema.path.rpartition('/')[0]}/model"
    told = connection.ask("GET", path, ended=ended)
    try:
        served: ServedReward = checked(ServedReward, told, ANSWER, REMEDY)
    except InputError as error:
        connection.refuse(
            f"{path} answers {shown(told)}; schema: {type(schema).__name__} is for latentreward serve", error
        )
    return served


def check_rows(server: RemoteServer, reward: ServedReward, batch_size: int) -> None:
    """Raise InputError if ``batch_size`` is over the server's limit of rows in a request."""
    if batch_size > (reward.max_rows or batch_size):
        most = f"{reward.max_rows}, the most rows that the reward server {server.url} takes in a request"
        raise InputError(f"reward.batch_size={batch_size} is over {most}")


def check_widths(server: RemoteServer, reward: ServedReward, encoded: Conditioning) -> None:
    """Raise InputError if a served reward does not take embeddings of the widths of the policy's text encoders."""
    pooled = encoded.pooled_prompt_embeds
    ours = encoded.prompt_embeds.shape[-1], None if pooled is None else pooled.shape[-1]
    theirs = reward.prompt_embeds_width, reward.pooled_prompt_embeds_width
    pools = theirs[1] is None or reward.pools_tokens
    if ours[0] != theirs[0] or not (pools or ours[1] == theirs[1]):
        raise InputError(
            f"reward server {server.url} takes prompts embedded in widths {theirs}, but the policy's text encoders "
            f"give {ours}; take schema: ServedImages, for which the server encodes prompts"
        )


def latent_space(server: RemoteServer, schema: ServedLatents) -> LatentSpace:
    """Ask a server for the latent space of its model; raise RemoteError if the server gives none."""
    connection = Connection(server)
    told = describe(connection, schema).latent_space
    try:
        return LatentSpace.from_record(told)
    except TypeError as error:
        connection.refuse(f"its model has the latent_space {shown(told)}, which is none", error)
