"""Rewards whose scores can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from latentreward.alignment import Policy, Reward, RewardSource
from latentreward.core.contracts import LatentSpace, NoisyStates


class MeanLatent(Reward):
    """Mean of the latents, of which it is shown; remembers what it was asked."""

    differentiable = True

    def __init__(self, needs_clean: bool = False) -> None:
        super().__init__()
        self.needs_clean = needs_clean
        self.asked: list[NoisyStates] = []

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        return tuple(prompts)

    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        self.asked.append(states)
        latents = states.clean if self.needs_clean else states.latents
        assert latents is not None
        return latents.flatten(1).mean(dim=1)


class MeanLatentSource(RewardSource):
    """Where a YAML file finds it."""

    def __init__(self, needs_clean: bool = False) -> None:
        self.needs_clean = needs_clean

    def latent_space(self) -> LatentSpace | None:
        return None

    def scores_states(self) -> bool:
        return not self.needs_clean

    def load(self, policy: Policy) -> Reward:
        return MeanLatent(self.needs_clean)
