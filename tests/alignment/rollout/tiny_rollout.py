"""Small policies and rewards to roll out with."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment import CandidateStep, Policy, PolicySource, Reward, RolloutDraws, candidate_steps
from latentreward.core.contracts import NoisyStates, PromptBatch
from tests.tiny_pipelines import source_of

PROMPTS = PromptBatch(
    ("a red circle on a black background", "a blue cross on a white background", "a red circle on a black background"),
    ("first", "second", "third"),
)


@cache
def tiny_policy(name: str) -> Policy:
    """Of a tiny pipeline; tests only read it."""
    return PolicySource(source_of(name)).load().eval()


class Brightness(Reward):
    """Mean of the states (or of their clean prediction) times a factor per prompt; notes what it was asked."""

    def __init__(self, needs_clean: bool = False) -> None:
        super().__init__()
        self.needs_clean = needs_clean
        self.asked: list[NoisyStates] = []

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([10.0 + len(prompt) for prompt in prompts])

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        self.asked.append(states)
        values = states.latents if states.clean is None else states.clean
        return encoded[states.rows] * values.mean(dim=(1, 2, 3))


class NetworkRows:
    """Rows and timestep of every call of a policy's network, while it is entered."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.calls = policy, []

    def __enter__(self) -> list[tuple[int, float]]:
        predict = type(self.policy).predict

        def counted(latents: Tensor, timesteps: Tensor, *others: Any) -> Tensor:
            self.calls.append((len(latents), timesteps[0].item()))
            return predict(self.policy, latents, timesteps, *others)

        self.policy.predict = counted
        return self.calls

    def __exit__(self, *_: object) -> None:
        del self.policy.predict


def roll_out(
    policy: Any, sampler: Any, reward: Any, prompts: PromptBatch, *settings: Any, seed: int
) -> tuple[list[CandidateStep], Tensor]:
    """All steps of :func:`candidate_steps`, and the finished latents."""
    steps, rollout = [], candidate_steps(policy, sampler, reward, prompts, *settings, RolloutDraws(seed, prompts.keys))
    while True:
        try:
            steps.append(next(rollout))
        except StopIteration as finished:
            return steps, finished.value
