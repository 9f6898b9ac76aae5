"""Rewards from a server: pictures for a judge in any framework, or latents for ``latentreward serve``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.alignment.rewards.base import Reward, RewardSource
from latentreward.alignment.rewards.pixel import DecodingReward
from latentreward.core.contracts import Conditioning, LatentSpace, NoisyStates
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.promises import check_needs
from latentreward.core.reports.drawing import to_image
from latentreward.core.storage.digests import digest
from latentreward.reward import ImageSchema, PlainJSON, RemoteError, RemoteServer, Schema, ServedLatents
from latentreward.reward.remote.client import (
    Connection,
    PendingScores,
    RemoteImages,
    RemoteLatents,
    described,
    raise_together,
)
from latentreward.reward.remote.schemas import ServedReward

if TYPE_CHECKING:
    from latentreward.alignment.policies.policy import Policy


class HTTPReward(RewardSource):
    """A reward from a server: a VLM judge, UniRL's reward service, or ``latentreward serve``.

    The policy's VAE decodes latents, and the server scores pictures; under
    :class:`~latentreward.reward.ServedLatents` the server scores latents. Scores have no gradient. Each process asks
    for its own rows, and remembers scores by content.

    A method that scores finished samples asks for the scores of some prompts while it samples the next, if its
    ``prompts_at_once`` is set. All scores are there before the policy learns from them. A reward of single steps is
    waited for at each step.

    Args:
        server: Address, limits, token, and how long to try when the server fails.
        schema: Form of requests and replies; None is :class:`~latentreward.reward.PlainJSON`.
        batch_size: Pictures or latents of a request.
        decode_batch_size: Latents that the VAE decodes at once.

    Example:
        .. code-block:: yaml

            reward:
              class_path: HTTPReward
              init_args:
                server: {url: "http://judge:8080", token_env: JUDGE_TOKEN, retry_s: 14400}
                schema: {class_path: UniRL, init_args: {reward: hpsv3}}
    """

    def __init__(
        self, server: RemoteServer, schema: Schema | None = None, batch_size: int = 16, decode_batch_size: int = 8
    ) -> None:
        check_at_least_one("reward.", batch_size=batch_size, decode_batch_size=decode_batch_size)
        self.server, self.schema = server, schema or PlainJSON()
        if not isinstance(self.schema, ImageSchema | ServedLatents):
            kind = type(schema).__name__
            raise InputError(f"reward.schema: {kind} is no form of pictures or latents; derive it from ImageSchema")
        check_needs(self.schema)
        self.batch_size, self.decode_batch_size = batch_size, decode_batch_size

    @property
    def uses_sigmas(self) -> bool:  # type: ignore[override]
        """Whether the server scores latents, at noise levels."""
        return isinstance(self.schema, ServedLatents)

    def has_gradient(self) -> bool:
        return False

    def served(self) -> ServedReward | None:
        """Ask ``latentreward serve`` what its reward of latents takes; None for pictures, of which it tells itself."""
        connection = Connection(self.server)
        return connection.result(connection.start(described, connection, self.schema)) if self.uses_sigmas else None

    def latent_space(self) -> LatentSpace | None:
        """Ask the server for the latent space of its model; None for pictures, which the policy's own VAE decodes."""
        served = self.served()
        return None if served is None else LatentSpace.from_record(served.latent_space)

    def scores_states(self) -> bool:
        """Return False: what is sent is a prediction of the clean latents, or its picture."""
        return False

    def load(self, policy: Policy) -> RemoteReward:
        served = self.served()
        return RemoteImageReward(self, policy) if served is None else RemoteLatentReward(self, policy, served)


class RemoteReward(Reward):
    """Base class of loaded rewards whose scores come from a server.

    Attributes:
        agree: Function that tells whether all ranks got their scores, from whether this one did; set while all ranks
            ask equally often.
    """

    needs_clean = True
    answers_later = True
    agree: Callable[[bool], bool] = bool  # of a process that asks without others

    @abstractmethod
    def begin(
        self, clean: Tensor | None, rows: Tensor, encoded: Any, sigmas: Sequence[float]
    ) -> Sequence[PendingScores]:
        """Ask for the scores of clean latents ``(N, C, ...)``; the score is the mean of those that come."""

    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        return self._finish(self.begin(states.clean, states.rows, encoded, ()), states.latents)

    def score_clean(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Tensor:
        """See :meth:`Reward.score_clean`; the server draws noise of its own."""
        return self.begin_parts(latents, rows, encoded, noise, sigmas)()[:, 0]

    def begin_parts(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Callable[[], Tensor]:
        asked = self.begin(latents, rows, encoded, sigmas)
        return lambda: self._finish(asked, latents)[:, None]

    def _finish(self, asked: Sequence[PendingScores], like: Tensor) -> Tensor:
        """Wait for scores ``(N,)``, and place them on the device of ``like``; RemoteError if some process gets none."""
        levels: list[list[float]] = []
        failure: RemoteError | None = None
        try:
            levels = [pending() for pending in asked]
        except RemoteError as error:
            failure = error
        raise_together(failure, self.agree)
        mean = torch.tensor(levels, dtype=torch.float64).mean(dim=0)
        return self.checked(mean.to(torch.float32), torch.zeros(len(like)), like).to(like.device)


class RemoteImageReward(RemoteReward, DecodingReward):
    """A reward that decodes clean latents with the policy's VAE and sends the pictures to a server."""

    def __init__(self, source: HTTPReward, policy: Policy) -> None:
        super().__init__(policy, source.decode_batch_size)
        self.images = RemoteImages(source.server, source.schema, source.batch_size)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(prompts)

    @torch.no_grad()
    def begin(
        self, clean: Tensor | None, rows: Tensor, encoded: tuple[str, ...], sigmas: Sequence[float]
    ) -> Sequence[PendingScores]:
        """See :meth:`RemoteReward.begin`; pictures have no noise levels."""
        states = NoisyStates(clean, torch.zeros(len(rows)), rows, clean)
        images = [image for pixels in self.decode(states) for image in map(to_image, pixels)]
        return [self.images.begin([encoded[row] for row in rows.tolist()], images)]


SentPrompts = tuple[tuple[str, ...], tuple[Conditioning, ...]]
"""Prompts as a server of latents gets them: texts, and the embeddings of each, one row, float32 on the CPU."""


def seed_of(text: str) -> int:
    """Return the seed, an int64, of the noise of a prompt's latents."""
    return int(digest([text], 8), 16) >> 1


class RemoteLatentReward(RemoteReward):
    """A reward that sends clean latents to ``latentreward serve``, with prompts that the policy's text encoders embed.

    ``served`` is what the server said of its reward before the run.
    """

    def __init__(self, source: HTTPReward, policy: Policy, served: ServedReward | None) -> None:
        super().__init__()
        schema: Any = source.schema
        self.sigma, self.latents = schema.sigma, RemoteLatents(source.server, schema, source.batch_size, served)
        self.__dict__["policy"] = policy  # not as a submodule: the LightningModule registers the policy already

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> SentPrompts:
        encoded = self.policy.encode_prompts(prompts).to("cpu", torch.float32)
        return tuple(prompts), tuple(encoded.select([row]).trimmed() for row in range(len(prompts)))

    def begin(
        self, clean: Tensor | None, rows: Tensor, encoded: SentPrompts, sigmas: Sequence[float]
    ) -> Sequence[PendingScores]:
        """See :meth:`RemoteReward.begin`; asks for each of ``sigmas``, or for the schema's."""
        if clean is None:
            raise InputError("a reward on a server needs the policy's prediction of the clean latents, and got none")
        texts, prompts = ([column[row] for row in rows.tolist()] for column in encoded)
        given = [*zip(clean.detach().to("cpu", torch.float32).contiguous(), prompts, map(seed_of, texts), strict=True)]
        levels = [float(sigma) for sigma in sigmas or (self.sigma,)]
        return [self.latents.begin([(x, prompt, level, seed) for x, prompt, seed in given], texts) for level in levels]
