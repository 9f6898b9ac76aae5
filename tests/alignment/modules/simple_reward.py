"""Rewards of a line, for tests of alignment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentreward.alignment import Policy, Reward, RewardSource
from latentreward.core.contracts import LatentSpace, NoisyStates


class FirstChannel(Reward):
    """Mean of the first latent channel, the same for every prompt."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def encode_prompts(self, prompts: Any) -> None:
        return None

    def score(self, states: NoisyStates, encoded: None) -> Tensor:
        return self.scale * states.latents[:, 0].float().flatten(1).mean(dim=1)


@dataclass
class FirstChannelReward(RewardSource):
    """``scale`` times the mean of the first channel; 0 is the same for all states."""

    scale: float = 10.0

    def latent_space(self) -> LatentSpace | None:
        return None

    def load(self, policy: Policy) -> Reward:
        return FirstChannel(self.scale)


class OtherChannels(FirstChannel):
    """Scores finished latents by another channel at each level."""

    def score_clean(self, latents: Tensor, *given: Any, sigmas: Sequence[float] = ()) -> Tensor:
        levels = given[-1] if given else sigmas
        return sum(self.scale * latents[:, int(4 * sigma)].flatten(1).mean(dim=1) for sigma in levels)


class OtherChannelsReward(FirstChannelReward):
    def load(self, policy: Policy) -> Reward:
        return OtherChannels(self.scale)
