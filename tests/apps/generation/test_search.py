"""The best of N samples, and step-wise search in the package's own loop."""

from functools import partial

import pytest
import torch

from latentreward.alignment import Policy, PolicySource, Sampling, sample_latents
from latentreward.apps.generation import Candidates, best_of_n, search_latents
from latentreward.core.contracts import PromptBatch
from tests.apps.generation.toy_rewards import MeanLatent
from tests.marks import rotated_after

PROMPTS = PromptBatch(("a large red circle on a white background", "two blue crosss on a gray background"), ("0", "1"))
STEPS = 5


@pytest.fixture(scope="module", params=["sd_tiny", "sd35_tiny"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return PolicySource(request.param).load().eval()


@pytest.mark.parametrize("needs_clean", rotated_after(1, [False, True]))
def test_search_raises_the_reward_above_plain_sampling(policy: Policy, needs_clean: bool) -> None:
    sampling, reward = Sampling(STEPS).with_noise(), MeanLatent(needs_clean)
    found = search_latents(policy, reward, PROMPTS, Candidates(6), sampling, 3.0, seed=0)
    plain = sample_latents(policy, PROMPTS, sampling, 3.0, seed=0)
    assert found.mean() > plain.mean() + 0.01
    assert len(reward.asked[0].latents) == 6 * len(PROMPTS)


def test_the_best_of_all_samples_is_kept() -> None:
    means = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 6.0], [3.0, 6.0]])
    made = means.T[..., None] + torch.arange(4.0)[:, None] * torch.tensor([-1.0, 1.0])
    latents, names, scores = best_of_n(lambda names: made.reshape(8, 1, 1, 2), MeanLatent(), PROMPTS, 4)
    assert latents.flatten().tolist() == [2.0, 4.0, 4.0, 8.0]  # of equal samples the first: numbers 1 and 2
    assert scores.tolist() == means.tolist()
    assert names.keys == ("0/1", "1/2")


@pytest.mark.slow
def test_more_samples_of_a_policy_never_score_lower() -> None:
    policy = PolicySource("sd_tiny").load().eval()
    sample = partial(sample_latents, policy, sampling=Sampling(4, eta=0.0), guidance_scale=1.0, seed=0)
    (_, _, few), (latents, _, many) = (best_of_n(sample, MeanLatent(), PROMPTS, number) for number in (2, 5))
    torch.testing.assert_close(few, many[:2])
    assert (many.max(dim=0).values >= few.max(dim=0).values - 1e-5).all()
    assert (many.std(dim=0) > 0).all()
    torch.testing.assert_close(latents.flatten(1).mean(dim=1), many.max(dim=0).values)
