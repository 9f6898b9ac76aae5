"""Rewards on pixels: decode the policy's prediction of the clean latents, and score the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentreward.alignment.rewards.base import Reward, RewardSource
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.reports.drawing import to_image
from latentreward.reward import ImageScorer, StepAwareScorer

if TYPE_CHECKING:
    from latentreward.alignment.policies.policy import Policy
    from latentreward.reward.scorers.step_aware import StepAwareCLIP


class PixelReward(RewardSource):
    """A reward that decodes latents with the policy's VAE and scores pixels: SPO's reward, or any scorer of images.

    The reward decodes and scores the clean latents x̂_0 that the policy predicts from a state. A
    :class:`~latentreward.reward.StepAwareScorer` also gets the state's timestep, and its scores are differentiable.
    Other scorers treat the decoded x̂_0 as a finished image.

    Args:
        scorer: Scorer of images.
        decode_batch_size: Latents that the VAE decodes at once.
    """

    def __init__(self, scorer: ImageScorer, decode_batch_size: int = 8) -> None:
        check_at_least_one(decode_batch_size=decode_batch_size)
        self.scorer, self.decode_batch_size = scorer, decode_batch_size

    def latent_space(self) -> None:
        """Return None: latents of any policy can be scored, since the policy's own VAE decodes them."""

    def scores_states(self) -> bool:
        return False

    def has_gradient(self) -> bool:
        return isinstance(self.scorer, StepAwareScorer)

    def load(self, policy: Policy) -> DecodingReward:
        if isinstance(self.scorer, StepAwareScorer):
            return StepAwareReward(self.scorer.load(), policy, self.decode_batch_size)
        return ImageReward(self.scorer, policy, self.decode_batch_size)


class DecodingReward(Reward):
    """Base class of loaded rewards that decode the predicted clean latents x̂_0 with the policy's VAE."""

    needs_clean = True

    def __init__(self, policy: Policy, decode_batch_size: int) -> None:
        super().__init__()
        self.decode_batch_size = decode_batch_size
        self.__dict__["policy"] = policy  # not as a submodule: the LightningModule registers the policy already

    def decode(self, states: NoisyStates) -> list[Tensor]:
        """Decode ``states.clean`` of images to pixels, about [-1, 1], ``(≤ decode_batch_size, 3, H, W)`` at a time."""
        assert states.clean is not None
        if states.clean.ndim == 5 and states.clean.shape[2] > 1:
            raise InputError("sampling.frames makes clips, but a reward on pixels scores images; set it to 1")
        return [self.policy.vae.decode(part) for part in states.clean.split(self.decode_batch_size)]


class StepAwareReward(DecodingReward):
    """A reward that scores x̂_0 with SPO's step-aware model (arXiv:2406.04314), outside autocast in its own dtype."""

    differentiable = True

    def __init__(self, network: StepAwareCLIP, policy: Policy, decode_batch_size: int) -> None:
        super().__init__(policy, decode_batch_size)
        self.network = network

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        with torch.autocast(self.network.mean.device.type, enabled=False):
            return self.network.embed_tokens(self.network.tokenize(prompts))

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        pixels = self.decode(states)
        timesteps = states.timesteps.to(pixels[0].device).split(self.decode_batch_size)
        with torch.autocast(pixels[0].device.type, enabled=False):
            parts = [self.network.embed_images(*part) for part in zip(pixels, timesteps, strict=True)]
            return self.network.similarity(torch.cat(parts), encoded[states.rows.to(encoded.device)])


class ImageReward(DecodingReward):
    """A reward that scores x̂_0 with an ordinary scorer of images, which is loaded at the first use."""

    def __init__(self, scorer: ImageScorer, policy: Policy, decode_batch_size: int) -> None:
        super().__init__(policy, decode_batch_size)
        self.scorer, self._prepared = scorer, False

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        if not self._prepared:  # not earlier: only now is each rank on its own device
            self.scorer.prepare()
            self._prepared = True
        return tuple(prompts)

    @torch.no_grad()
    def score(self, states: NoisyStates, encoded: tuple[str, ...]) -> Tensor:
        images = [image for pixels in self.decode(states) for image in map(to_image, pixels)]
        with torch.autocast(states.latents.device.type, enabled=False):
            scores = self.scorer([encoded[row] for row in states.rows.tolist()], images)
        return scores.to(states.latents.device)
