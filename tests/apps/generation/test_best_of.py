from functools import partial

import pytest
import torch

from latentreward.apps.generation import best_of_n
from latentreward.contracts import PromptBatch
from latentreward.policies import PolicySource
from latentreward.rollout import Sampling, sample_latents
from tests.apps.generation.toy_rewards import MeanLatent

PROMPTS = PromptBatch(("a large red circle on a white background", "two blue crosss on a gray background"), ("0", "1"))


def test_the_best_of_all_samples_is_kept() -> None:
    made = iter(torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 6.0], [3.0, 6.0]]))
    best = best_of_n(lambda prompts: next(made).view(2, 1, 1, 1), MeanLatent(), PROMPTS, 4)
    assert best.latents.flatten().tolist() == [3.0, 6.0]
    assert best.index.tolist() == [1, 2]
    assert best.scores.shape == (4, 2)


@pytest.mark.slow
def test_more_samples_of_a_policy_never_score_lower() -> None:
    policy = PolicySource("sd_tiny").load().eval()
    sample = partial(sample_latents, policy, sampling=Sampling(4, eta=0.0), guidance_scale=1.0, seed=0)
    few, many = (best_of_n(sample, MeanLatent(), PROMPTS, number) for number in (2, 5))
    assert torch.equal(few.scores, many.scores[:2])
    assert (many.scores.max(dim=0).values >= few.scores.max(dim=0).values).all()
    assert (many.scores.std(dim=0) > 0).all()
    torch.testing.assert_close(many.latents.flatten(1).mean(dim=1), many.scores.max(dim=0).values)
