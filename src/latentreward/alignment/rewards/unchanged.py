"""Reward for leaving alone what an edit should not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from latentreward.alignment.rewards.base import Reward, RewardSource
from latentreward.core.contracts import NoisyStates, sources_of
from latentreward.core.errors import InputError, check_range

if TYPE_CHECKING:
    from latentreward.alignment.policies.policy import Policy


def unchanged_region_change(latents: Tensor, sources: Tensor, share: float = 0.5) -> Tensor:
    """Compute how much the least changed region of edits differs from the pictures that were edited: ``(N,)`` float32.

    An edit of part of a picture leaves other places alone; where everything moves, the edit did more than it was asked
    to. At each place the change is the mean square of the difference over channels. The measure is the root mean of
    the smallest ``share`` of these: 0 if at least this share of the picture is unchanged. Scaled latents have a
    variance of about 1, so that two unrelated pictures are about 1 apart. An instruction that changes all places, such
    as one for the style, has a large value by right: compare results of one prompt.

    Results ``latents``, in which the measure is differentiable, and ``sources`` are clean latents ``(N, C, ...)``.
    """
    if latents.shape != sources.shape:
        raise InputError(
            f"edited latents {tuple(latents.shape[1:])} and those of their source {tuple(sources.shape[1:])} differ in "
            "size; set policy.source_size: made"
        )
    changes = (latents.float() - sources.float()).square().mean(dim=1).flatten(1)
    count = max(round(share * changes.shape[1]), 1)
    # The small constant keeps the gradient of the root finite where nothing has changed.
    return (changes.topk(count, dim=1, largest=False).values.mean(dim=1) + 1e-12).sqrt()


class UnchangedRegion(RewardSource):
    """Reward against over-editing: minus the change of the region that an edit leaves alone, for editors.

    See :func:`~latentreward.alignment.rewards.unchanged.unchanged_region_change`. The best score, 0, is that of an
    unchanged picture, so the reward is one part of a mixture with a reward that judges the edit. A noisy state is
    scored by the policy's prediction of its clean latents.

    Args:
        share: Share of the places that an edit may be expected to leave alone.
        source: Number of the picture that is edited, of prompts with several; from 0.

    Example:
        .. code-block:: yaml

            reward:
              class_path: RewardMixture
              init_args:
                rewards:
                  - {class_path: LatentReward, init_args: {path: runs/edit_reward}}
                  - {class_path: UnchangedRegion}
                weights: [1.0, 0.5]
    """

    def __init__(self, share: float = 0.5, source: int = 0) -> None:
        check_range("(0, 1]", **{"reward.share": share})
        check_range("[0, inf)", **{"reward.source": source})
        self.share, self.source = share, source

    def latent_space(self) -> None:
        """Return None: latents of any editor are compared with those of its sources."""

    def scores_states(self) -> bool:
        return False

    def load(self, policy: Policy) -> LoadedUnchangedRegion:
        if policy.source_encoder is None:
            raise InputError(f"reward UnchangedRegion is for policies that edit; {policy.family.title} does not")
        return LoadedUnchangedRegion(policy, self.share, self.source)


class LoadedUnchangedRegion(Reward):
    """The loaded reward of :class:`UnchangedRegion`."""

    needs_clean = differentiable = True
    name = "UnchangedRegion"

    def __init__(self, policy: Policy, share: float, source: int) -> None:
        super().__init__()
        self._policy = (policy,)  # not registered here as well
        self.share, self.source = share, source

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if any(len(sources_of(prompt)) <= self.source for prompt in prompts):
            remedy = "give source: 0" if self.source else "give prompts with source_images"
            raise InputError(f"reward UnchangedRegion: a prompt edits no picture number {self.source}; {remedy}")

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        self.check_prompts(prompts)
        encoder = self._policy[0].source_encoder
        assert encoder is not None
        return encoder(prompts)[self.source]

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        assert states.clean is not None
        sources = encoded.to(states.clean.device)[states.rows.to(states.clean.device)]
        return -unchanged_region_change(states.clean, sources, self.share)
