"""Rewards from a server that scores pictures: a judge in any framework, or ``latentreward serve``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.alignment.rewards.base import RewardSource
from latentreward.alignment.rewards.pixel import DecodingReward
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import check_at_least_one
from latentreward.core.reports.drawing import to_image
from latentreward.reward import PlainJSON, RemoteError, RemoteServer
from latentreward.reward.remote.client import RemoteImages, raise_together

if TYPE_CHECKING:
    from latentreward.alignment.policies.policy import Policy


class HTTPReward(RewardSource):
    """A reward from a server: a VLM judge, or ``latentreward serve``.

    The policy's VAE decodes latents, and the server scores pictures. Scores have no gradient. Each process asks for
    its own rows, and remembers scores by content.

    A method that scores finished samples asks for the scores of some prompts while it samples the next, if its
    ``prompts_at_once`` is set. All scores are there before the policy learns from them. A reward of single steps is
    waited for at each step.

    Args:
        server: Address, limits, token, and how long to try when the server fails.
        schema: Form of requests and replies; None is :class:`~latentreward.reward.PlainJSON`.
        batch_size: Pictures of a request.
        decode_batch_size: Latents that the VAE decodes at once.

    Example:
        .. code-block:: yaml

            reward:
              class_path: HTTPReward
              init_args:
                server: {url: "http://judge:8080", token_env: JUDGE_TOKEN, retry_s: 14400}
    """

    def __init__(
        self, server: RemoteServer, schema: PlainJSON | None = None, batch_size: int = 16, decode_batch_size: int = 8
    ) -> None:
        check_at_least_one("reward.", batch_size=batch_size, decode_batch_size=decode_batch_size)
        self.server, self.schema = server, schema or PlainJSON()
        self.batch_size, self.decode_batch_size = batch_size, decode_batch_size

    def has_gradient(self) -> bool:
        return False

    def latent_space(self) -> None:
        """Return None: the policy's own VAE decodes the latents of any policy."""

    def scores_states(self) -> bool:
        return False

    def load(self, policy: Policy) -> RemoteReward:
        return RemoteReward(self, policy)


class RemoteReward(DecodingReward):
    """A reward that decodes clean latents with the policy's VAE and sends the pictures to a server.

    Attributes:
        agree: Function that tells whether all ranks got their scores, from whether this one did; set while all ranks
            ask equally often.
    """

    answers_later = True
    agree: Callable[[bool], bool] = bool  # of a process that asks without others

    def __init__(self, source: HTTPReward, policy: Policy) -> None:
        super().__init__(policy, source.decode_batch_size)
        self.images = RemoteImages(source.server, source.schema, source.batch_size)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(prompts)

    def score(self, states: NoisyStates, encoded: tuple[str, ...]) -> Tensor:
        return self._begin(states.clean, states.rows, encoded, states.latents)()

    def score_clean(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Tensor:
        """See :meth:`Reward.score_clean`; pictures have no noise levels."""
        return self._begin(latents, rows, encoded, latents)()

    def begin_parts(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Callable[[], Tensor]:
        pending = self._begin(latents, rows, encoded, latents)
        return lambda: pending()[:, None]

    @torch.no_grad()
    def _begin(
        self, clean: Tensor | None, rows: Tensor, encoded: tuple[str, ...], like: Tensor
    ) -> Callable[[], Tensor]:
        """Ask for the scores of clean latents ``(N, C, ...)``; return a function that waits for them.

        It places them ``(N,)`` on the device of ``like``; RemoteError if some process gets none.
        """
        states = NoisyStates(clean, torch.zeros(len(rows)), rows, clean)
        images = [image for pixels in self.decode(states) for image in map(to_image, pixels)]
        asked = self.images.begin([encoded[row] for row in rows.tolist()], images)

        def result() -> Tensor:
            scores: list[float] = []
            failure: RemoteError | None = None
            try:
                scores = asked()
            except RemoteError as error:
                failure = error
            raise_together(failure, self.agree)
            return self.checked(torch.tensor(scores), torch.zeros(len(like)), like).to(like.device)

        return result
