import pytest

from latentreward.alignment import Policy, PolicySource, Sampling, sample_latents
from latentreward.apps.generation import Candidates, search_latents
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
