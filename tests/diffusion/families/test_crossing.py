"""A reward of one family steers policies of another with the same latent space, and no others."""

from itertools import product
from pathlib import Path

import pytest
import torch

from latentreward.alignment import LatentReward
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.reward import GatedQFormerHead, RewardModel
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin, noise_for

BY_FAMILY = {twin.family: twin for twin in TWINS.values()}
SPACES = {
    **dict.fromkeys(("flux1", "flux1_kontext", "z_image", "lumina2", "chroma", "hidream"), "FLUX.1"),
    **dict.fromkeys(("qwen_image", "wan21", "krea2"), "Wan"),
    **dict.fromkeys(("flux2_klein", "ernie_image", "ideogram4"), "FLUX.2"),
}
"""Families that share a space, by families' names; any other has its own."""


def reward_of(twin: Twin, folder: Path) -> LatentReward:
    torch.manual_seed(0)
    backbone = create_backbone(twin.backbone, source=twin.folder, visual_taps=[1], text_taps=[1], tuning="frozen")
    model = RewardModel(backbone, GatedQFormerHead(backbone.feature_spec, num_queries=2, num_heads=2)).eval()
    model.save_pretrained(folder / twin.family)
    return LatentReward(str(folder / twin.family), base=twin.folder)


def test_families_share_the_spaces_of_their_vaes() -> None:
    spaces = {name: twin.source().latent_space() for name, twin in BY_FAMILY.items()}
    for first, second in product(spaces, spaces):
        shared = SPACES.get(first, first) == SPACES.get(second, second)
        assert (spaces[first] == spaces[second]) == shared, (first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewarded", "steered"),
    [
        ("z_image", "flux1"),
        ("wan21", "qwen_image"),
        ("flux1", "chroma"),
        ("flux1", "hidream"),
        ("flux2_klein", "ernie_image"),
        ("flux2_klein", "ideogram4"),
        ("wan21", "krea2"),
    ],
)
def test_a_reward_scores_states_of_another_familys_policy(rewarded: str, steered: str, tmp_path: Path) -> None:
    source = reward_of(BY_FAMILY[rewarded], tmp_path)
    policy = BY_FAMILY[steered].source().load()
    source.require_latents_of(BY_FAMILY[steered].source())
    reward = source.load(policy)
    latents = noise_for(policy.latent_shape(*BY_FAMILY[steered].size))
    timesteps = torch.tensor([250.0, 900.0])
    encoded = reward.encode_prompts(PROMPTS)
    scores = reward(NoisyStates(latents, timesteps, torch.arange(2)), encoded)
    own = RewardModel.from_pretrained(source.path, base=BY_FAMILY[rewarded].folder)
    with torch.no_grad():
        features = own.backbone(latents, timesteps, own.backbone.encode_prompts(PROMPTS))
    torch.testing.assert_close(scores, own.head(features).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rewarded", "steered"), [("z_image", "qwen_image"), ("wan21", "flux2_klein")])
def test_across_spaces_it_is_refused_with_both_named(rewarded: str, steered: str, tmp_path: Path) -> None:
    source, other = reward_of(BY_FAMILY[rewarded], tmp_path), BY_FAMILY[steered].source()
    with pytest.raises(InputError) as refused:
        source.require_latents_of(other)
    message = str(refused.value)
    assert str(source.latent_space()) in message and str(other.latent_space()) in message and "\n" not in message
