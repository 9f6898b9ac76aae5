"""Choosing by a shipped scorer makes pictures that the judge, who is no reward, likes better."""

from functools import partial

import pytest
import torch
from torch import Tensor

from latentreward.alignment import PixelReward, Policy, PolicySource, Reward, Sampling, sample_latents
from latentreward.apps.generation import Candidates, best_of_n, search_latents
from latentreward.core.contracts import PromptBatch
from latentreward.reward import StepAwareScorer
from latentreward.tinyworld.captions import held_out_captions
from latentreward.tinyworld.oracle import utility_scores

CAPTIONS = held_out_captions(24, seed=5)
PROMPTS = PromptBatch(tuple(CAPTIONS), tuple(map(str, range(len(CAPTIONS)))))
STEPS = 10


@pytest.fixture(scope="module")
def policy() -> Policy:
    return PolicySource("sd_tiny").load().eval()


@pytest.fixture(scope="module")
def reward(policy: Policy) -> Reward:
    return PixelReward(StepAwareScorer("spm_tiny", device="cpu")).load(policy).eval()


def utility(policy: Policy, latents: Tensor) -> float:
    assert policy.vae is not None
    pictures = ((policy.vae.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return float(utility_scores(CAPTIONS, list(pictures.numpy())).mean())


@pytest.mark.slow
def test_best_of_four_has_a_higher_utility(policy: Policy, reward: Reward) -> None:
    sample = partial(sample_latents, policy, sampling=Sampling(STEPS, eta=0.0), guidance_scale=1.0, seed=0)
    best, scores = best_of_n(sample, reward, PROMPTS, 4)
    first, (alone,) = best_of_n(sample, reward, PROMPTS, 1)
    assert torch.equal(alone, scores[0])
    assert utility(policy, best) > utility(policy, first) + 0.15


@pytest.mark.slow
def test_step_wise_search_has_a_higher_utility(policy: Policy, reward: Reward) -> None:
    sampling = Sampling(STEPS, eta=1.0)
    plain = sample_latents(policy, PROMPTS, sampling, 1.0, seed=0)
    found = search_latents(policy, reward, PROMPTS, Candidates(4), sampling, 1.0, seed=0)
    assert utility(policy, found) > utility(policy, plain) + 0.05
