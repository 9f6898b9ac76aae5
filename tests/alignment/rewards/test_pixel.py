"""Rewards on decoded predictions: what is decoded, by what it is scored, and how it is refused."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentreward.alignment import PixelReward, Policy, Reward
from latentreward.alignment.rewards.pixel import StepAwareReward
from latentreward.core.contracts import NoisyStates
from latentreward.core.reports.drawing import to_image
from latentreward.reward import CallableScorer, ImageScorer
from latentreward.reward.scorers.step_aware import StepAwareCLIP, load_step_aware
from tests.alignment.policies.alignment import tiny_source
from tests.reward.scorers.tiny_clip import write_clip

PROMPTS = ("a cat", "two dogs")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_source("sd15").load()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> StepAwareCLIP:
    """As if it had been trained."""
    clip, _ = load_step_aware(write_clip(tmp_path_factory.mktemp("clip") / "model"))
    generator = torch.Generator().manual_seed(0)
    for parameter in clip.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return clip


def states(policy: Policy, count: int = 5) -> NoisyStates:
    latents, clean = torch.randn(2, count, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    return NoisyStates(latents, torch.linspace(1, 901, count), torch.arange(count) % 2, clean)


def redness(prompts: list[str], images: list[Image.Image]) -> Tensor:
    reds = [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]
    return torch.tensor([red + len(prompt) for red, prompt in zip(reds, prompts, strict=True)])


def pixel_reward(scorer: ImageScorer, policy: Policy, **options: int) -> Reward:
    return PixelReward(scorer, **options).load(policy)


@pytest.mark.parametrize("decode_batch_size", [1, 2, 8])
def test_an_image_scorer_sees_the_decoded_prediction_and_its_prompt(policy: Policy, decode_batch_size: int) -> None:
    scorer = CallableScorer(redness, "redness")
    reward, given = pixel_reward(scorer, policy, decode_batch_size=decode_batch_size), states(policy)
    pictures = [to_image(pixels) for pixels in policy.vae.decode(given.clean)]
    expected = redness([PROMPTS[row] for row in given.rows], pictures)
    torch.testing.assert_close(reward(given, reward.encode_prompts(PROMPTS)), expected.float())
    assert PixelReward(scorer).latent_space() is None


def test_the_step_aware_scorer_is_told_each_states_timestep(policy: Policy, network: StepAwareCLIP) -> None:
    reward, given = StepAwareReward(network, policy, decode_batch_size=2), states(policy)
    encoded = reward.encode_prompts(PROMPTS)
    with torch.no_grad():
        found = reward(given, encoded)
        pixels = policy.vae.decode(given.clean)
        texts = network.embed_tokens(network.tokenize(PROMPTS))[given.rows]
        expected = network.similarity(network.embed_images(pixels, given.timesteps), texts)
        torch.testing.assert_close(found, expected)
        later = reward(replace(given, timesteps=given.timesteps.flip(0)), encoded)
    assert (found - later).abs().max() > 1e-4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reward(given, reward.encode_prompts(PROMPTS)), found, rtol=0, atol=0)


def test_gradients_reach_the_prediction_and_no_weight(policy: Policy, network: StepAwareCLIP) -> None:
    reward, given = StepAwareReward(network, policy, decode_batch_size=2), states(policy)
    clean = given.clean.clone().requires_grad_()
    reward(replace(given, clean=clean), reward.encode_prompts(PROMPTS)).sum().backward()
    assert (clean.grad.flatten(1).norm(dim=1) > 0).all()
    assert not [name for name, parameter in reward.named_parameters() if parameter.requires_grad]
    assert reward.differentiable


def test_the_policys_weights_are_not_the_rewards(policy: Policy, network: StepAwareCLIP) -> None:
    assert not list(pixel_reward(CallableScorer(redness, "redness"), policy).parameters())
    reward = StepAwareReward(network, policy, 2)
    assert {id(p) for p in reward.parameters()} == {id(p) for p in network.parameters()}
