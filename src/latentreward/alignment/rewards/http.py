"""Rewards from a server: pictures for a judge in any framework, or latents for ``latentreward serve``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.alignment.rewards.base import Reward, RewardSource, check_edits
from latentreward.alignment.rewards.pixel import DecodingReward
from latentreward.core.contracts import Conditioning, LatentSpace, NoisyStates
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.promises import check_needs
from latentreward.core.reports.drawing import to_image
from latentreward.core.storage.digests import digest
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import ImageSchema, PlainJSON, RemoteError, RemoteServer, Schema, ServedImages, ServedLatents
from latentreward.reward.remote.client import (
    Connection,
    LatentRow,
    PendingScores,
    RemoteImages,
    RemoteLatents,
    describe,
    raise_together,
)
from latentreward.reward.remote.schemas import ServedReward

if TYPE_CHECKING:
    from latentreward.alignment.policies.loading import PolicySource
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
        server: Address, limits, token, and what happens when the server fails.
        schema: Form of requests and replies; None is :class:`~latentreward.reward.PlainJSON`.
        batch_size: Pictures or latents of a request.
        decode_batch_size: Latents that the VAE decodes at once.

    Example:
        .. code-block:: yaml

            reward:
              class_path: HTTPReward
              init_args:
                server: {url: "http://judge:8080", token_env: JUDGE_TOKEN, on_outage: wait, wait_s: 14400}
                schema: {class_path: UniRL, init_args: {reward: hpsv3}}
    """

    def __init__(
        self, server: RemoteServer, schema: Schema | None = None, batch_size: int = 16, decode_batch_size: int = 8
    ) -> None:
        check_at_least_one("reward.", batch_size=batch_size, decode_batch_size=decode_batch_size)
        self.server, self.schema = server, schema or PlainJSON()
        if not isinstance(self.schema, ImageSchema | ServedLatents):
            raise InputError(
                f"reward.schema: {type(schema).__name__} is neither an ImageSchema nor ServedLatents; derive it from "
                "ImageSchema"
            )
        check_needs(self.schema)
        self.batch_size, self.decode_batch_size = batch_size, decode_batch_size

    @property
    def uses_sigmas(self) -> bool:  # type: ignore[override]
        """Whether the server scores latents, at noise levels."""
        return isinstance(self.schema, ServedLatents)

    def has_gradient(self) -> bool:
        """Return False."""
        return False

    def served(self, taken: tuple[int, int | None] | None = None) -> ServedReward | None:
        """Ask ``latentreward serve`` what its reward takes, and compare the edits that a policy makes; None of others.

        Raises:
            InputError: If the reward does not judge edits of as many pictures, or ``batch_size`` is over its limit.
        """
        if not isinstance(self.schema, ServedImages | ServedLatents):
            return None
        served, name = describe(Connection(self.server), self.schema), f"reward server {self.server.url}"
        if taken is not None:
            check_edits(name, served.sources, taken)
        if self.batch_size > (served.max_rows or self.batch_size):
            most = f"{served.max_rows}, the most rows that the {name} takes in a request"
            raise InputError(f"reward.batch_size={self.batch_size} is over {most}")
        return served

    def latent_space(self) -> LatentSpace | None:
        """Ask the server for the latent space of its model; None for pictures, which the policy's own VAE decodes."""
        served = self.served() if self.uses_sigmas else None
        return None if served is None else LatentSpace.from_record(served.latent_space)

    def require_latents_of(self, policy: PolicySource) -> None:
        """See :meth:`RewardSource.require_latents_of`; asks ``latentreward serve`` whether its reward judges edits."""
        super().require_latents_of(policy)
        if isinstance(self.schema, ServedImages | ServedLatents):
            self.served(policy.resolve_family().sources)

    def scores_states(self) -> bool:
        """Return False: what is sent is a prediction of the clean latents, or its picture."""
        return False

    def load(self, policy: Policy) -> RemoteReward:
        """See :meth:`RewardSource.load`.

        Raises:
            InputError: If the policy has no VAE to make pictures with, its text encoders do not fit the server, one of
                the two edits pictures and the other knows none, or ``batch_size`` is over the limit of
                ``latentreward serve``.
        """
        served = self.served(policy.family.sources)
        if isinstance(self.schema, ImageSchema):
            return RemoteImageReward(self, policy)
        assert served is not None
        with torch.no_grad():
            encoded = policy.require_text_encoder()([edit_of_grey() if policy.family.sources[0] else ""])
        pooled = encoded.pooled_prompt_embeds
        ours = encoded.prompt_embeds.shape[-1], None if pooled is None else pooled.shape[-1]
        theirs = served.prompt_embeds_width, served.pooled_prompt_embeds_width
        if ours[0] != theirs[0] or (ours[1] != theirs[1] and theirs[1] is not None and not served.pools_tokens):
            raise InputError(
                f"reward server {self.server.url} takes prompts embedded in widths {theirs}, but the policy's text "
                f"encoders give {ours}; take schema: ServedImages, for which the server encodes prompts"
            )
        return RemoteLatentReward(self, self.schema, policy, served)


class RemoteReward(Reward):
    """Base class of loaded rewards whose scores come from a server.

    Attributes:
        agree: Function that tells whether all ranks got their scores, from whether this one did; set while all ranks
            ask equally often.
        source: Settings.
    """

    source: HTTPReward
    needs_clean = True
    answers_later = True
    agree: Callable[[bool], bool] = bool  # of a process that asks without others

    @abstractmethod
    def begin(
        self, clean: Tensor | None, rows: Tensor, encoded: Any, sigmas: Sequence[float]
    ) -> Sequence[PendingScores]:
        """Ask for the scores of clean latents ``(N, C, ...)``; the score is the mean of those that come."""

    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        """See :meth:`Reward.score`; scores ``states.clean``."""
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
        self.source = source
        self._images: RemoteImages | None = None

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """Return the prompts unchanged."""
        return tuple(prompts)

    @torch.no_grad()
    def begin(
        self, clean: Tensor | None, rows: Tensor, encoded: tuple[str, ...], sigmas: Sequence[float]
    ) -> Sequence[PendingScores]:
        """See :meth:`RemoteReward.begin`; pictures have no noise levels."""
        if self._images is None:  # not earlier: it has locks, which cannot be copied to another process
            self._images = RemoteImages(self.source.server, self.source.schema, self.source.batch_size)
        states = NoisyStates(clean, torch.zeros(len(rows)), rows, clean)
        images = [image for pixels in self.decode(states) for image in map(to_image, pixels)]
        return [self._images.begin([encoded[row] for row in rows.tolist()], images)]


SentPrompts = tuple[tuple[str, ...], tuple[Conditioning, ...]]
"""Prompts as a server of latents gets them: texts, and the embeddings of each, one row, float32 on the CPU."""


def seed_of(text: str) -> int:
    """Return the seed, an int64, of the noise of a prompt's latents."""
    return int(digest([text], 8), 16) >> 1


class RemoteLatentReward(RemoteReward):
    """A reward that sends clean latents to ``latentreward serve``.

    Args:
        source: Settings.
        schema: Form of requests and replies.
        policy: The policy, whose text encoders embed the prompts.
        served: The served reward, as the server described it before the run.
    """

    def __init__(self, source: HTTPReward, schema: ServedLatents, policy: Policy, served: ServedReward) -> None:
        super().__init__()
        self.source, self.schema, self.served = source, schema, served
        self.__dict__["policy"] = policy  # not as a submodule: the LightningModule registers the policy already
        self._latents: RemoteLatents | None = None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> SentPrompts:
        """Embed the prompts with the policy's text encoders."""
        encoded = self.policy.encode_prompts(prompts).to("cpu", torch.float32)
        return tuple(prompts), tuple(encoded.select([row]).trimmed() for row in range(len(prompts)))

    def begin(
        self, clean: Tensor | None, rows: Tensor, encoded: SentPrompts, sigmas: Sequence[float]
    ) -> Sequence[PendingScores]:
        """See :meth:`RemoteReward.begin`; asks for each of ``sigmas``, or for the schema's."""
        if clean is None:
            raise InputError("a reward on a server needs the policy's prediction of the clean latents, and got none")
        if self._latents is None:  # not earlier: it has locks, which cannot be copied to another process
            self._latents = RemoteLatents(self.source.server, self.schema, self.source.batch_size, self.served)
        texts, prompts = ([column[row] for row in rows.tolist()] for column in encoded)
        seeds = [*map(seed_of, texts)]
        latents = clean.detach().to("cpu", torch.float32).contiguous()
        pending = []
        for sigma in sigmas or (self.schema.sigma,):
            given = zip(latents, prompts, seeds, strict=True)
            sent = [LatentRow(state, prompt, float(sigma), seed) for state, prompt, seed in given]
            pending.append(self._latents.begin(sent, texts))
        return pending
