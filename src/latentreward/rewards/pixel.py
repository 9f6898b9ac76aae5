"""Rewards that look at pictures: the policy's prediction of the finished latents, decoded, and a scorer of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentreward.contracts import NoisyStates
from latentreward.errors import InputError
from latentreward.reports.drawing import to_image
from latentreward.rewards.base import Reward, RewardSource
from latentreward.scorers import ImageScorer, StepAwareScorer

if TYPE_CHECKING:
    from latentreward.policies import Policy
    from latentreward.scorers.step_aware_clip import StepAwareCLIP


class PixelReward(RewardSource):
    """A scorer of pixels for any policy that has a VAE: SPO's reward, or an ordinary scorer of images.

    What is scored is the policy's x̂_0 of a state, which rollouts predict, decoded. A
    :class:`~latentreward.scorers.StepAwareScorer` is told the state's timestep, and its scores are differentiable;
    other scorers take x̂_0 as a finished picture.

    Args:
        scorer: Scorer of images.
        decode_batch_size: Latents that the VAE decodes at once.

    Raises:
        InputError: If ``decode_batch_size`` is below 1.
    """

    def __init__(self, scorer: ImageScorer, decode_batch_size: int = 8) -> None:
        if decode_batch_size < 1:
            raise InputError(f"decode_batch_size={decode_batch_size} must be at least 1")
        self.scorer, self.decode_batch_size = scorer, decode_batch_size

    def latent_space(self) -> None:
        """Any: the policy's own VAE decodes."""

    def load(self, policy: Policy) -> DecodingReward:
        """See :meth:`RewardSource.load`."""
        if isinstance(self.scorer, StepAwareScorer):
            return StepAwareReward(self.scorer.load(), policy, self.decode_batch_size)
        return ImageReward(self.scorer, policy, self.decode_batch_size)


class DecodingReward(Reward):
    """A reward that has the policy's VAE decode x̂_0.

    Args:
        policy: The policy.
        decode_batch_size: See :class:`PixelReward`.

    Raises:
        InputError: If the policy has no VAE.
    """

    needs_clean = True

    def __init__(self, policy: Policy, decode_batch_size: int) -> None:
        super().__init__()
        if policy.vae is None:
            raise InputError(
                f"a reward that scores pixels needs the VAE of the policy {policy.source}, which was built without "
                "one; load it from a full pipeline folder"
            )
        self.decode_batch_size = decode_batch_size
        self.__dict__["policy"] = policy  # not registered: its weights are the module's, once

    def decode(self, states: NoisyStates) -> list[Tensor]:
        """Pixels of x̂_0, about [-1, 1], in chunks ``(≤ decode_batch_size, 3, H, W)``.

        Raises:
            InputError: If there is no x̂_0.
        """
        if states.clean is None:
            raise InputError(
                "a reward that scores pixels needs the policy's prediction of the finished latents, and got none; use "
                "it where candidates are drawn from the policy"
            )
        return [self.policy.vae.decode(part) for part in states.clean.split(self.decode_batch_size)]


class StepAwareReward(DecodingReward):
    """SPO's step-aware preference model on x̂_0 (arXiv:2406.04314); outside autocast, in the type of its weights.

    Args:
        network: Frozen network.
        policy: See :class:`DecodingReward`.
        decode_batch_size: See :class:`PixelReward`.
    """

    differentiable = True

    def __init__(self, network: StepAwareCLIP, policy: Policy, decode_batch_size: int) -> None:
        super().__init__(policy, decode_batch_size)
        self.network = network

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``(P, width)``."""
        with torch.autocast(self.network.mean.device.type, enabled=False):
            return self.network.embed_tokens(self.network.tokenize(prompts))

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        """See :meth:`Reward.score`."""
        pixels = self.decode(states)
        timesteps = states.timesteps.to(pixels[0].device).split(self.decode_batch_size)
        with torch.autocast(pixels[0].device.type, enabled=False):
            parts = [self.network.embed_images(*part) for part in zip(pixels, timesteps, strict=True)]
            return self.network.similarity(torch.cat(parts), encoded[states.rows.to(encoded.device)])


class ImageReward(DecodingReward):
    """A scorer of finished images on x̂_0; it is loaded where and when it is first needed.

    Args:
        scorer: Scorer of images.
        policy: See :class:`DecodingReward`.
        decode_batch_size: See :class:`PixelReward`.
    """

    def __init__(self, scorer: ImageScorer, policy: Policy, decode_batch_size: int) -> None:
        super().__init__(policy, decode_batch_size)
        self.scorer, self._prepared = scorer, False

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """The prompts themselves."""
        if not self._prepared:  # only now does each rank compute on its own device
            self.scorer.prepare()
            self._prepared = True
        return tuple(prompts)

    @torch.no_grad()
    def score(self, states: NoisyStates, encoded: tuple[str, ...]) -> Tensor:
        """See :meth:`Reward.score`."""
        images = [image for pixels in self.decode(states) for image in map(to_image, pixels)]
        with torch.autocast(states.latents.device.type, enabled=False):
            scores = self.scorer([encoded[row] for row in states.rows.tolist()], images)
        return scores.to(states.latents.device)
