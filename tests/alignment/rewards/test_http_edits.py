"""A served reward of edits and a policy that edits: pictures travel with their sources."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from latentreward.alignment import HTTPReward, Policy
from latentreward.alignment.rewards.base import check_edits
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import InputError
from latentreward.core.reports.drawing import to_image
from latentreward.reward import RemoteServer, RewardModel, ServedImages, edit_prompt
from tests.apps.serving.servers import serving
from tests.diffusion.families.twins import TWINS
from tests.reward.scoring.models import edit_reward

RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))
PROMPTS = [edit_prompt("make it red", source) for source in (RED, BLUE)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = TWINS["klein_base"].source().load()
    assert policy.source_encoder is not None
    policy.source_encoder.resize_to(32, 48)
    return policy


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, RewardModel]]:
    model = edit_reward()
    with serving(model, max_wait_ms=1) as (url, _):
        yield url, model


LATENTS = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([0, 1, 1])


@torch.no_grad()
def test_pictures_travel_with_their_sources(policy: Policy, served: tuple[str, RewardModel]) -> None:
    url, model = served
    reward = HTTPReward(RemoteServer(url), ServedImages()).load(policy)
    found = reward.score_clean(LATENTS, ROWS, reward.encode_prompts(PROMPTS))
    decoded = reward.decode(NoisyStates(LATENTS, torch.zeros(3), ROWS, LATENTS))
    images = [to_image(pixels) for batch in decoded for pixels in batch]
    wanted = model.score([PROMPTS[row] for row in ROWS], images)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_a_reward_of_edits_and_a_policy_without_are_refused_before_the_run() -> None:
    edits, plain, both = (1, 16), (0, 0), (0, 16)
    with pytest.raises(InputError, match=r"^judge: it judges edits of pictures, and the policy makes pictures"):
        check_edits("judge", edits, plain)
    with pytest.raises(InputError, match="it judges pictures made from text alone, and the policy makes edits"):
        check_edits("judge", plain, (1, 1))
    for reward, policy in ((edits, (1, None)), (plain, plain), (both, plain), (plain, (0, None)), (both, (1, 1))):
        check_edits("judge", reward, policy)
